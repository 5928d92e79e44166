"""Image-text models by name, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.models import open_clip as module
from daft_domainbed.models.backbones import build_backbone

open_clip = pytest.importorskip("open_clip")


def build(weights: str = "none") -> Any:
    return build_backbone("open_clip/small", (3, 32, 32), weights, None, INPUT_SPECS["unit"])


def test_features_are_unit_vectors_times_the_root_of_their_width() -> None:
    backbone = build()
    features = backbone(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, backbone.n_outputs) == (2, 64)
    torch.testing.assert_close(features.norm(dim=1), torch.full((2,), 8.0))


def test_images_are_resized_to_what_the_model_knows() -> None:
    backbone = build_backbone("open_clip/small", (3, 28, 28), "none", None, INPUT_SPECS["none"])
    assert backbone(torch.randn(2, 3, 28, 28)).shape == (2, 64)


def test_a_head_of_texts_answers_with_scaled_cosines() -> None:
    backbone = build().eval()
    towers = backbone.network
    tokens = module.tokenize("small", ["a cat", "a dog", "a house", "a car"]).view(2, 2, -1)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = backbone(x) @ towers.make_head(tokens).T
        texts = torch.stack([towers.encode_texts(pair).mean(0) for pair in tokens])
        images = towers.clip.encode_image(2 * x - 1)
        expected = towers.get_scale() * torch.cosine_similarity(images[:, None], texts[None], dim=2)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            towers.compare(backbone(x), tokens[:, 0]), backbone(x) @ towers.make_head(tokens[:, :1]).T
        )


def test_weights_come_from_a_state_dict_or_a_checkpoint(tmp_path: Path) -> None:
    towers = build().network
    files = tmp_path / "state.pt", tmp_path / "model.pkl"
    torch.save(towers.clip.state_dict(), files[0])
    state = {f"featurizer.network.{name}": value for name, value in towers.state_dict().items()}
    torch.save({"model_dict": state | {"classifier.bias": torch.zeros(2)}}, files[1])
    for file in files:
        loaded = build(str(file)).network
        for a, b in zip(towers.state_dict().values(), loaded.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt does not fit open_clip/small"):
        build(str(tmp_path / "other.pt"))
    with pytest.raises(UsageError, match="no checkpoint at"):
        build(str(tmp_path / "missing.pt"))


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UsageError, match="no model 'ViT-B-17'.*ViT-B-16"):
        build_backbone("open_clip/ViT-B-17", (3, 32, 32))


def test_weights_of_another_activation_are_refused() -> None:
    with pytest.raises(UsageError, match="use open_clip/ViT-B-16-quickgelu"):
        build_backbone("open_clip/ViT-B-16", (3, 224, 224), "openai")


def test_pretrained_means_weights_whose_activation_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(name: str, pretrained: str | None) -> Any:
        asked.append(pretrained)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    for name in ("ViT-B-16", "ViT-B-16-quickgelu"):
        with pytest.raises(UsageError, match="cannot be had"):
            build_backbone(f"open_clip/{name}", (3, 224, 224))
    activations = [open_clip.get_pretrained_cfg("ViT-B-16", tag).get("quick_gelu", False) for tag in asked[:1]]
    assert activations == [False]
    assert asked[1] == "openai"


def test_published_models_have_the_templates_of_clips_paper() -> None:
    assert len(module.list_templates("ViT-B-16")) == 80
    assert module.list_templates("small")[0]("cat") == "a picture of a cat"
