"""Which domains are held out, as words say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.launch.domains import find_test_envs, list_test_envs
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.scripts.sweep import read_config
from tests.launch.conftest import make_sweep

STYLES = ["noto", "twemoji", "openmoji", "contrast"]


def ask(words: list[str], environments: list[str] = STYLES) -> list[list[int]]:
    return list_test_envs(make_sweep(Path("out"), test_envs=words), environments, "Toy")


@pytest.mark.parametrize(
    ("words", "sets"),
    [
        (["noto", "twemoji"], [[0], [1]]),
        (["0,1", "2"], [[0, 1], [2]]),
        (["contrast,0"], [[0, 3]]),
        (["1", "twemoji"], [[1]]),
        (["0,1,2"], [[0, 1, 2]]),
    ],
)
def test_each_word_is_a_set(words: list[str], sets: list[list[int]]) -> None:
    assert ask(words) == sets


def test_a_number_is_a_position_where_there_is_one_else_a_name() -> None:
    assert ask(["1", "7", "2020"], ["7", "2020", "1"]) == [[1], [0]]
    assert ask(["a,b", "a"], ["a", "b", "a,b"]) == [[2], [0]]
    assert ask(["01", "2"], ["01", "02", "03"]) == [[0], [2]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["notto"], "'notto': Toy has 4 environments, numbered 0 to 3: noto, .* Did you mean 'noto'?"),
        (["4"], "'4': Toy has 4 environments"),
        (["-1"], "'-1': Toy has 4"),
        (["0,noto"], "0,noto: an environment is named twice"),
        (["0,"], "'': Toy has 4"),
    ],
)
def test_what_is_no_domain_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ask(words)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"test_envs": ["0"], "single_test_envs": True}, "--test_envs and --single_test_envs say different"),
        ({"test_envs": ["0"], "single_source": True}, "--test_envs and --single_source say different"),
        ({"single_source": True, "single_test_envs": True}, "--single_test_envs and --single_source say different"),
        ({"test_envs": ["0,1,2"], "single_test_envs": False}, "all 3 environments of Debug28 are held out"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        make_plan(make_sweep(tmp_path, **{"single_test_envs": False, **flags}))


def test_a_single_source_is_trained_on_alone(tmp_path: Path) -> None:
    jobs = make_plan(make_sweep(tmp_path, "KD", single_test_envs=False, single_source=True))
    assert [(job.stage, job.args.test_envs) for job in jobs] == [
        (stage, envs) for stage in ("erm_teacher", "student") for envs in ([1, 2], [0, 2], [0, 1])
    ]


def test_a_file_of_a_sweep_has_words_too(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text('test_envs: ["0,1", noto, 2]\n')
    assert read_config(tmp_path / "sweep.yaml", "launch")["test_envs"] == ["0,1", "noto", "2"]


def test_a_runs_words_are_all_of_one_set() -> None:
    assert find_test_envs(["noto", "3"], "EmojiStyles", "embedded") == [0, 3]
    with pytest.raises(UsageError, match="Did you mean 'openmoji'?"):
        find_test_envs(["openmoj"], "EmojiStyles", "embedded")
