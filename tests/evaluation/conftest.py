from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daft_domainbed.cli import run_command
from daft_domainbed.evaluation.suites import SUITES

ENVS = ["day", "dusk", "night"]


def run_evaluate(capfd: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, list[str]]:
    capfd.readouterr()
    status = run_command("evaluate", [*map(str, argv), "--device", "cpu"])
    captured = capfd.readouterr()
    return status, captured.out, captured.err.splitlines()


@pytest.fixture
def small_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites that ask the same questions with less patience."""
    for name, suite in SUITES.items():
        monkeypatch.setitem(SUITES, name, replace(suite, n_examples=4, pgd_steps=2, restarts=2))
    monkeypatch.setattr("daft_domainbed.evaluation.tasks.SQUARE_QUERIES", 3)
    monkeypatch.setattr("daft_domainbed.evaluation.tasks.CURVE_STEPS", 3)
    monkeypatch.setattr("daft_domainbed.evaluation.suites._GRIDS", {"linf": [0, 0.01, 1], "l2": [0, 0.5, 50]})


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of three classes, told apart by the brightest colour, 16 noisy pictures each."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "colours"
    for env, name, i in itertools.product(ENVS, range(3), range(16)):
        place = folder / env / ["blue", "green", "red"][name]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 160, (16, 16, 3))
        pixels[..., 2 - name] += 80
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student with its teacher, and another plain model; not to be written to."""
    from daft_domainbed.arguments import TrainArgs
    from daft_domainbed.training.engine import train

    root = tmp_path_factory.mktemp("trained")
    small = {"backbone": "resnet8_w4", "batch_size": 8, "lr": 0.01, "input_size": 16, "data_augmentation": False}

    def make(name: str, algorithm: str, **hparams: Any) -> Path:
        flags = {"dataset": f"folder:{colours}", "steps": 20, "checkpoint_freq": 20, "device": "cpu"}
        text = json.dumps(small | hparams)
        train(TrainArgs(algorithm=algorithm, hparams=text, output_dir=str(root / name), **flags), quiet=True)
        return root / name / "model.pkl"

    return {"erm": make("erm", "ERM"), "kd": make("kd", "KD", teacher_backbone="resnet8_w8")}
