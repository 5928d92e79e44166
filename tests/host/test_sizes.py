"""Sizes of networks: against published numbers, and in the records."""

from __future__ import annotations

from typing import Any

import pytest

from daft_domainbed.host import contract
from daft_domainbed.host.sizes import measure_network
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.launch.summary import list_size_warnings
from daft_domainbed.plugin.registration import register
from tests.conftest import get_defaults, read_records
from tests.launch.conftest import make_sweep


def measure(algorithm: str, dataset: str, shape: tuple[int, ...], classes: int, **changes: Any) -> dict[str, int]:
    host = contract.find_host()
    register(host)
    return measure_network(host, algorithm, get_defaults(host, algorithm, dataset) | changes, shape, classes)


def test_resnet18_has_its_published_size() -> None:
    """torchvision's table: 11,689,512 parameters, 1.81 G multiply-adds."""
    size = measure("ERM", "PACS", (3, 224, 224), 1000, backbone="resnet18", backbone_frozen="stages:2")
    assert size["parameters"] == 11_689_512 and size["multiply_adds"] / 1e9 == pytest.approx(1.814, abs=1e-3)


def test_methods_with_more_weights_count_what_answers() -> None:
    plain = measure("ERM", "EmojiStyles", (3, 32, 32), 8)
    assert measure("SMA", "EmojiStyles", (3, 32, 32), 8) == plain  # an average beside it is no larger network
    assert measure("ERM", "EmojiStyles", (3, 32, 32), 9)["parameters"] == plain["parameters"] + 32 + 1


def test_what_cannot_be_built_has_no_size() -> None:
    assert measure("ERM", "EmojiStyles", (3, 32, 32), 8, backbone="resnet99") == {}


def test_records_name_student_and_teacher_and_warn(tiny: Any) -> None:
    run = tiny.train(algorithm="KD", steps=1)
    first = read_records(run)[0]
    assert first["size"]["parameters"] < first["teacher"]["size"]["parameters"]
    assert first["size"]["multiply_adds"] > 0 and "not the smaller one" not in (run / "err.txt").read_text()
    run = tiny.train("large", {"backbone": "resnet8_w8"}, algorithm="KD", steps=1)
    assert "the student of KD is not the smaller one: 0.020 M parameters, its teacher" in (run / "err.txt").read_text()


def test_a_sweep_warns_once_for_each_method(tmp_path: Any) -> None:
    sweep = make_sweep(tmp_path, "ERM", "AFT", "KD", n_trials=2, user={"backbone": "resnet8_w8"})
    (warning,) = list_size_warnings(make_plan(sweep))
    assert warning.startswith(
        "Debug28: the student of KD is not the smaller one: 0.020 M parameters, its teacher 0.005 M"
    )
    assert list_size_warnings(make_plan(make_sweep(tmp_path, "KD"))) == []


def test_a_fine_tuned_teacher_has_the_network_that_it_starts_from(tmp_path: Any) -> None:
    """DAFT's teacher is AFT's, and what is described is the ERM network below."""
    small = {"backbone": "resnet8_w8"}
    assert (
        list_size_warnings(make_plan(make_sweep(tmp_path, "DAFT", user=small | {"teacher_backbone": "resnet8_w9"})))
        == []
    )
    (warning,) = list_size_warnings(
        make_plan(make_sweep(tmp_path, "DAFT", user=small | {"teacher_backbone": "resnet8_w7"}))
    )
    assert "the student of DAFT is not the smaller one" in warning
