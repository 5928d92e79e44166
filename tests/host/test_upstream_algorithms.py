"""Our engine over algorithms that only upstream has: they train, and an interrupted run ends as a whole one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.host import contract
from daft_domainbed.training import resume
from tests.conftest import Stopped, stop_after

pytestmark = pytest.mark.usefixtures("upstream")

# Each keeps something elsewhere than in its weights; penalties set in, and optimizers change, within the few steps.
RUNS: dict[str, dict[str, Any]] = {
    "ERM": {},
    "IRM": {"hparams": {"irm_penalty_anneal_iters": 4}},
    "GroupDRO": {},
    "Mixup": {},
    "CORAL": {},
    "MLDG": {},
    "ERMPlusPlus": {"hparams": {"linear_steps": 1}},
    "Fish": {},
    "DANN": {"task": "domain_adaptation", "uda_holdout_fraction": 0.7},
    "MTL": {},
    "EQRM": {"hparams": {"eqrm_burnin_iters": 4}},
}


@pytest.mark.parametrize("algorithm", RUNS)
def test_interrupted_run_ends_as_a_whole_one(
    tiny: Any, outcome: Callable[[Path], dict[str, Any]], algorithm: str
) -> None:
    flags = {"host": "upstream", "algorithm": algorithm, "steps": 8, **RUNS[algorithm]}
    tiny.train("whole/run", **flags)
    for step in (2, 4, 6):  # each time all since the last checkpoint is lost
        with pytest.raises(Stopped):
            tiny.train("stopped/run", on_step=stop_after(step), **flags)
    tiny.train("stopped/run", **flags)
    assert outcome(tiny.root / "stopped") == outcome(tiny.root / "whole")
    steps = [json.loads(line)["step"] for line in (tiny.root / "whole/run/results.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 6, 7]


def test_what_cannot_be_saved_is_named_at_the_start(tiny: Any) -> None:
    log = tiny.train("eqrm", host="upstream", algorithm="EQRM", steps=1) / "err.txt"
    assert "may not go on exactly where it was, because dist of EQRM cannot be saved" in log.read_text()
    log = tiny.train("erm", host="upstream", algorithm="ERM", steps=1) / "err.txt"
    assert log.read_text() == ""


@pytest.mark.parametrize("algorithm", ["KD", "AFT", "DAFT", "SMA"])
def test_nothing_of_ours_is_left_unsaved(tiny: Any, monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    captured = []
    capture = resume.capture

    def watch(algorithm: Any) -> dict[str, Any]:
        captured.append((type(algorithm).__name__, resume.list_unsaved(algorithm)))
        return capture(algorithm)

    monkeypatch.setattr(resume, "capture", watch)
    tiny.train(host="upstream", algorithm=algorithm, steps=2)
    assert captured[-1] == (algorithm, [])
    host = contract.find_host("upstream")
    assert issubclass(host.algorithms.get_algorithm_class(algorithm), host.algorithms.Algorithm)
