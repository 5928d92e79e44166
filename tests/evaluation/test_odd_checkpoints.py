"""Checkpoints that are old, foreign or broken: each is judged, or refused in one line that names it."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.models.weights import to_plain
from tests.evaluation.conftest import ENVS, run_evaluate

pytestmark = pytest.mark.usefixtures("small_suites")

Content = dict[str, Any]
NEWER = ("task", "uda_holdout_fraction", "host", "device", "precision", "teachers_dir", "data_seed", "image_cache")


def set_args(**values: Any) -> Callable[[Content], None]:
    return lambda content: content["args"].update(values)


def set_hparams(**values: Any) -> Callable[[Content], None]:
    return lambda content: content["model_hparams"].update(values)


def set_keys(**values: Any) -> Callable[[Content], None]:
    return lambda content: content.update(values)


def drop(*names: str, of: str | None = None) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        for name in names:
            (content if of is None else content[of]).pop(name, None)

    return spoil


def change_weights(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        content["model_dict"] = dict(change(name, value) for name, value in content["model_dict"].items())

    return spoil


def fill_first(value: float) -> Callable[[Content], Any]:
    return lambda content: next(iter(content["model_dict"].values())).fill_(value)


REFUSED: dict[str, Callable[[Content], Any]] = {
    "no held-out domains": drop("test_envs", of="args"),
    "no data set": drop("dataset", of="args"),
    "no seed": drop("seed", of="args"),
    "held-out domain a name": set_args(test_envs="first"),
    "held-out domain beyond the data": set_args(test_envs=[9]),
    "held-out domain negative": set_args(test_envs=[-1]),
    "held-out domains no list": set_args(test_envs=None),
    "all domains held out": set_args(test_envs=[0, 1, 2]),
    "trial seed missing": set_args(trial_seed=None),
    "seed a word": set_args(seed="zero"),
    "seed infinite": set_args(seed=float("inf")),
    "holdout 7": set_args(holdout_fraction=7),
    "holdout 0": set_args(holdout_fraction=0.0),
    "holdout NaN": set_args(holdout_fraction=float("nan")),
    "data set a list": set_args(dataset=["Debug28"]),
    "data set unknown": set_args(dataset="Nonsense"),
    "data set another": set_args(dataset="Debug28"),
    "data folder gone": set_args(dataset="folder:/nowhere/at/all"),
    "algorithm unknown": set_args(algorithm="Nonsense"),
    "algorithm upstream's": set_args(algorithm="IRM"),
    "algorithm no text": set_args(algorithm=7),
    "host a number": set_args(host=3),
    "left out no list": set_args(leave_out_classes="red"),
    "left out unknown": set_args(leave_out_classes=["mauve"]),
    "left out after all": set_args(leave_out_classes=["red"]),
    "classes 7": set_keys(model_num_classes=7),
    "classes a text": set_keys(model_num_classes="3"),
    "shape another": set_keys(model_input_shape=(3, 8, 8)),
    "domains None": set_keys(model_num_domains=None),
    "hyperparameters None": set_keys(model_hparams=None),
    "hyperparameters missing": drop("model_hparams"),
    "args None": set_keys(args=None),
    "provenance another": set_keys(provenance={"dataset": "PACS"}),
    "backbone missing": drop("backbone", of="model_hparams"),
    "backbone unknown": set_hparams(backbone="resnet9000"),
    "backbone wider": set_hparams(backbone="resnet8_w8"),
    "backbone no text": set_hparams(backbone=8),
    "a weight missing": lambda content: content["model_dict"].popitem(),
    "a weight too many": lambda content: content["model_dict"].update(extra=torch.zeros(1)),
    "a weight NaN": fill_first(float("nan")),
    "a weight infinite": fill_first(float("inf")),
    "weights of DataParallel": change_weights(lambda name, value: (f"module.{name}", value)),
    "weights transposed": change_weights(lambda name, value: (name, value.flatten())),
    "weights None": set_keys(model_dict=None),
}

JUDGED: dict[str, Callable[[Content], Any]] = {
    "of years ago": lambda content: (drop(*NEWER, of="args")(content), drop("provenance")(content)),
    "no algorithm": drop("algorithm", of="args"),
    "no provenance": drop("provenance"),
    "provenance no dictionary": set_keys(provenance="lost"),
    "shape a list": lambda content: content.update(model_input_shape=list(content["model_input_shape"])),
    "further keys": set_keys(epoch=7, optimizer={"state": {}}),
    "unknown argument": set_args(save_model_every_checkpoint=True),
    "unknown hyperparameter": set_hparams(nonlinear_classifier=False, resnet50_augmix=True),
    "weights in half": change_weights(lambda name, value: (name, value.half() if value.is_floating_point() else value)),
    "weights in double": change_weights(lambda name, value: (name, value.double())),
    "held-out domain a float": set_args(test_envs=[0.0]),
    "output folder gone": set_args(output_dir="/nowhere/at/all"),
    "scalars of numpy": lambda content: content["args"].update(
        trial_seed=np.int64(0), holdout_fraction=np.float64(0.2)
    ),
}


def write(path: Path, content: Content, spoil: Callable[[Content], Any]) -> Path:
    spoil(content)
    torch.save(content, path)
    return path


def assert_refused(capfd: pytest.CaptureFixture[str], path: Path) -> None:
    status, printed, errors = run_evaluate(capfd, path)
    assert (status, printed, len(errors)) == (2, "", 1), errors
    assert path.name in errors[0]
    assert not (path.parent / "evaluation").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(trained: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    assert_refused(capfd, write(tmp_path / "odd.pkl", load_checkpoint(trained["erm"]), REFUSED[kind]))


@pytest.mark.parametrize("kind", JUDGED)
def test_judged(trained: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    path = write(tmp_path / "odd.pkl", load_checkpoint(trained["erm"]), JUDGED[kind])
    status, printed, _ = run_evaluate(capfd, path, "--format", "json", "--norm", "linf", "--n_examples", 2)
    assert status == 0
    (model,) = json.loads(printed)["models"]
    assert (model["checkpoint"], model["environments"], model["fidelity"]) == (str(path), ENVS, None)


FILES: dict[str, Callable[[Path, Path], Any]] = {
    "empty": lambda path, _: path.touch(),
    "a folder": lambda path, _: path.mkdir(),
    "text": lambda path, _: path.write_text("weights, honestly\n"),
    "half a checkpoint": lambda path, real: path.write_bytes(real.read_bytes()[: real.stat().st_size // 2]),
    "noise": lambda path, _: path.write_bytes(np.random.default_rng(0).bytes(1000)),
    "a list": lambda path, _: torch.save([1, 2, 3], path),
    "a tensor": lambda path, _: torch.save(torch.zeros(3), path),
    "weights alone": lambda path, real: torch.save(load_checkpoint(real)["model_dict"], path),
    "a whole module": lambda path, _: torch.save(torch.nn.Linear(2, 2), path),
    "a namespace of arguments": lambda path, real: torch.save(
        load_checkpoint(real) | {"args": argparse.Namespace(seed=0)}, path
    ),
    "arrays": lambda path, _: path.write_bytes(pickle.dumps(np.zeros(3))),
    "of before PyTorch 1.6": lambda path, real: torch.save(
        load_checkpoint(real), path, _use_new_zipfile_serialization=False
    ),
    "a pickle that would run code": lambda path, _: path.write_bytes(pickle.dumps(print)),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none(
    trained: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    FILES[kind](tmp_path / "odd.pkl", trained["erm"])
    assert_refused(capfd, tmp_path / "odd.pkl")


def test_what_lies_beside_is_read_with_care(
    trained: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = to_plain(load_checkpoint(trained["kd"]))
    path = write(tmp_path / "odd.pkl", content, drop("provenance"))
    (tmp_path / "provenance.json").write_text("{")
    assert_refused(capfd, path)
    (tmp_path / "provenance.json").unlink()
    (tmp_path / "results.jsonl").write_text('{"teacher": {"algorithm": "ERM", "path": "../gone"}}\n')
    status, printed, _ = run_evaluate(capfd, path, "--format", "json", "--norm", "linf", "--n_examples", 2)
    (model,) = json.loads(printed)["models"]
    assert (status, model["fidelity"]) == (0, None)
    assert any("gone from ../gone" in text for text in model["skipped"])


def test_there_are_more_than_fifty_kinds() -> None:
    assert len(REFUSED) + len(JUDGED) + len(FILES) >= 50
