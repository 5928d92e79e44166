"""All that a pretrained student switches on, together: bit-equal after a kill, deaf to held-out domains, as told."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from daft_domainbed.cli import run_command
from daft_domainbed.models.weights import hash_state, load
from daft_domainbed.results.selection import choose
from daft_domainbed.results.sweeps import read_sweep
from daft_domainbed.training import engine
from daft_domainbed.training.precision import find_drawback
from tests.conftest import Stopped, stop_after
from tests.processes import WarmPopen

PAGE = Path(__file__).parents[2] / "docs" / "pretrained_students.md"

STUDENT = {
    "input_size": 16,
    "batch_size": 4,
    "lr": 0.01,
    "backbone_frozen": "stages:2",
    "n_views": 3,
    "average_start": 2,
    "lr_schedule": "cosine",
    "teacher_frozen": "stages:1",
    "aft_attack": "features",
    "aft_eps": "validated",
}
RUNS: dict[str, dict[str, Any]] = {
    "DAFT": {"algorithm": "DAFT", "hparams": STUDENT},
    "KD matched": {"algorithm": "KD", "hparams": STUDENT | {"kd_match": True}},
    "ERM in bf16 where it is frozen": {
        "precision": "frozen_bf16",
        "hparams": {name: STUDENT[name] for name in list(STUDENT)[:7]},
    },
}


def make_flags(tiny: Any, images: Path, name: str, folder: str) -> dict[str, Any]:
    return {"dataset": f"folder:{images}", "feature_cache": str(tiny.root / folder / "features"), **RUNS[name]}


def read(root: Path, outcome: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Return what should be equal; what a kill left in the cache beyond the rows that count is the cache's own."""
    return {name: text for name, text in outcome(root).items() if "features" not in name}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_at_every_step_ends_as_one_that_was_not(
    tiny: Any,
    outcome: Any,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    tiny.train("whole/run", **make_flags(tiny, image_folder, name, "whole"))
    assert "cannot be saved" not in capfd.readouterr().err
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_SAVES", -1.0)
    for last in (1, 3, 5):
        with pytest.raises(Stopped):
            tiny.train("stopped/run", on_step=stop_after(last), **make_flags(tiny, image_folder, name, "stopped"))
    run = tiny.train("stopped/run", **make_flags(tiny, image_folder, name, "stopped"))
    assert list((run.parent / "features").glob("*.sqlite"))
    assert (run / "model_averaged.pkl").is_file()
    assert read(run.parent, outcome) == read(tiny.root / "whole", outcome)


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    tiny: Any, outcome: Any, image_folder: Path, start_script: Callable[[str], WarmPopen]
) -> None:
    # Both by the command, which records by which files the folder of images is known.
    assert run_command("train", tiny.make_argv("whole/run", **make_flags(tiny, image_folder, "DAFT", "whole"))) == 0
    argv = tiny.make_argv("killed/run", **make_flags(tiny, image_folder, "DAFT", "killed"))
    code = f"""
import os, signal, sys
sys.stdout = sys.stderr = open({str(tiny.root / "log")!r}, "a")
from daft_domainbed.cli import run_command
from daft_domainbed.models import feature_store
from daft_domainbed.training import engine
engine.SECONDS_BETWEEN_SAVES = -1.0
left, write = LEFT, feature_store._write
def kill(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)
feature_store._write = kill
sys.exit(run_command("train", {argv!r}))
"""
    killed = 0
    for left in (3, 25, 40, 10**9):  # writes to the cache: in the teachers, and in the student
        process = start_script(code.replace("LEFT", str(left)))
        killed += process.wait() == -9
        assert process.returncode in (0, -9), (tiny.root / "log").read_text()[-2000:]
    assert killed >= 2
    assert read(tiny.root / "killed", outcome) == read(tiny.root / "whole", outcome)


@pytest.mark.parametrize("name", ["DAFT", "KD matched"])
def test_held_out_domains_have_no_say(tiny: Any, image_folder: Path, name: str) -> None:
    """Other held-out images: the same radius, s, weights and chosen checkpoints."""
    found = []
    for root in ("one", "other"):
        run = tiny.train(f"{root}/run", test_envs=[0], **make_flags(tiny, image_folder, name, root))
        files = ("model_best.pkl", "model.pkl", "model_averaged.pkl")
        states = [hash_state(load(run / file)["model_dict"]) for file in files]
        hparams = json.loads((run / "results.jsonl").read_text().splitlines()[-1])["hparams"]
        (aft,) = (run.parent / "teachers").glob("AFT-*")
        taught = json.loads((aft / "results.jsonl").read_text().splitlines()[0])["hparams"]
        steps = []
        for which in ("plain", "averaged"):
            (one,) = read_sweep(run.parent, which).runs
            choice = choose("training-domain", [one], 0)
            assert choice is not None
            steps.append((choice.at, choice.val_acc))
        found.append((states, steps, hparams.get("kd_match_scale"), taught["aft_eps"], taught["aft_eps_candidates"]))
        for path in (image_folder / "a").rglob("*.png"):  # the held-out domain's become noise
            draw = torch.Generator().manual_seed(int(path.stem))
            noise = torch.randint(256, (16, 16, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(path)
    assert found[0] == found[1]


def test_what_is_not_frozen_computes_in_single_precision(tiny: Any) -> None:
    plain, other = (load(tiny.train(name, precision=name) / "model.pkl") for name in ("fp32", "frozen_bf16"))
    assert hash_state(plain["model_dict"]) == hash_state(other["model_dict"])


def test_a_processor_without_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "--precision frozen_bf16: this CPU" in (find_drawback("frozen_bf16", torch.device("cpu")) or "")


def shrink(command: list[str], root: Path, images: Path) -> list[str]:
    """Return a command of the page with small pictures, few steps and random weights."""
    small = {"--dataset": f"folder:{images}", "--steps": "3", "--checkpoint_freq": "2", "--test_envs": "0"}
    for i, (flag, value) in enumerate(zip(command, command[1:], strict=False)):
        if flag in small:
            command[i + 1] = small[flag]
        if flag.endswith("_dir") or flag == "--feature_cache":
            command[i + 1] = str(root / value)
        if flag == "--hparams":
            given = json.loads(value)
            sides = {name: 32 for name in given if name.endswith("_input_size")}
            given |= sides | {"input_size": 16, "batch_size": 4, "average_start": 1, "weights": "none"}
            given |= {"teacher_weights": "none"} if "teacher_backbone" in given else {}
            command[i + 1] = json.dumps(given).replace("lite2", "lite0")
    return command


def test_every_command_of_the_page_runs(
    tiny: Any, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tiny.root)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    ours = [command[1:] for command in commands if command[0] == "daft-domainbed"]
    assert len(ours) >= 3
    for name, *argv in ours:
        capsys.readouterr()
        assert run_command(name, shrink(argv, tiny.root, image_folder)) == 0, capsys.readouterr().err
    assert "DAFT" in capsys.readouterr().out
    shutil.rmtree(tiny.root / "runs")
