"""`adapt` from checkpoint to json: the contract, going on, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.adaptation import adapt as protocol
from daft_domainbed.adaptation.adapt import AdaptArgs, adapt
from daft_domainbed.adaptation.methods import METHODS
from daft_domainbed.cli import run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.subject import load_subject
from daft_domainbed.models.weights import load
from daft_domainbed.scripts import adapt as command

KEYS = ["schema", "checkpoint", "test_env", "strong_ood", "strong_ratio", "batch_size", "rows"]


@pytest.fixture
def meet(teachers: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Adapts a checkpoint on Debug28 in a folder of the test's own."""

    def run(folder: str = "out", **options: Any) -> dict[str, Any]:
        flags = {"batch_size": 16, "n_trials": 2, "device": "cpu", "output_dir": str(tmp_path / folder)} | options
        return adapt(AdaptArgs(str(teachers["ERM"]), 0, **flags))[0]

    return run


def test_the_json_is_the_contracts(
    meet: Callable[..., dict[str, Any]], teachers: dict[str, Path], tmp_path: Path
) -> None:
    before = teachers["ERM"].read_bytes()
    record = meet()
    assert list(record) == KEYS
    assert json.loads((tmp_path / "out/adaptation.json").read_text()) == json.loads(json.dumps(record, allow_nan=False))
    assert (record["schema"], record["strong_ood"], record["strong_ratio"]) == (1, "noise", 1.0)
    assert [row["method"] for row in record["rows"]] == list(METHODS) == list(command.METHODS)
    for row in record["rows"]:
        assert list(row) == ["method", "acc_s", "acc_n", "acc_h", "n_trials", "stderr"]
        assert set(row["stderr"]) == {"acc_s", "acc_n", "acc_h"}
        assert all(0 <= row[kind] <= 100 for kind in row["stderr"])
    assert teachers["ERM"].read_bytes() == before
    assert meet("again") == record  # whenever and wherever


def test_one_trial_has_no_error_and_a_closed_set_no_outside(meet: Callable[..., dict[str, Any]]) -> None:
    rows = meet(strong_ratio=0.0, n_trials=1, methods=["test", "owttt"])["rows"]
    for row in rows:
        assert (row["acc_n"], row["acc_h"], row["stderr"]) == (None, None, None)
    assert meet("two", strong_ratio=0.0, methods=["test"])["rows"][0]["stderr"]["acc_n"] is None


def test_it_goes_on_wherever_it_was_killed(meet: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole = meet(methods=["source", "bn", "owttt"])
    journal = tmp_path / "out/journal.jsonl"
    text, draw = journal.read_bytes(), random.Random(0)
    for cut in [0, *(draw.randrange(len(text)) for _ in range(3)), len(text) - 1]:
        journal.write_bytes(text[:cut])
        assert meet(methods=["source", "bn", "owttt"]) == whole


def test_the_same_command_again_meets_nothing(
    meet: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = meet(methods=["source", "test"])
    monkeypatch.setattr(protocol, "measure_sources", None)
    assert meet(methods=["source", "test"]) == once
    assert meet(methods=["test"], n_trials=1)["rows"][0]["n_trials"] == 1
    assert json.loads((tmp_path / "out/adaptation.json").read_text()) == once  # what was met is not forgotten
    monkeypatch.undo()
    meet(methods=["test"], n_trials=3)
    card = (tmp_path / "out/adaptation.md").read_text()
    assert "2 to 3 orders" in card and [line.split("|")[5].strip() for line in card.splitlines() if "±" in line] == [
        "2",
        "3",
    ]
    with pytest.raises(UsageError, match="an adaptation with batch_size 16, not 8.*--output_dir"):
        meet(batch_size=8)


def test_sets_of_one_name_are_told_apart(meet: Callable[..., dict[str, Any]], image_folder: Path) -> None:
    meet(methods=["source"], strong_ood=f"folder:{image_folder}")
    other = image_folder.parent / "elsewhere" / image_folder.name
    shutil.copytree(image_folder, other)
    assert meet(methods=["source"], strong_ood=f"folder:{other}")["strong_ood"] == "folder:pictures"  # the same images
    next(other.rglob("*.png")).unlink()
    with pytest.raises(UsageError, match="an adaptation of other outside images"):
        meet(methods=["source"], strong_ood=f"folder:{other}")


def test_a_closed_set_says_nothing_of_where_it_was(meet: Callable[..., dict[str, Any]]) -> None:
    record = meet(methods=["source"], strong_ood="folder:/some/where/textures", strong_ratio=0.0)
    assert record["strong_ood"] == "folder:textures"


@pytest.mark.parametrize("methods", [["source"], ["owttt"]])
def test_answers_that_rest_on_no_features(tiny: Any, methods: list[str]) -> None:
    """SMA answers with averaged weights; its features are the last ones'."""
    run = tiny.train(algorithm="SMA", hparams={"sma_start": 1, "lr": 0.1})
    args = AdaptArgs(str(run / "model.pkl"), 0, methods=methods, n_trials=1, device="cpu")
    if methods == ["source"]:
        assert adapt(args)[0]["rows"][0]["acc_s"] is not None
    else:
        with pytest.raises(
            UsageError, match="the answers of SMA do not rest on the features.*--methods source bn tent"
        ):
            adapt(args)


def test_a_stream_shorter_than_a_batch(meet: Callable[..., dict[str, Any]]) -> None:
    assert all(row["acc_s"] is not None for row in meet(batch_size=1000, n_trials=1)["rows"])


def test_every_image_is_met_once(teachers: dict[str, Path]) -> None:
    subject = load_subject(teachers["ERM"], "", device=torch.device("cpu"))
    stream = protocol.make_stream(subject, 0, protocol.find_outside("noise", subject, None), 0.5, 0)
    orders = []
    for trial in (0, 0, 1):
        batches = list(stream.list_batches(trial, 7))
        assert {len(x) for x, _ in batches[:-1]} == {7}
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        own = x[y < subject.n_classes]
        wanted, labels = subject.load(stream.env, stream.weak)
        assert len(x) - len(own) == len(stream.strong) == round(len(stream.weak) / 2)
        matches = (own.flatten(1)[:, None] == wanted.flatten(1)[None]).all(2)
        assert matches.any(0).all()
        assert y[y < subject.n_classes].tolist() == labels[matches.int().argmax(1)].tolist()
        orders.append(x)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_the_adapted_checkpoint_is_written_beside(
    teachers: dict[str, Path], tiny: Any, tmp_path: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own" / "model.pkl"
    path.parent.mkdir()
    path.write_bytes(teachers["ERM"].read_bytes())
    args = AdaptArgs(str(path), 0, methods=["owttt"], n_trials=1, batch_size=16, save=True, device="cpu")
    record, _ = adapt(args)
    saved = path.with_name("model_owttt_0-noise-1.pkl")
    assert f"saved {saved}" in capfd.readouterr().err
    load_subject(saved, "", device=torch.device("cpu"))
    assert "was adapted to environment 0 by owttt: it has seen that domain" in capfd.readouterr().err
    content = load(saved)
    assert content["adapted"]["method"] == "owttt"
    assert content["args"] == load(path)["args"]
    changed = [name for name, value in content["model_dict"].items() if not value.equal(load(path)["model_dict"][name])]
    assert changed
    saved.unlink()
    assert adapt(args)[0] == record  # and it is there again
    adapt(replace(args, seed=1, output_dir=str(tmp_path / "other")))
    assert load(saved)["adapted"] == content["adapted"] | {"seed": 1}
    adapt(args)  # which finds another stream's weights there
    assert all(value.equal(load(saved)["model_dict"][name]) for name, value in content["model_dict"].items())
    adapt(replace(args, strong_ood=f"folder:{image_folder}"))
    assert load(path.with_name("model_owttt_0-folder_pictures-1.pkl"))["adapted"]["strong_ood"] == "folder:pictures"
    with pytest.raises(UsageError, match="adapted to images of a held-out domain"):
        tiny.train("kd", {"teacher": str(saved)}, algorithm="KD")
    with pytest.raises(UsageError, match="add owttt"):
        adapt(AdaptArgs(str(path), 0, methods=["bn"], save=True))


def test_bad_input_is_one_line(teachers: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    erm, out = teachers["ERM"], ("--output_dir", tmp_path / "out")
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "lost.pkl", "--test_env", 0], "lost.pkl"),
        ([erm, "--test_env", 1, *out], "held out 0 (0)"),
        ([erm, "--test_env", 9, *out], "--test_env 9"),
        ([erm], "--test_env"),
        ([erm, "--test_env", 0, "--strong_ratio", "-1", *out], "'-1'"),
        ([erm, "--test_env", 0, "--strong_ratio", "all", *out], "'all'"),
        ([erm, "--test_env", 0, "--methods", "magic", *out], "'magic'"),
        ([erm, "--test_env", 0, "--batch_size", 0, *out], "--batch_size"),
        ([erm, "--test_env", 0, "--strong_ood", "Nonsense", *out], "Nonsense"),
        ([erm, "--test_env", 0, "--strong_ood", "folder:/nowhere", *out], "no such folder"),
        ([erm, "--test_env", 0, "--strong_ood", "classes:x", *out], "left out nothing"),
        ([erm, "--test_env", 0, "--strong_ratio", 1e-9, *out], "is none: 0 says so"),
    ]
    for argv, said in cases:
        capfd.readouterr()
        status = run_command("adapt", [*map(str, argv), "--device", "cpu"])
        captured = capfd.readouterr()
        assert (status, captured.out, len(captured.err.splitlines())) == (2, "", 1), argv
        assert said in captured.err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_card_or_json(
    teachers: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [str(teachers["ERM"]), "--test_env", "0", "--methods", "source", "--n_trials", "2", "--batch_size", "16"]
    argv += ["--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert run_command("adapt", [*argv, "--format", "json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert list(record) == KEYS
    assert run_command("adapt", argv) == 0
    card = capfd.readouterr().out
    assert f"| source | {record['rows'][0]['acc_s']:.1f} ±" in card
    assert "by true labels" in card
