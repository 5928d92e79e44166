"""A user's ERM beside DomainBed's published one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.scripts.collect_results import main
from tests.results.conftest import SweepMaker

NAMES = ("A", "C", "P", "S")


def make(root: Path, dataset: str = "PACS", n_envs: int = 4, **hparams: Any) -> Path:
    """Write two trials, all held-out domains of which have 84 and 86 percent."""
    sweep = SweepMaker(root, NAMES, dataset)
    for trial, percent in enumerate((84, 86)):
        for env in range(n_envs):
            accs = [(percent / 100, 0.5)] * len(NAMES)
            sweep.run("ERM", [env], {0: accs, 10: accs}, trial_seed=trial, hparams=hparams)
    return root


def test_one_line_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input_dir", str(make(tmp_path, backbone="resnet50")), "--published"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line == ("PACS, ERM, training-domain validation: yours 85.0 +- 1.0 (n = 2 trials), published 85.5: -0.5")


def test_another_network_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--input_dir", str(make(tmp_path, backbone="resnet18")), "--published"])
    assert "-0.5; yours is resnet18, theirs ResNet-50" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"dataset": "Toy"}, {"n_envs": 3}])
def test_where_there_is_nothing_it_says_so(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--published: no ERM of ColoredMNIST"):
        main(["--input_dir", str(make(tmp_path, **changes)), "--published"])


def test_it_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--published is lines of text"):
        main(["--input_dir", str(make(tmp_path)), "--published", "--format", "json"])
