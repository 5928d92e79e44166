from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from daft_domainbed.cli import run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.counterfactuals import counterfactuals, draw_held_out, follow_paths
from daft_domainbed.evaluation.subject import load_subject
from daft_domainbed.evaluation.suites import SUITES
from daft_domainbed.functional.attacks import get_norms

N_CLASSES = 3
WEIGHT = torch.randn(N_CLASSES, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def model(x: Tensor) -> Tensor:
    return F.linear(x.flatten(1), WEIGHT)


def test_paths_grow_and_lead_to_their_class() -> None:
    radii = (0.25, 0.5, 1.0)
    images, confidences = follow_paths(model, PIXELS, N_CLASSES, radii, steps=5)
    assert images.shape == (2, N_CLASSES, 4, 3, 8, 8)
    assert (images.min() >= 0) & (images.max() <= 1)
    assert (confidences.diff(dim=2) >= 0).all()
    assert (confidences[:, :, -1] > 0.99).all()
    for i, radius in enumerate((0.0, *radii)):
        distances = get_norms((images[:, :, i] - PIXELS[:, None]).flatten(0, 1), "l2")
        assert distances.max() <= radius + 1e-5
        assert distances.min() >= 0.8 * radius
    for k in range(N_CLASSES):
        expected = torch.stack([model(images[:, k, i]).softmax(dim=1)[:, k] for i in range(4)], dim=1)
        torch.testing.assert_close(confidences[:, k], expected)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_picture_shows_a_row_a_class(tmp_path: Path, channels: int) -> None:
    pixels = PIXELS[:, :channels]
    paths = counterfactuals(
        lambda x: F.linear(x.flatten(1), WEIGHT[:, : 64 * channels]),
        pixels,
        ["a", "b", "c"],
        tmp_path / "new",
        radii=[1.0],
        steps=2,
    )
    assert [path.name for path in paths] == ["0.png", "1.png"]
    picture = np.asarray(Image.open(paths[0]))
    assert picture.shape == (14 + 3 * (96 + 28), 80 + 2 * 96, 3)
    original = picture[14 : 14 + 96 : 12, 80 : 80 + 96 : 12]  # each pixel is a square of 12
    expected = (255 * pixels[0]).round().byte().permute(1, 2, 0).numpy()
    shown = original if channels > 1 else original[..., :1]
    np.testing.assert_array_equal(shown[..., :channels], expected)


def test_evaluate_draws_them(
    tiny: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("n_examples", 2), ("pgd_steps", 1), ("restarts", 1)):
        monkeypatch.setitem(SUITES, "quick", replace(SUITES["quick"], **{name: value}))
    monkeypatch.setattr("daft_domainbed.evaluation.tasks.CURVE_STEPS", 1)
    hparams = {"input_size": 16, "batch_size": 4, "backbone": "resnet8_w4"}
    path = tiny.train("run", hparams, algorithm="ERM", dataset=f"folder:{image_folder}", steps=1) / "model.pkl"
    folder = image_folder.parent / "drawn"
    argv = [str(path), "--device", "cpu", "--norm", "linf", "--counterfactuals", str(folder)]
    assert run_command("evaluate", argv) == 0
    assert capfd.readouterr().err.splitlines()[-1] == f"4 pictures in {folder}"
    assert sorted(file.name for file in (folder / "a").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    with Image.open(folder / "a" / "0.png") as picture:
        assert picture.height == 14 + 2 * (96 + 28)  # a row a class

    assert run_command("evaluate", [str(path), *argv]) == 2
    assert f"--counterfactuals {folder} draws one model" in capfd.readouterr().err


def test_noise_is_not_drawn(teachers: dict[str, Path], tmp_path: Path) -> None:
    subject = load_subject(teachers["ERM"], "erm", device=torch.device("cpu"))
    with pytest.raises(UsageError, match="the images of Debug28 are noise"):
        draw_held_out(subject, tmp_path, 0)
