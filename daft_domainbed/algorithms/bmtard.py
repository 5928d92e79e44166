"""Distillation from two teachers, one accurate on clean images and one robust, whose say is balanced at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.algorithms.at import AT, draw_noise, perturb
from daft_domainbed.functional.attacks import evaluating
from daft_domainbed.functional.robust import balance_temperatures, balance_weights, kl_divergence, measure_entropy
from daft_domainbed.hparams import Hparam, number, or_auto, pick
from daft_domainbed.teachers.facts import get_run_facts, take_teacher

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

_LOWEST, _HIGHEST = 1.0, 10.0  # temperatures
_TINY = 1e-12


class BMTARD(ERM):
    """Balanced multi-teacher adversarial robustness distillation (B-MTARD, Zhao et al., 2024).

    Minimises over the student S, with x' = x + delta the worst images for it against the labels (`at_*`),

        w KL(T_robust(x') / tau_robust || S(x')) + (1 - w) KL(T_clean(x) / tau_clean || S(x))

    where T / tau are a teacher's probabilities at its temperature. No label is learnt from. After the losses of a step
    the temperatures move by `bmtard_temperature_rate` each, towards equal entropies of the teachers' answers; then w
    moves by `bmtard_weight_rate` of the way towards r_robust / (r_robust + r_clean), where r is a loss divided by its
    first value, to the power `bmtard_beta`.

    Example:
        With `bmtard_weight` 1 (or 0) and `bmtard_weight_rate` 0 the robust (or the clean) teacher teaches alone.
    """

    SOURCE = "Zhao et al., 2024, arXiv 2306.16170"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "bmtard_temperature_rate": Hparam(
            "auto",
            or_auto(number(0)),
            "change of a temperature at each step; auto: from 1 to 10 takes half of the run",
        ),
        "bmtard_weight": Hparam(0.5, number(0, 1), "weight of the robust teacher's loss before the first step"),
        "bmtard_weight_rate": Hparam(0.025, number(0, 1), "share of the way that the weight goes at each step"),
        "bmtard_beta": Hparam(1.0, number(0), "sharpens what the weight moves towards", pick(0.5, 1.0, 2.0)),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.clean_teacher, self.robust_teacher = take_teacher("clean_teacher"), take_teacher("robust_teacher")
        hparams.update(AT.resolve(hparams))
        if hparams["bmtard_temperature_rate"] == "auto":
            facts = get_run_facts()
            assert facts is not None and facts.args.steps  # without a run there are no teachers
            hparams["bmtard_temperature_rate"] = (_HIGHEST - _LOWEST) / (facts.args.steps / 2)
        self.start_generator = torch.Generator().manual_seed(torch.initial_seed())
        # Of the robust teacher first, of the clean one second.
        self.temperatures = (_LOWEST, _LOWEST)
        self.first_losses: tuple[float, float] | None = None
        self.weight: float = hparams["bmtard_weight"]

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one student step on a minibatch (x [B, C, H, W], y [B]) of every training domain, under attack."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        x_adv = self._attack(x, y)
        students = self.predict(x_adv), self.predict(x)
        answers = self.robust_teacher(x_adv), self.clean_teacher(x)
        softened = [logits / tau for logits, tau in zip(answers, self.temperatures, strict=True)]
        robust_loss, clean_loss = (kl_divergence(t, s).mean() for t, s in zip(softened, students, strict=True))
        entropies = measure_entropy(softened[0]).item(), measure_entropy(softened[1]).item()
        self._balance((robust_loss.item(), clean_loss.item()), entropies)
        loss = self.weight * robust_loss + (1 - self.weight) * clean_loss

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "loss": loss.item(),
            "robust_loss": robust_loss.item(),
            "clean_loss": clean_loss.item(),
            "robust_weight": self.weight,
            "robust_temperature": self.temperatures[0],
            "clean_temperature": self.temperatures[1],
            "robust_entropy": entropies[0],
            "clean_entropy": entropies[1],
        }

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        start = draw_noise(x, self.start_generator)
        with evaluating(self.network):
            return perturb(lambda x: F.cross_entropy(self.predict(x), y, reduction="sum"), x, start, self.hparams)

    def _balance(self, losses: tuple[float, float], entropies: tuple[float, float]) -> None:
        rate = self.hparams["bmtard_temperature_rate"]
        self.temperatures = balance_temperatures(self.temperatures, entropies, rate, (_LOWEST, _HIGHEST))
        self.first_losses = self.first_losses or losses
        progress = losses[0] / max(self.first_losses[0], _TINY), losses[1] / max(self.first_losses[1], _TINY)
        weight_rate, beta = self.hparams["bmtard_weight_rate"], self.hparams["bmtard_beta"]
        self.weight = balance_weights(self.weight, progress, weight_rate, beta)
