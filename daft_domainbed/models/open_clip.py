"""Image-text models of open_clip as backbones: both towers in one network, whose features are those of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.models.weights import load, load_weights

SMALL = "small"  # our own, for images of 32 pixels; it has no published weights
_SMALL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}
_CHECKPOINT_PREFIX = "featurizer.network."  # of these towers in a run's checkpoint

TEMPLATES: tuple[Callable[[str], str], ...] = (
    lambda name: f"a picture of a {name}",
    lambda name: f"a drawing of a {name}",
    lambda name: f"an image of a {name}",
    lambda name: f"this is a {name}",
)


class ImageTextModel(nn.Module):
    """An image tower and a text tower, by open_clip, with projections onto vectors that can be compared.

    As a featurizer it gives unit vectors times the root of their width: a linear head learns from them at the usual
    rates, and a head of scaled text vectors answers with the cosines times the learnt scale.

    Args:
        clip: An `open_clip.CLIP`.
        name: Its name, without `open_clip/`.
        mean: How its images are normalised, a channel each.
        std: Likewise.
    """

    def __init__(self, clip: Any, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.clip, self.name = clip, name
        self.pretrained_cfg = {"mean": list(mean), "std": list(std)}
        size = clip.visual.image_size
        self.side: int = size if isinstance(size, int) else size[0]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, [B, 3, H, W], into features, [B, D]."""
        vectors: Tensor = self.clip.encode_image(images, normalize=True)
        return vectors * vectors.shape[1] ** 0.5

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Return unit vectors of tokenised texts, [B, L] to [B, D]."""
        vectors: Tensor = self.clip.encode_text(tokens, normalize=True)
        return vectors

    def compare(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return scaled cosines of images' features, [B, D], and tokenised texts, [N, L], as [B, N]."""
        return self.get_scale() * (features / features.shape[1] ** 0.5) @ self.encode_texts(tokens).T

    def get_scale(self) -> Tensor:
        """Return what cosines are multiplied by."""
        scale: Tensor = self.clip.logit_scale.exp()
        return scale

    def get_image_projection(self) -> Tensor:
        """Return W_v, [width, D], the last layer of the image tower.

        Raises:
            UsageError: The tower has none that is known.
        """
        visual = self.clip.visual
        if isinstance(getattr(visual, "proj", None), Tensor):
            return visual.proj
        if hasattr(visual, "attnpool"):
            weight: Tensor = visual.attnpool.c_proj.weight
            return weight.T
        raise UsageError(f"open_clip/{self.name} has no linear projection of images: use a ViT or an RN model")

    def get_text_projection(self) -> Tensor:
        """Return W_t, [width, D], the last layer of the text tower."""
        projection = self.clip.text_projection
        return projection.weight.T if isinstance(projection, nn.Linear) else projection

    @torch.no_grad()
    def make_head(self, tokens: Tensor) -> Tensor:
        """Return the weight of a linear head that answers as the texts say, [K, D].

        Args:
            tokens: Several texts a class, [K, T, L], whose vectors are averaged.
        """
        vectors = self.encode_texts(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return self.get_scale() * F.normalize(vectors.mean(dim=1), dim=1) / vectors.shape[2] ** 0.5


def build_open_clip(name: str, weights: str) -> ImageTextModel:
    """Build a model by its name in open_clip, or the small one.

    Args:
        name: Without `open_clip/`.
        weights: "pretrained" (the first published that fits; the small model has none), "none", one of open_clip's
            tags, or a file: a state dict of open_clip's, or a checkpoint of a run.

    Raises:
        UsageError: open_clip is missing, the model unknown, or its weights cannot be had or do not fit.
    """
    open_clip = import_open_clip()
    if name == SMALL:
        model = ImageTextModel(open_clip.CLIP(**_SMALL_CONFIG), name, (0.5,) * 3, (0.5,) * 3)
    else:
        if name not in open_clip.list_models():
            raise UsageError(f"open_clip has no model {name!r}.{suggest(name, [*open_clip.list_models(), SMALL])}")
        clip = _create(open_clip, name, _find_tag(open_clip, name, weights))
        if not isinstance(clip, open_clip.CLIP):
            raise UsageError(f"open_clip/{name} has a text tower of another kind: use a ViT or an RN model")
        config = open_clip.get_model_preprocess_cfg(clip)
        model = ImageTextModel(clip, name, config["mean"], config["std"])
    if weights not in ("pretrained", "none") and weights not in _list_tags(open_clip, name):
        _load_file(model, Path(weights))
    return model


def import_open_clip() -> ModuleType:
    """Return the library.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UsageError("image-text models need open_clip: pip install 'daft-domainbed[clip]'") from error
    return open_clip


def tokenize(name: str, texts: Sequence[str]) -> Tensor:
    """Return the tokens of texts as a model takes them, [N, L]."""
    tokens: Tensor = _load_tokenizer(name)(list(texts))
    return tokens


@cache
def _load_tokenizer(name: str) -> Any:
    open_clip = import_open_clip()
    length = _SMALL_CONFIG["text_cfg"]["context_length"]
    return open_clip.SimpleTokenizer(context_length=length) if name == SMALL else open_clip.get_tokenizer(name)


def list_templates(name: str) -> tuple[Callable[[str], str], ...]:
    """Return what makes a caption of a class's name: for published models the 80 of CLIP's paper, else ours."""
    if name == SMALL:
        return TEMPLATES
    templates: tuple[Callable[[str], str], ...] = tuple(import_open_clip().OPENAI_IMAGENET_TEMPLATES)
    return templates


def _list_tags(open_clip: ModuleType, name: str) -> list[str]:
    return [] if name == SMALL else open_clip.list_pretrained_tags_by_model(name)


def _find_tag(open_clip: ModuleType, name: str, weights: str) -> str | None:
    """Return the tag to load; an activation other than the weights were trained with would go unnoticed."""
    activation = open_clip.get_model_config(name).get("quick_gelu", False)
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in _list_tags(open_clip, name)}
    fitting = [tag for tag, config in tags.items() if config.get("quick_gelu", False) == activation]
    if weights == "pretrained" and fitting:
        return fitting[0]
    if weights in tags and weights not in fitting:
        other = name.removesuffix("-quickgelu") if activation else f"{name}-quickgelu"
        raise UsageError(
            f"the weights {weights!r} have another activation than open_clip/{name}: use open_clip/{other}"
        )
    return weights if weights in fitting else None


def _create(open_clip: ModuleType, name: str, tag: str | None) -> Any:
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # each layer of its download client speaks for itself
        if tag is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f'the weights {tag!r} of open_clip/{name} cannot be had ({reason}): give "weights" a file, or "none"'
        ) from error


def _load_file(model: ImageTextModel, path: Path) -> None:
    if path.suffix != ".safetensors" and "model_dict" in (content := load(path)):
        state = content["model_dict"]
        own = {key.removeprefix(_CHECKPOINT_PREFIX): state[key] for key in state if key.startswith(_CHECKPOINT_PREFIX)}
        target: nn.Module = model
    else:
        own, target = load_weights(path), model.clip
    try:
        target.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{path} does not fit open_clip/{model.name}: {reason}") from error
