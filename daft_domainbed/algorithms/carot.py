"""Calibrated robust fine-tuning of an image-text model: an orthogonal projection, and itself as a slow teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from daft_domainbed.algorithms.clip import Prompted
from daft_domainbed.functional.similarity import (
    contrastive_distillation_loss,
    contrastive_loss,
    orthogonality_penalty,
    schedule_momentum,
)
from daft_domainbed.hparams import Hparam, is_text, number, one_of, or_auto, pick
from daft_domainbed.models.open_clip import SMALL
from daft_domainbed.teachers.facts import get_run_facts, take_teacher

_ARCHITECTURE = ("backbone", "backbone_input_size", "pixels", "nonlinear_classifier")


class CaRot(Prompted):
    """Calibrated robust fine-tuning of an image-text model (CaRot, Oh et al., 2024).

    Starts from a CLIP model, draws a caption of its class for every image, and minimises over both towers, with W_v and
    W_t their projections and S the scaled cosines of a batch's images and captions,

        contrastive(S) + carot_rho |W_v W_t^T| + carot_oc |W_v^T W_v - 1| + carot_sd distillation(S, S of the teacher)

    with Frobenius norms. The teacher is an average of the student's own weights, moved towards them every
    `carot_period` steps by a momentum that rises from 0.05 to 0.9 over the first fifth of the run. `predict` answers by
    the student's text tower.

    Example:
        With `carot_oc`, `carot_sd` and `carot_rho` 0 it is FLYP, fine-tuning by the loss of pretraining.
    """

    SOURCE = "Oh et al., 2024, NeurIPS, arXiv 2311.01723"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "teacher_backbone": Hparam(f"open_clip/{SMALL}", is_text, "the two towers: open_clip/<model>"),
        "carot_oc": Hparam(0.2, number(0), "weight of the orthogonality of the projection", pick(0.1, 0.2, 0.5)),
        "carot_sd": Hparam(1.5, number(0), "weight of the distillation from its own average", pick(0.5, 1.0, 1.5)),
        "carot_rho": Hparam(0.05, number(0), "weight of the norm of the projections' product"),
        "carot_positives": Hparam(
            "auto",
            one_of("auto", "class", "own"),
            "right captions of an image: all of its class, or its own; auto: class, where a batch exceeds the classes",
        ),
        "carot_period": Hparam(
            "auto", or_auto(number(1, integer=True)), "steps between moves of the teacher; auto: 2 % of the run"
        ),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        teacher, facts = take_teacher(), get_run_facts()
        assert facts is not None and facts.args.steps  # without a run there is no teacher
        architecture = {name: teacher.hparams[name] for name in _ARCHITECTURE if name in teacher.hparams}
        super().__init__(input_shape, num_classes, num_domains, {**hparams, **architecture, "weights": "none"})
        self.network.load_state_dict(teacher.model.network.state_dict())
        hparams.update(architecture)
        if hparams["carot_positives"] == "auto":
            is_crowded = hparams["batch_size"] * num_domains > num_classes
            hparams["carot_positives"] = "class" if is_crowded else "own"
        if hparams["carot_period"] == "auto":
            hparams["carot_period"] = max(1, round(0.02 * facts.args.steps))
        self.hparams = hparams
        self.step, self.n_steps = 0, facts.args.steps
        self.average = Average(self.featurizer)

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        tokens = self.prompts[y, self._draw_templates(len(y))]
        projections = self.towers.get_image_projection(), self.towers.get_text_projection()

        logits = self.towers.compare(self.featurizer(x), tokens)
        losses = {
            "contrastive_loss": contrastive_loss(logits, y if self.hparams["carot_positives"] == "class" else None),
            "rho_loss": (projections[0] @ projections[1].T).norm(),
            "oc_loss": orthogonality_penalty(projections[0]),
        }
        if self.hparams["carot_sd"] > 0 and self.step > 0:  # before, the teacher is the student
            losses["sd_loss"] = contrastive_distillation_loss(logits, self.average.compare(x, tokens))
        loss = losses["contrastive_loss"]
        for name in ("rho", "oc", "sd"):
            if (weight := self.hparams[f"carot_{name}"]) > 0 and f"{name}_loss" in losses:
                loss = loss + weight * losses[f"{name}_loss"]

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.is_head_stale = True
        if self.step % self.hparams["carot_period"] == 0:
            self.average.follow(self.featurizer, schedule_momentum(self.step, self.n_steps))
        self.step += 1
        return {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}


class Average:
    """The average of an image-text featurizer's weights over time.

    It is no `nn.Module`, so that a checkpoint holds the student alone; a run that goes on restores its state dict.
    """

    def __init__(self, featurizer: Any) -> None:
        self.featurizer = copy.deepcopy(featurizer).requires_grad_(False).eval()

    @torch.no_grad()
    def compare(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return scaled cosines of images, [B, C, H, W], and tokenised texts, [N, L], as [B, N]."""
        similarities: Tensor = self.featurizer.to(x.device).network.compare(self.featurizer(x), tokens)
        return similarities

    @torch.no_grad()
    def follow(self, featurizer: Any, momentum: float) -> None:
        """Become momentum times itself plus the rest of the given one; batch norm's statistics are averaged alike."""
        theirs = featurizer.state_dict()
        for name, value in self.featurizer.state_dict().items():
            source = theirs[name].to(value.device)
            value.copy_(momentum * value + (1 - momentum) * source if value.is_floating_point() else source)

    def state_dict(self) -> dict[str, Tensor]:
        """Return its weights."""
        return self.featurizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights of the same shapes."""
        self.featurizer.load_state_dict(state)
