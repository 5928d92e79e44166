"""What is given away answers as the model does, says what was left out, and says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daft_domainbed import load_model, plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.cli import run_command
from daft_domainbed.errors import RunError
from daft_domainbed.export import write
from daft_domainbed.export.write import export_model
from daft_domainbed.host import contract
from daft_domainbed.runtime.randomness import preserve_states
from daft_domainbed.training.engine import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A student of EmojiStyles after two steps."""
    place = tmp_path_factory.mktemp("runs") / "kd"
    hparams = json.dumps({"backbone": "resnet8_w2", "teacher_backbone": "resnet8_w2", "batch_size": 8})
    flags = {"dataset": "EmojiStyles", "algorithm": "KD", "steps": 2, "test_envs": [3], "device": "cpu"}
    with preserve_states():
        train(TrainArgs(hparams=hparams, output_dir=str(place), **flags), quiet=True)
    yield place
    plugin.unregister(contract.find_host())


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow: tracing."""
    monkeypatch.setattr(write, "_write_program", lambda model, path: (path.write_bytes(b""), model)[1])
    monkeypatch.setattr(write, "_write_onnx", lambda model, path: (path.write_bytes(b""), model)[1])


@pytest.mark.slow
def test_every_file_answers_as_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # the converter's leaves a thread
    exported = export_model(run, tmp_path / "out")
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = load_model(run)(pixels)
    assert torch.equal(load_model(tmp_path / "out")(pixels), expected)
    assert torch.allclose(torch.export.load(tmp_path / "out" / "model.pt2").module()(pixels), expected, atol=1e-5)
    if exported.left_out:
        pytest.skip("; ".join(exported.left_out.values()))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"pixels": pixels.numpy()})[0]
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)
    assert exported.checks.keys() == {"model.safetensors", "model.pt2", "model.onnx"}


@pytest.mark.usefixtures("no_tracing")
def test_without_the_extra_the_rest_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write, "find_spec", lambda name: None if name == "onnxruntime" else find_spec("json"))
    assert run_command("export", [str(run), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"{tmp_path / 'out' / 'model.safetensors'}: logits differ by at most 0\n" in printed.out
    assert printed.err == ("left out: model.onnx: it needs onnxruntime: pip install 'daft-domainbed[export]'\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "config.json", "model.pt2", "model.safetensors")
    ]
    assert run_command("predict", [str(tmp_path / "out"), "--which", "last", str(Path(__file__))]) == 2


@pytest.mark.usefixtures("no_tracing")
def test_card_and_configuration_say_what_it_is(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path, which="last")
    card = (tmp_path / "README.md").read_text()
    record = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    own, aside = 100 * record["env3_in_acc"], 100 * record["env3_out_acc"]
    assert f"| contrast (held out: neither was trained on) | {own:.1f} | {aside:.1f} |" in card
    assert "Checkpoint of step 1;" in card and "Its teacher: ERM, SHA-256 " in card
    assert "daft-domainbed train --dataset EmojiStyles --algorithm KD --test_envs 3" in card
    assert str(run.parent) not in card + (tmp_path / "config.json").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class_names"][0] == "animal" and config["input_shape"] == [3, 32, 32]
    assert config["normalised_inside"] == {"mean": [0.0], "std": [1.0]}


@pytest.mark.usefixtures("no_tracing")
def test_names_that_are_no_text_are_spelt_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "format_card", lambda source, checks: "K\udce4tze und Bär\n")
    export_model(run, tmp_path / "out")
    assert (tmp_path / "out" / write.CARD_FILE).read_text(encoding="utf-8") == "K\\udce4tze und Bär\n"


@pytest.mark.usefixtures("no_tracing")
def test_folders_of_others_are_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert run_command("export", [str(run), str(tmp_path)]) == 2
    assert "holds files that no export wrote" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert run_command("predict", [str(tmp_path), "a.png"]) == 2
    assert "is no folder that export wrote" in capsys.readouterr().err


def test_a_wrong_file_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_wrong(model: object, path: Path) -> object:
        path.write_bytes(b"")
        return lambda pixels: torch.ones(len(pixels), 8)

    monkeypatch.setattr(write, "_write_program", write_wrong)
    monkeypatch.setattr(write, "_write_onnx", write_wrong)
    with pytest.raises(RunError, match=r"model.pt2: its logits differ from the model's by "):
        export_model(run, tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "model.pt2").exists()


class Untraceable(torch.nn.Module):
    def predict(self, x: Tensor) -> Tensor:
        return x.mean() * torch.ones(len(x), 8) if float(x.mean()) > 0 else x


def test_what_cannot_be_traced_is_said(run: Path) -> None:
    model = load_model(run)
    model.algorithm = Untraceable()
    with pytest.raises(RunError, match="torch.export cannot trace this algorithm"):
        write._make_program(model)
