"""A checkpoint used as a model gives the accuracies of its record, whoever wrote it, without its data."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import daft_domainbed
from daft_domainbed import load_model, plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.cli import run_command
from daft_domainbed.data.splits import build_data
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.runtime.layout import read_records
from daft_domainbed.runtime.randomness import capture_states, preserve_states
from daft_domainbed.training.engine import train

SMALL = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w2", "lr": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of two classes, ten pictures of another size than the model's each."""
    root, draw = tmp_path_factory.mktemp("data") / "shapes", np.random.default_rng(0)
    for i in range(40):
        place = root / "pq"[i % 2] / ("dark", "light")[i // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 200, (20, 24, 3)) + 55 * (i // 2 % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("runs") / "erm"
    flags = {"dataset": f"folder:{folder}", "steps": 9, "checkpoint_freq": 4, "device": "cpu"}
    with preserve_states():
        train(TrainArgs(hparams=json.dumps(SMALL), output_dir=str(place), test_envs=[1], **flags), quiet=True)
    yield place
    plugin.unregister(contract.find_host())


def list_files(folder: Path, args: dict[str, Any]) -> list[tuple[list[str], list[int]]]:
    """Return paths and labels of the in-split of every environment."""
    host = contract.find_host()
    known = {name: args[name] for name in TrainArgs.__dataclass_fields__ if name in args}
    data = build_data(
        host,
        TrainArgs(**known),
        SMALL | {"data_augmentation": False},
        contract.get_dataset_class(host, args["dataset"]),
    )
    files = [[split.underlying_dataset.samples[key] for key in split.keys] for split in data.in_splits]
    return [([path for path, _ in env], [label for _, label in env]) for env in files]


@pytest.mark.parametrize("which", ["chosen", "last"])
def test_accuracy_on_files_is_the_records(run: Path, folder: Path, which: str) -> None:
    model, records = load_model(run, which), read_records(run)
    step = 8 if which == "last" else max(records, key=lambda record: record["env0_out_acc"])["step"]
    record = next(record for record in records if record["step"] == step)
    assert model.class_names == ["dark", "light"] and not model.training
    for env, (paths, labels) in enumerate(list_files(folder, record["args"])):
        found = [model.class_names.index(prediction.label) for prediction in model.predict(paths)]
        assert float(np.mean(np.equal(found, labels))) == record[f"env{env}_in_acc"]


def test_needs_no_data_and_draws_nothing(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "model.pkl", weights_only=True)
    content["args"]["dataset"] = "folder:/gone"
    torch.save(content, tmp_path / "model.pkl")
    before = capture_states()
    model = load_model(tmp_path / "model.pkl")
    assert model.input_shape == (3, 16, 16)
    assert str(capture_states()) == str(before)


def test_tensors_images_and_paths_are_one(run: Path, folder: Path) -> None:
    model, path = load_model(run), next(folder.rglob("*.png"))
    image = Image.open(path)
    by_path, by_image = model.predict(path)[0], model.predict([image, str(path)])
    assert by_image == [by_path, by_path] and sum(by_path.probabilities.values()) == pytest.approx(1)
    small = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    assert model.predict(small) == [by_path] and model.predict(small[None]) == [by_path]
    large = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # PIL rounds to whole numbers, torch does not
    assert model.predict(large)[0].probabilities["dark"] == pytest.approx(by_path.probabilities["dark"], abs=0.02)
    pixels = small[None].requires_grad_()
    logits = model(pixels)
    logits[0, 0].backward()
    assert logits.shape == (1, 2) and pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert torch.equal(
        logits.softmax(1)[0, 0].detach().double(), torch.tensor(by_path.probabilities["dark"]).double()
    ) or (float(logits.detach().softmax(1)[0, 0]) == pytest.approx(by_path.probabilities["dark"], abs=1e-6))


def test_images_of_another_kind_are_refused(run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    with pytest.raises(UsageError, match=r"torch.uint8 of shape \(3, 16, 16\): this model takes floats, \[3, H, W\]"):
        model.predict(torch.zeros(3, 16, 16, dtype=torch.uint8))
    with pytest.raises(UsageError, match="values from 0 to 255: this model takes pixels from 0 to 1"):
        model.predict(torch.tensor([0.0, 255.0]).expand(3, 2, 2))
    with pytest.raises(UsageError, match=r"shape \(1, 16, 16\)"):
        model.predict(torch.zeros(1, 16, 16))
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(UsageError, match="cannot read the image .*note.txt"):
        model.predict(tmp_path / "note.txt")


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"which is 'best'. It takes: chosen, last"):
        load_model(run, which="best")
    with pytest.raises(UsageError, match=r"has no model_best.pkl: name the folder of a run"):
        load_model(tmp_path)
    shutil.copy(run / "model.pkl", tmp_path)
    with pytest.raises(UsageError, match='has no model_best.pkl: which="last" is its model.pkl'):
        load_model(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        daft_domainbed.load_modell  # noqa: B018


def test_noise_has_no_class_names_and_no_range(teachers: dict[str, Path]) -> None:
    model = load_model(teachers["AFT"])
    (prediction,) = model.predict(3 * torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert model.class_names is None and list(prediction.probabilities) == ["0", "1"]


@pytest.mark.parametrize("algorithm", ["ERM", "AFT"])
def test_checkpoints_of_before_go_on(tmp_path: Path, algorithm: str) -> None:
    with tarfile.open(Path(__file__).parents[1] / "data_06410da" / "begun.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (path,) = (path for path in tmp_path.glob(f"sweep/teachers/{algorithm}-*/model.pkl"))
    model, record = load_model(path), read_records(path.parent)[-1]
    (env,) = record["args"]["test_envs"]
    host, known = contract.find_host(), record["args"]
    args = TrainArgs(**{name: known[name] for name in TrainArgs.__dataclass_fields__ if name in known})
    data = build_data(host, args, {"data_augmentation": False}, contract.get_dataset_class(host, "EmojiStyles"))
    split = data.in_splits[env]
    pixels, labels = split.underlying_dataset.fetch(torch.tensor(split.keys))
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in pixels.split(128)])
    assert float((found == labels).double().mean()) == record[f"env{env}_in_acc"]
    assert model.class_names is None
    plugin.unregister(host)


def test_predict_prints_text_csv_and_json(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(folder.rglob("*.png"))[:2]]
    expected = load_model(run).predict(files)

    def predict(form: str) -> str:
        assert run_command("predict", [str(run), *files, "--format", form, "--device", "cpu"]) == 0
        return capsys.readouterr().out

    rows = json.loads(predict("json"))
    assert rows == [
        {"file": file, "class": found.label, "probabilities": found.probabilities}
        for file, found in zip(files, expected, strict=True)
    ]
    lines = predict("csv").splitlines()
    assert lines[0] == "file,class,dark,light" and lines[1].startswith(f"{files[0]},{expected[0].label},0.")
    assert predict("text").splitlines()[0].split()[:2] == [files[0], expected[0].label]
    assert run_command("predict", [str(run)]) == 2 and "no image: name a file" in capsys.readouterr().err
