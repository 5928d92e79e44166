"""Every command of the pages on results and models runs as it stands there, at a size that a test can afford."""

from __future__ import annotations

import glob
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daft_domainbed.cli import run_command
from daft_domainbed.export import write
from daft_domainbed.launch import launchers
from tests.launch.conftest import run_here
from tests.test_docs import FENCED, ROOT, list_commands

TINY = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w2"}
SIZES = {"--steps": "2", "--n_hparams": "2", "--n_checkpoints": "1"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two domains of pictures and new ones beside them, where jobs run in this process."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for i in range(40):
        place = tmp_path / "birds" / ("photo", "sketch")[i % 2] / ("crow", "gull")[i // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(place / f"{i}.jpg")
    for name in ("new", "a", "b"):
        shutil.copy(place / "39.jpg", tmp_path / f"{name}.jpg")
    monkeypatch.setitem(launchers._BUILT_IN, "local", lambda: run_here)
    for name in ("_write_program", "_write_onnx"):  # slow, and tested in tests/export
        monkeypatch.setattr(write, name, lambda model, path: (path.write_bytes(b""), model)[1])
    return tmp_path


def shrink(words: list[str]) -> list[str]:
    """Return a command with fewer steps and draws, small images, and nobody to be asked."""
    words = [*words]
    for flag, value in SIZES.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    name = " ".join(words[:2])
    if name == "sweep rerun":
        words[words.index("--n_trials") + 1] = "2"
    if words[0] in ("train", "run") or name == "sweep launch" and "--datasets" in words:
        hparams = TINY | ({"teacher_backbone": "resnet8_w2"} if "KD" in words else {})
        if "--hparams" in words:
            words[words.index("--hparams") + 1] = json.dumps(hparams)
        else:
            words += ["--hparams", json.dumps(hparams)]
        words += [] if "--steps" in words else ["--steps", "2"]
    if name in ("sweep launch", "sweep rerun") and "--skip_confirmation" not in words:
        words += ["--skip_confirmation"]
    return [part for word in words for part in (sorted(glob.glob(word)) if "*" in word else [word])]


def run_moves(page: Path) -> dict[int, list[list[str]]]:
    """Return the lines that are not ours: `mkdir` and `mv`, by how many of our commands come before them."""
    moves: dict[int, list[list[str]]] = {}
    count = 0
    for language, block in FENCED.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = line.split()
            if words[:1] == ["daft-domainbed"]:
                count += 1
            elif words and words[0] in ("mkdir", "mv"):
                moves.setdefault(count, []).append(words)
    return moves


@pytest.mark.parametrize("name", ["search_to_paper", "using_a_model", "combining"])
def test_commands_run(workplace: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / f"{name}.md"
    moves = run_moves(page)
    commands = list(list_commands(page))
    assert commands
    for i, words in enumerate(commands):
        for move in moves.get(i, []):
            Path(move[1]).mkdir() if move[0] == "mkdir" else shutil.move(move[1], move[2])
        argv = shrink(words[1:])
        if "--figures" in argv:
            pytest.importorskip("matplotlib")
        status = run_command(argv[0], argv[1:])
        assert status == 0, (words, capfd.readouterr().err[-500:])


def test_python_of_the_page_runs(workplace: Path) -> None:
    """The page's own lines, after the training that stands above them."""
    page = (ROOT / "docs" / "using_a_model.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    train = shrink(next(list_commands(ROOT / "docs" / "using_a_model.md"))[1:])
    assert run_command(train[0], train[1:]) == 0
    import torch

    names = {"pixels": torch.rand(2, 3, 16, 16)}
    exec(code, names)
    assert names["logits"].shape == (2, 2)
