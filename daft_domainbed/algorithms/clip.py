"""Contrastive pretraining of images and texts, and answers by the text tower: where CaRot starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import evaluating
from daft_domainbed.functional.similarity import contrastive_loss
from daft_domainbed.hparams import Hparam, is_bool, is_text, or_auto
from daft_domainbed.models.open_clip import SMALL, ImageTextModel, list_templates, tokenize
from daft_domainbed.teachers.facts import RunFacts, get_run_facts

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

_LARGEST_SCALE = math.log(100)  # of the cosines, as in CLIP's paper


class Prompted(ERM):
    """An image-text model that answers by the text tower: the classifier's weight is made of the classes' prompts.

    So its weights are plain ERM's, which answers alike.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if not isinstance(self.towers, ImageTextModel) or not isinstance(self.classifier, nn.Linear):
            raise UsageError(
                f"{type(self).__name__} needs a backbone of open_clip and a linear head: 'open_clip/small'"
            )
        classes, self.styles = list_classes(num_classes), list_styles(num_domains)
        self.templates = list_templates(self.towers.name)
        prompts = [template(name) for name in classes for template in self.templates]
        self.prompts: Tensor
        self.register_buffer("prompts", self._tokenize(prompts, num_classes), persistent=False)
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        self.is_head_stale = True

    @property
    def towers(self) -> ImageTextModel:
        """The two towers."""
        network: ImageTextModel = getattr(self.featurizer, "network", None)  # type: ignore[assignment]
        return network

    def predict(self, x: Tensor) -> Tensor:
        """Return logits, [B, K]: scaled cosines with the classes' prompts."""
        if self.is_head_stale:
            with torch.no_grad():
                self.classifier.weight.copy_(self.towers.make_head(self.prompts))
                self.classifier.bias.zero_()
            self.is_head_stale = False
        logits: Tensor = self.network(x)
        return logits

    def _tokenize(self, texts: Sequence[str], *shape: int) -> Tensor:
        """Return tokens, [*shape, T, L], where the texts are in the order of the dimensions."""
        tokens = tokenize(self.towers.name, texts)
        return tokens.view(*shape, len(self.templates), -1)

    def _draw_templates(self, n: int) -> Tensor:
        return torch.randint(len(self.templates), (n,), generator=self.generator).to(self.prompts.device)


class CLIP(Prompted):
    """Contrastive pretraining of an image and a text tower on the source domains (CLIP, Radford et al., 2021).

    Every image of a step gets a caption of its class, by a template drawn for it, and in every other step on average of
    its domain's style too. Minimises the cross-entropy of images over captions and of captions over images at a learnt
    scale; what says the same of two images is right for both. `predict` is the zero-shot answer, by the mean of the
    prompts of each class that name no style.

    Published weights are left as they are by default (`clip_trains`): then this is zero-shot CLIP.
    """

    SOURCE = "Radford et al., 2021, arXiv 2103.00020"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "backbone": Hparam(f"open_clip/{SMALL}", is_text, "the two towers: open_clip/<model>"),
        "clip_trains": Hparam("auto", or_auto(is_bool), "whether the towers are trained; auto: the small ones alone"),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["clip_trains"] == "auto":
            hparams["clip_trains"] = self.towers.name == SMALL
        texts = [
            f"{prompt(name)} in {style} style"
            for style in self.styles
            for name in list_classes(num_classes)
            for prompt in self.templates
        ]
        self.captions: Tensor
        self.register_buffer("captions", self._tokenize(texts, num_domains, num_classes), persistent=False)

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        templates = self._draw_templates(len(y))
        if torch.rand((), generator=self.generator) < 0.5:
            domains = torch.cat([torch.full_like(y, i) for i, (_, y) in enumerate(minibatches)])
            tokens, meanings = self.captions[domains, y, templates], y * len(minibatches) + domains
        else:
            tokens, meanings = self.prompts[y, templates], y

        # Where nothing is learnt, batch norm's statistics stay as well.
        mode = nullcontext() if self.hparams["clip_trains"] else evaluating(self.network)
        with mode, torch.set_grad_enabled(self.hparams["clip_trains"]):
            loss = contrastive_loss(self.towers.compare(self.featurizer(x), tokens), meanings)
        if self.hparams["clip_trains"]:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.towers.clip.logit_scale.data.clamp_(max=_LARGEST_SCALE)
            self.is_head_stale = True
        return {"loss": loss.item(), "scale": self.towers.get_scale().item()}


def list_classes(num_classes: int) -> list[str]:
    """Return the names of the classes of the run in progress; of a data set that has none, numbers."""
    facts = get_run_facts()
    names = _find_class_names(facts) if facts is not None else None
    return [name.replace("_", " ") for name in names] if names else [f"class {i}" for i in range(num_classes)]


def list_styles(num_domains: int) -> list[str]:
    """Return the names of the training domains of the run in progress, in the order of its minibatches."""
    facts = get_run_facts()
    if facts is None:
        return [f"domain {i}" for i in range(num_domains)]
    return [name for i, name in enumerate(facts.dataset.environments) if i not in facts.args.test_envs]


def _find_class_names(facts: RunFacts) -> Sequence[str] | None:
    if (names := getattr(facts.dataset.dataset_class, "CLASSES", None)) is not None:
        return names
    domains = [getattr(split, "underlying_dataset", None) for split, _ in facts.splits]
    return next((names for domain in domains if (names := getattr(domain, "classes", None))), None)
