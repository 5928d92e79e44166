"""Weights that somebody else trained: adopted with what is declared of them, or refused by name."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from daft_domainbed.cli import run_command
from daft_domainbed.host import contract
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.models.resnet8 import ResNet8
from daft_domainbed.teachers.rebuild import rebuild_model

State = dict[str, Tensor]


class Net(nn.Module):
    """A plain classifier of somebody else's."""

    def __init__(self, width: int = 4, n_classes: int = 2) -> None:
        super().__init__()
        self.backbone = ResNet8(3, width)
        self.fc = nn.Linear(4 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def name(net: Net, before: str = "", head: str = "fc") -> State:
    """Return its weights with other names."""
    backbone = {f"{before}{key}": value for key, value in net.backbone.state_dict().items()}
    return backbone | {f"{before}{head}.{key}": value for key, value in net.fc.state_dict().items()}


WRAPPED: dict[str, Callable[[Net, Path], object]] = {
    "plain": lambda net, path: torch.save(name(net), path),
    "a whole module's": lambda net, path: torch.save(net.state_dict(), path),
    "DataParallel": lambda net, path: torch.save(name(net, "module."), path),
    "Lightning": lambda net, path: torch.save(
        {"epoch": 3, "global_step": 9, "state_dict": name(net, "model."), "optimizer_states": [{"lr": 0.1}]}, path
    ),
    "timm": lambda net, path: torch.save(
        {"state_dict": name(net, head="head.fc"), "arch": "x", "args": Namespace(lr=0.1, opt=None)}, path
    ),
    "MoCo": lambda net, path: torch.save(
        {
            "state_dict": name(net, "module.encoder_q.")
            | {f"module.encoder_k.{key}": value * 0 for key, value in name(net).items()}
            | {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)}
        },
        path,
    ),
    "an average of weights": lambda net, path: torch.save(name(net, "module.") | {"n_averaged": torch.tensor(3)}, path),
    "a training script's": lambda net, path: torch.save(
        {"model": name(net), "optimizer": {"state": {}}, "args": {"lr": 0.1}}, path
    ),
    "a head without a bias": lambda net, path: torch.save(
        {key: value for key, value in name(net).items() if key != "fc.bias"}, path
    ),
    "of before PyTorch 1.6": lambda net, path: torch.save(name(net), path, _use_new_zipfile_serialization=False),
    "half": lambda net, path: torch.save({key: value.half() for key, value in name(net).items()}, path),
}


@pytest.fixture
def folder(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a folder of images, `pictures`: domains a, b, c; classes x, y."""
    monkeypatch.chdir(image_folder.parent)
    return image_folder.parent


HPARAMS = json.dumps({"input_size": 16})


def adopt(file: str = "net.pt", *more: str, trained_on: str = "b c", out: str = "mine") -> int:
    argv = [file, "--backbone", "resnet8_w4", "--dataset", "folder:pictures", "--hparams", HPARAMS]
    return run_command("adopt", [*argv, "--trained_on", *trained_on.split(), "--output_dir", out, *more])


def ask(path: Path, x: Tensor) -> Tensor:
    host = contract.find_host()
    model = rebuild_model(load_checkpoint(path), path, host)
    model.eval()
    return model.predict(x)


@pytest.mark.parametrize("way", WRAPPED)
def test_weights_are_found_in_every_wrapping(way: str, net: Net, folder: Path) -> None:
    WRAPPED[way](net, Path("net.pt"))
    assert adopt() == 0
    x = torch.randn(3, 3, 16, 16)
    wanted = net(x) - (net.fc.bias if "without a bias" in way else 0)
    torch.testing.assert_close(ask(Path("mine/model.pkl"), x), wanted, atol=0.02 if way == "half" else 1e-5, rtol=1e-3)
    assert load_checkpoint(Path("mine/model.pkl"))["class_names"] == ["x", "y"]


def test_safetensors_are_taken_and_classes_give_the_heads_order(net: Net, folder: Path) -> None:
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, "net.safetensors")
    assert adopt("net.safetensors", "--classes", "y", "x") == 0
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(ask(Path("mine/model.pkl"), x), net(x).flip(1), atol=1e-5, rtol=1e-3)


def spoil(net: Net, key: str, value: Tensor | None) -> State:
    state = name(net)
    return {k: v for k, v in (state | {key: value}).items() if v is not None}


REFUSED: dict[str, tuple[Callable[[Net, Path], object], tuple[str, ...], str]] = {
    "a layer too few": (lambda n, p: torch.save(spoil(n, "conv.weight", None), p), (), "it lacks"),
    "one norm too few": (
        lambda n, p: torch.save(spoil(n, "blocks.1.bn1.weight", None), p), (), r"it lacks blocks.1.bn1.weight; it has",
    ),
    "another network": (lambda n, p: torch.save(nn.Linear(3, 4).state_dict(), p), (), "it lacks"),
    "another width": (lambda n, p: torch.save(name(Net(8)), p), (), "does not fit backbone 'resnet8_w4': "),
    "no head": (lambda n, p: torch.save(n.backbone.state_dict(), p), (), "has 0 linear layers beside the backbone"),
    "a head of two layers": (
        lambda n, p: torch.save(name(n) | {"fc2.weight": torch.zeros(9, 9)}, p), (), "2 linear layers .*fc.weight, fc2",
    ),
    "a norm before the head": (
        lambda n, p: torch.save(name(n) | {"neck.weight": torch.ones(16), "neck.bias": torch.ones(16)}, p), (),
        "has neck.bias and 1 more beside the backbone and its head fc.weight, without which it answers otherwise",
    ),
    "a bias of another length": (lambda n, p: torch.save(spoil(n, "fc.bias", torch.zeros(5)), p), (), "fc.bias is 5"),
    "no floats": (
        lambda n, p: torch.save(spoil(n, "conv.weight", torch.ones(4, 3, 3, 3, dtype=torch.int8)), p), (),
        "conv.weight is a strided int8 tensor",
    ),
    "two networks": (
        lambda n, p: torch.save(name(n, "student.") | name(n, "teacher."), p), (), "has 2 linear layers beside",
    ),
    "a checkpoint": (lambda n, p: torch.save({"args": {}, "model_dict": {}}, p), (), "is a checkpoint already: name"),
    "more classes": (lambda n, p: torch.save(name(Net(4, 5)), p), (), r"5 outputs, and folder:pictures 2 classes"),
    "no numbers": (
        lambda n, p: torch.save(spoil(n, "fc.weight", torch.full((2, 16), float("nan"))), p), (), "no numbers",
    ),
    "no such class": (lambda n, p: torch.save(name(n), p), ("--classes", "x", "z"), "--classes z: .* no such class"),
    "a class twice": (lambda n, p: torch.save(name(n), p), ("--classes", "x", "x"), "name each of the 2 once"),
    "no weights": (lambda n, p: torch.save({"epoch": 3}, p), (), "holds no weights: its keys are epoch"),
    "a list": (lambda n, p: torch.save([1], p), (), "holds a list"),
    "a module": (lambda n, p: torch.save({"net": n}, p), (), r"could run code \(tests.teachers.test_adopt.Net"),
    "a text": (lambda n, p: p.write_text("weights"), (), "net.pt "),
    "an empty file": (lambda n, p: p.write_bytes(b""), (), "net.pt "),
    "half a file": (
        lambda n, p: (torch.save(name(n), p), p.write_bytes(p.read_bytes()[:900])), (), "net.pt ",
    ),
    "no file": (lambda n, p: None, (), "no checkpoint at net.pt"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    fault: str, net: Net, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, flags, says = REFUSED[fault]
    write(net, Path("net.pt"))
    assert adopt("net.pt", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    import re

    assert re.search(says, line), line
    assert line.isprintable()
    assert not Path("mine").exists()


def test_domains_that_are_none_are_refused(net: Net, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(name(net), "net.pt")
    assert adopt(trained_on="d") == 2
    assert "--trained_on d: folder:pictures has no such domain. They are a, b, c" in capsys.readouterr().err


def test_adopted_weights_teach_but_not_who_holds_out_what_they_have_seen(
    net: Net, folder: Path, run_train: Callable[..., tuple[int, list[str]]], records: Callable[..., Any]
) -> None:
    torch.save(name(net), "net.pt")
    assert adopt(trained_on="b c") == 0
    kd = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w2", "teacher": "mine/model.pkl"}
    argv = ["--dataset", "folder:pictures", "--algorithm", "KD", "--steps", "2", "--hparams", json.dumps(kd)]
    argv += ["--device", "cpu", "--output_dir"]
    status, lines = run_train([*argv, "kd", "--test_envs", "a"])
    assert status == 0, lines
    assert any(
        "adopted weights, declared to be trained on b, c; trial and splits not checked" in line for line in lines
    )
    assert "adopted weights" in str(records(Path("kd"))[0]["origins"])
    status, (line,) = run_train([*argv, "other", "--test_envs", "b"])
    assert status == 2
    assert "was declared to be trained on b, which this run holds out" in line


def test_a_file_of_weights_is_marked_in_records_and_tables(
    net: Net, folder: Path, run_train: Callable[..., tuple[int, list[str]]], capfd: pytest.CaptureFixture[str],
    records: Callable[..., Any],
) -> None:  # fmt: skip
    torch.save(net.backbone.state_dict(), "mine.pt")
    erm = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w4", "weights": "mine.pt"}
    argv = ["--dataset", "folder:pictures", "--algorithm", "ERM", "--steps", "2", "--device", "cpu", "--test_envs", "a"]
    status, lines = run_train([*argv, "--hparams", json.dumps(erm), "--output_dir", "runs/erm"])
    assert status == 0, lines
    assert len([line for line in lines if "weights of unknown origin (mine.pt)" in line]) == 1
    assert records(Path("runs/erm"))[0]["origins"] == {"weights": "weights of unknown origin (mine.pt)"}
    kd = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w2", "teacher": "runs/erm/model.pkl"}
    argv[3] = "KD"
    assert run_train([*argv, "--hparams", json.dumps(kd), "--output_dir", "runs/kd"])[0] == 0
    capfd.readouterr()
    assert run_command("collect_results", ["--input_dir", "runs"]) == 0
    out = capfd.readouterr().out
    assert "ERM, KD, ERM teacher: rests on weights of unknown origin (mine.pt)." in " ".join(out.split())
    assert run_command("collect_results", ["--input_dir", "runs", "--format", "json"]) == 0
    rows = json.loads(capfd.readouterr().out)["tables"][0]["rows"]
    assert {tuple(row["origins"]) for row in rows} == {("weights of unknown origin (mine.pt)",)}


def test_a_teacher_whose_weights_are_no_numbers_is_the_fault(
    folder: Path, tiny: Any, run_train: Callable[..., tuple[int, list[str]]]
) -> None:
    path = tiny.make_teacher()
    content = torch.load(path, weights_only=True)
    content["model_dict"]["classifier.bias"][:] = float("nan")
    torch.save(content, path)
    status, (line,) = run_train(tiny.make_argv(algorithm="KD", hparams={"teacher": str(path)}))
    assert status == 2
    assert f"teacher {path}: its weights classifier.bias are no numbers" in line
