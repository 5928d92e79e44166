"""Checkpoints that DomainBed's own loop wrote, of whatever algorithm, are judged too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation import evaluate as protocol
from daft_domainbed.evaluation import suites
from daft_domainbed.evaluation.evaluate import EvaluateArgs, evaluate
from daft_domainbed.evaluation.subject import load_subject


@pytest.fixture
def short_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.SUITES, "quick", suites.Suite(3, pgd_steps=2, restarts=1))
    monkeypatch.setattr(suites, "_GRIDS", {"linf": [0, 1], "l2": [0, 50]})
    monkeypatch.setattr("daft_domainbed.evaluation.tasks.CURVE_STEPS", 2)


def save_upstream(path: Path, host: Any, algorithm: str, dataset: str, data_dir: str, **hparams: Any) -> Path:
    """Write a checkpoint as DomainBed's training script does, of a model with random weights."""
    own = host.hparams_registry.default_hparams(algorithm, dataset) | hparams
    data = vars(host.datasets)[dataset](data_dir, [0], own)
    torch.manual_seed(0)
    model = host.algorithms.get_algorithm_class(algorithm)(data.input_shape, data.num_classes, len(data) - 1, own)
    args = {"dataset": dataset, "algorithm": algorithm, "test_envs": [0], "trial_seed": 0, "seed": 0}
    args |= {"holdout_fraction": 0.2, "uda_holdout_fraction": 0, "task": "domain_generalization", "data_dir": data_dir}
    content = {
        "args": args,
        "model_input_shape": data.input_shape,
        "model_num_classes": data.num_classes,
        "model_num_domains": len(data) - 1,
        "model_hparams": own,
        "model_dict": model.state_dict(),
    }
    torch.save(content, path)
    return path


@pytest.mark.usefixtures("short_suite")
@pytest.mark.parametrize("algorithm", ["ERM", "IRM", "CORAL", "VREx", "SagNet", "ARM", "MTL", "GroupDRO"])
def test_upstreams_checkpoints_are_judged(upstream: Any, data_dir: str, tmp_path: Path, algorithm: str) -> None:
    path = save_upstream(tmp_path / "model.pkl", upstream, algorithm, "RotatedMNIST", data_dir)
    model = evaluate(EvaluateArgs([str(path)], host="upstream", device="cpu", norm=["linf"]))[0]
    assert (model["algorithm"], model["dataset"], len(model["environments"])) == (algorithm, "RotatedMNIST", 6)
    assert model["fidelity"] is None
    if algorithm != "ERM":
        with pytest.raises(UsageError, match="--host upstream"):
            evaluate(EvaluateArgs([str(path)], device="cpu", output_dir=str(tmp_path / "other")))


@pytest.mark.usefixtures("short_suite")
def test_both_hosts_judge_a_checkpoint_alike(upstream: Any, data_dir: str, tmp_path: Path) -> None:
    path = save_upstream(tmp_path / "model.pkl", upstream, "ERM", "RotatedMNIST", data_dir)
    models = []
    for host in ("upstream", "embedded"):
        args = EvaluateArgs([str(path)], host=host, device="cpu", output_dir=str(tmp_path / host), n_examples=8)
        models.append({key: value for key, value in evaluate(args)[0].items() if key != "cost"})
        models[-1]["examples"] = json.loads((tmp_path / host / "examples.json").read_text())
    assert models[0] == models[1]


def test_pictures_have_pixels_from_zero_to_one(
    upstream: Any, data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    flags = {"resnet18": True, "resnet50_augmix": False}
    with monkeypatch.context() as patch:  # for the test alone: judging downloads nothing by itself
        build = torchvision.models.resnet18
        patch.setattr(torchvision.models, "resnet18", lambda **_: build())
        path = save_upstream(tmp_path / "model.pkl", upstream, "ERM", "PACS", data_dir, **flags)
    subject = load_subject(path, "", device=torch.device("cpu"), host="upstream")
    chosen = subject.choose(0, 0)
    x, _ = subject.load("P", chosen["P"])
    assert x.shape[1:] == (3, 224, 224)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.max() > 0.9
    served = subject.data.dataset[2][chosen["P"][0]][0]
    torch.testing.assert_close(subject.model.normalise(x)[0], served, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("short_suite")
def test_what_upstreams_own_loop_has_trained(clone: str, tmp_path: Path) -> None:
    flags = ["--dataset", "Debug28", "--algorithm", "ERM", "--steps", "3", "--output_dir", str(tmp_path / "run")]
    flags += ["--hparams", '{"batch_size": 8}']  # for a larger one than a domain it would wait without end
    environment = os.environ | {"PYTHONPATH": clone, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "domainbed.scripts.train", "--data_dir", str(tmp_path), *flags]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    model = evaluate(EvaluateArgs([str(tmp_path / "run/model.pkl")], device="cpu"))[0]
    assert model["environments"] == ["0", "1", "2"]
    assert (tmp_path / "run" / protocol.EVALUATION_FOLDER / "evaluation.md").is_file()
