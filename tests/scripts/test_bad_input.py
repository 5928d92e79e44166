"""Bad input is answered with one clear line and exit status 2, and nothing is lost or left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.cli import run_command
from tests.conftest import Hostile, Tiny

# (flags of `train` over the tiny run's, what the line has to say)
FLAGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown data set": ({"dataset": "EmojiStyle"}, ["'EmojiStyle'", "Did you mean 'EmojiStyles'?"]),
    "data set of upstream": ({"dataset": "SVIRO"}, ["'SVIRO'", "--host upstream"]),
    "data set that is no class": ({"dataset": "get_dataset_class"}, ["'get_dataset_class'"]),
    "no name of a data set": ({"dataset": ""}, ["unknown data set ''"]),
    "unknown algorithm": ({"algorithm": "DATF"}, ["'DATF'", "Did you mean 'DAFT'?"]),
    "algorithm of upstream": ({"algorithm": "IRM"}, ["'IRM'", "--host upstream"]),
    "algorithm that is no class": ({"algorithm": "get_algorithm_class"}, ["'get_algorithm_class'"]),
    "algorithm in small letters": ({"algorithm": "daft"}, ["'daft'", "Did you mean 'DAFT'?"]),
    "test_envs out of range": ({"test_envs": 3}, ["3", "numbered 0 to 2"]),
    "all test_envs": ({"test_envs": [0, 1, 2]}, ["0 1 2", "leave at least one"]),
    "test_envs twice": ({"test_envs": [1, 1]}, ["1 1", "twice"]),
    "no test_envs": ({"test_envs": []}, ["--test_envs"]),
    "test_envs negative": ({"test_envs": -1}, ["-1"]),
    "test_envs no number": ({"test_envs": "one"}, ["'one'"]),
    "no steps": ({"steps": 0}, ["'0'", "at least 1"]),
    "steps negative": ({"steps": -5}, ["-5"]),
    "steps no number": ({"steps": "many"}, ["'many'"]),
    "steps of halves": ({"steps": 1.5}, ["'1.5'"]),
    "no checkpoint_freq": ({"checkpoint_freq": 0}, ["'0'"]),
    "holdout_fraction of all": ({"holdout_fraction": 1.0}, ["1.0"]),
    "holdout_fraction of none": ({"holdout_fraction": 0.0}, ["0.0"]),
    "holdout_fraction too small": ({"holdout_fraction": 0.01}, ["0.01", "0 out"]),
    "holdout_fraction no number": ({"holdout_fraction": "nan"}, ["'nan'"]),
    "holdout_fraction too large": ({"holdout_fraction": 0.99}, ["env '1' has 1 training images"]),
    "uda_holdout_fraction": ({"uda_holdout_fraction": 1.5}, ["1.5"]),
    "task": ({"task": "domain_generalisation"}, ["'domain_generalisation'", "Did you mean 'domain_generalization'?"]),
    "adaptation without images": ({"task": "domain_adaptation"}, ["--uda_holdout_fraction"]),
    "host": ({"host": "upstrem"}, ["'upstrem'", "Did you mean 'upstream'?"]),
    "device": ({"device": "gpu"}, ["'gpu'"]),
    "device that is no use": ({"device": "meta"}, ["'meta'"]),
    "device that is not there": ({"device": "cuda:7"}, ["cuda:7"]),
    "precision": ({"precision": "fp8"}, ["'fp8'"]),
    "fp16 without CUDA": ({"precision": "fp16"}, ["fp16", "bf16"]),
    "seed": ({"seed": 2**40}, [str(2**40)]),
    "data_seed": ({"data_seed": 2**32}, [str(2**32)]),
    "trial_seed no number": ({"trial_seed": "first"}, ["'first'"]),
    "hparams_seed negative": ({"hparams_seed": -1}, ["'-1'"]),
    "seed negative": ({"seed": -1}, ["-1"]),
    "no MNIST": ({"dataset": "RotatedMNIST", "data_dir": "nowhere"}, ["nowhere", "MNIST"]),
    "no data_dir": ({"dataset": "PACS"}, ["--data_dir"]),
    "missing data folder": ({"dataset": "PACS", "data_dir": "nowhere"}, ["nowhere"]),
    "missing own folder": ({"dataset": "folder:nowhere"}, ["nowhere"]),
    "folder of a folder's name": ({"dataset": "folder:"}, ["0 domain folders"]),
    "mistyped flag": ({"test_env": 1}, ["--test_env", "Did you mean '--test_envs'?"]),
}

# (algorithm, hyperparameter, value)
HPARAMS: list[tuple[str, str, Any]] = [
    ("ERM", "batch_size", 14),  # a training domain has 13 images
    ("ERM", "batch_size", 0),
    ("ERM", "batch_size", 2.5),
    ("ERM", "batch_size", True),
    ("ERM", "lr", -0.001),
    ("ERM", "lr", "fast"),
    ("ERM", "lr", 0),
    ("ERM", "lr", None),
    ("ERM", "lr", [0.1]),
    ("ERM", "lr", float("nan")),
    ("ERM", "lr", float("inf")),
    ("ERM", "lr", 10**400),
    ("ERM", "batch_size", None),
    ("ERM", "batch_size", 10**30),
    ("ERM", "backbone", ""),
    ("ERM", "backbone_frozen", "no"),
    ("ERM", "resnet_dropout", 1.5),
    ("ERM", "nonlinear_classifier", 1),
    ("ERM", "pixels", "grey"),
    ("ERM", "weight_decay", -1),
    ("ERM", "class_balanced", 1),
    ("ERM", "backbone", "resnet8_w0"),
    ("ERM", "backbone", "resnet81"),
    ("ERM", "backbone", 18),
    ("KD", "kd_weight", 1.5),
    ("KD", "kd_weight", -0.1),
    ("KD", "kd_weight", None),
    ("KD", "kd_temperature", 0),
    ("KD", "kd_temperature", "hot"),
    ("KD", "teacher_steps", 0),
    ("KD", "teacher_steps", "few"),
    ("KD", "kd_temperature", -1),
    ("KD", "kd_temperature", float("inf")),
    ("KD", "teacher", ""),
    ("KD", "teacher", 5),
    ("KD", "teacher", "nowhere/model.pkl"),
    ("KD", "teacher_frozen", "yes"),
    ("DAFT", "aft_eps", -0.1),
    ("DAFT", "aft_eps", "-4/255"),
    ("DAFT", "aft_eps", "4/0"),
    ("DAFT", "aft_eps", "small"),
    ("DAFT", "aft_eps", True),
    ("DAFT", "aft_eps", [0.1]),
    ("DAFT", "aft_eps", "nan"),
    ("DAFT", "aft_eps", "1e400"),
    ("DAFT", "aft_eps", "auto*much"),
    ("DAFT", "aft_eps", "auto*-1"),
    ("DAFT", "aft_norm", "l3"),
    ("DAFT", "aft_scope", "neck"),
    ("DAFT", "aft_attack", "words"),
    ("DAFT", "aft_weight", 2),
    ("DAFT", "aft_target_mix", -1),
    ("DAFT", "aft_target_temperature", 0),
    ("DAFT", "aft_attack_steps", -1),
    ("DAFT", "aft_attack_steps", 1.5),
    ("DAFT", "aft_weight", -0.5),
    ("DAFT", "aft_target_mix", 1.5),
    ("DAFT", "aft_steps", 0),
]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `train`, check that it refuses in one line and leaves nothing, and return the line."""
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str], command: str = "train") -> str:
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        status = run_command(command, argv)
        captured = capsys.readouterr()
        assert status == 2, captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith(f"daft-domainbed {command}: ")
        assert captured.out == ""
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize("case", FLAGS)
def test_flags(tiny: Tiny, refuse: Callable[..., str], case: str) -> None:
    flags, says = FLAGS[case]
    line = refuse(tiny.make_argv(**flags))
    assert all(text in line for text in says), line


@pytest.mark.parametrize(("algorithm", "name", "value"), HPARAMS)
def test_hyperparameters(tiny: Tiny, refuse: Callable[..., str], algorithm: str, name: str, value: Any) -> None:
    line = refuse(tiny.make_argv(hparams={name: value}, algorithm=algorithm))
    assert name in line or value == "nowhere/model.pkl"
    assert (value if isinstance(value, str) else json.dumps(value)) in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{lr: 1}", "{lr: 1}"),
        ("[1]", "[1]"),
        ("null", "null"),
        ("3", "3"),
        ('"lr"', '"lr"'),
        ('{"lr": 0.1', '{"lr": 0.1'),
        ("[" * 100_000, "not JSON"),
        ('{"lr": ' + "9" * 5000 + "}", "lr"),
        ('{"kd_temprature": 4}', "Did you mean 'kd_temperature'?"),
        ('{"irm_lambda": 1}', "'irm_lambda'"),
        ('{"lr": 0.1, "batch_size": 8, "lr": 0.2}', "'lr' 2 times (0.1 and 0.2)"),
    ],
)
def test_hparams_text(tiny: Tiny, refuse: Callable[..., str], text: str, says: str) -> None:
    argv = tiny.make_argv(algorithm="KD")
    argv[argv.index("--hparams") + 1] = text
    assert says in refuse(argv)


def test_hyperparameter_of_another_algorithm(tiny: Tiny, refuse: Callable[..., str]) -> None:
    assert "'aft_eps'" in refuse(tiny.make_argv(hparams={"aft_eps": 0.1}))


@pytest.mark.parametrize("kind", ["empty", "one domain", "differing classes", "empty class", "file"])
def test_folders(tiny: Tiny, tmp_path: Path, image_folder: Path, refuse: Callable[..., str], kind: str) -> None:
    folder = tmp_path / "own"
    shutil.copytree(image_folder, folder)
    domains = sorted(path for path in folder.iterdir() if path.is_dir())
    if kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "one domain":
        for domain in domains[1:]:
            shutil.rmtree(domain)
    elif kind == "differing classes":
        (domains[1] / "unicorn").mkdir()
    elif kind == "empty class":
        for picture in (domains[1] / "x").iterdir():
            picture.unlink()
    else:
        shutil.rmtree(folder)
        folder.write_text("no folder")
    line = refuse(tiny.make_argv(dataset=f"folder:{folder}"))
    assert str(folder) in line
    assert kind != "differing classes" or "unicorn" in line


def test_broken_image(tiny: Tiny, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "own"
    shutil.copytree(image_folder, folder)
    for image in folder.rglob("*.png"):
        image.write_bytes(b"no picture")
    argv = tiny.make_argv(dataset=f"folder:{folder}", hparams={"input_size": 32, "batch_size": 1})
    assert run_command("train", argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
    assert ".png" in line


def test_output_folder_that_is_a_file(tiny: Tiny, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert str(tmp_path / "taken") in refuse(tiny.make_argv("taken"))
    assert "taken" in refuse(tiny.make_argv("taken/below"))
    assert (tmp_path / "taken").read_text() == "mine"


CHECKPOINTS = [
    *("missing", "truncated", "text", "empty", "hostile", "list", "other keys", "other weights", "other classes"),
    "wrong kind",
]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(
    tiny: Tiny, tmp_path: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path, sentinel = tmp_path / "teacher.pkl", tmp_path / "sentinel"
    whole = teachers["ERM"].read_bytes()
    content = torch.load(teachers["ERM"], weights_only=True)
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("weights")
    elif kind == "empty":
        path.touch()
    elif kind == "hostile":
        torch.save(content | {"extra": Hostile("system", sentinel)}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other keys":
        torch.save({"weights": torch.zeros(2)}, path)
    elif kind == "other weights":
        torch.save(content | {"model_hparams": content["model_hparams"] | {"backbone": "resnet8_w6"}}, path)
    elif kind == "other classes":
        torch.save(content | {"model_num_classes": 5}, path)
    elif kind == "wrong kind":
        shutil.copy(teachers["AFT"], path)
    status = run_command("train", tiny.make_argv(algorithm="KD", hparams={"teacher": str(path)}))
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert str(path) in line
    assert "Traceback" not in line
    assert not sentinel.exists()
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("field", "flags"),
    [
        ("test_envs", {"test_envs": 1}),
        ("trial_seed", {"trial_seed": 3}),
        ("holdout_fraction", {"holdout_fraction": 0.3}),
        ("dataset", {"dataset": "ColoredDigits"}),
        ("the data of env0_in", {"seed": 9}),
    ],
)
def test_teachers_of_other_runs(
    tiny: Tiny, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str], field: str, flags: dict[str, Any]
) -> None:
    argv = tiny.make_argv(algorithm="KD", hparams={"teacher": str(teachers["ERM"])}, **flags)
    assert run_command("train", argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{field} is " in line or f"{field} have " in line
    assert " there and " in line


@pytest.mark.parametrize(
    ("command", "argv", "says"),
    [
        ("run", ["--algorithms", "ERM", "DATF"], "Did you mean 'DAFT'?"),
        ("run", ["--dataset", "EmojiStyle"], "Did you mean 'EmojiStyles'?"),
        ("run", ["--hparams", '{"kd_wieght": 1}'], "Did you mean 'kd_weight'?"),
        ("run", ["--n_trials", "0"], "'0'"),
        ("collect_results", ["--input_dir", "nowhere"], "nowhere"),
        ("collect_results", ["--input_dir", ".", "--format", "html"], "'html'"),
        ("report", ["--input_dir", "nowhere"], "nowhere"),
        ("doctor", ["--data_dri", "x"], "Did you mean '--data_dir'?"),
    ],
)
def test_other_commands(refuse: Callable[..., str], command: str, argv: list[str], says: str) -> None:
    assert says in refuse(argv, command)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--holdout_fraction", "0"], "0.0"),
        (["--device", "foo"], "'foo'"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--dataset", "PACS", "--data_dir", "nowhere"], "nowhere"),
        (["--hparams", '{"batch_size": 100000}'], "100000"),
        (["--task", "domain_adaptation"], "--uda_holdout_fraction"),
    ],
)
def test_a_sweep_is_refused_before_it_has_a_folder(refuse: Callable[..., str], argv: list[str], says: str) -> None:
    assert says in refuse([*argv, "--output_dir", "sweep"], "run")
