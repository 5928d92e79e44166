"""Adversarial training of a student from scratch: on the worst images near the given ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.attacks import draw_start, evaluating, run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.robust import kl_divergence, trades_loss
from daft_domainbed.hparams import Hparam, is_eps, number, one_of, parse_eps, pick

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

NOISE = 0.001  # standard deviation of a start beside the image, in pixel units


class AT(ERM):
    """Adversarial training (Madry et al., 2018), or TRADES (Zhang et al., 2019).

    Minimises over the network f, with a perturbation delta in a ball of radius `at_eps` in pixels, as `at_loss` says,

        "ce"      max_delta CE(f(x + delta), y)
        "trades"  CE(f(x), y) + at_beta max_delta KL(f(x) || f(x + delta))

    The maximum is sought by projected gradient ascent, with batch norm in evaluation mode: "ce" begins anywhere in the
    ball, "trades" beside the image, where the divergence has no slope.

    Example:
        With `at_loss` "ce" and `at_eps` 0 this is ERM to the last bit.
    """

    SOURCE = "Madry et al., 2018, arXiv 1706.06083; Zhang et al., 2019, arXiv 1901.08573"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "at_loss": Hparam("ce", one_of("ce", "trades"), "what is minimised under attack"),
        "at_beta": Hparam(6.0, number(0), "weight of the divergence in trades", pick(1.0, 3.0, 6.0)),
        "at_norm": Hparam("linf", one_of("linf", "l2"), "norm of the ball"),
        "at_eps": Hparam(
            "auto",
            is_eps,
            "radius in units of [0, 1] pixels; auto: 8/255, in l2 0.5",
            pick("auto*1/4", "auto*1/2", "auto"),
        ),
        "at_steps": Hparam(10, number(1, integer=True), "ascent steps of the attack"),
        "at_step_size": Hparam(0.25, number(0, open_low=True), "length of such a step, as a share of the radius"),
    }

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return the radius as a number."""
        return {"at_eps": parse_eps(hparams["at_eps"], 8 / 255 if hparams["at_norm"] == "linf" else 0.5)}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams.update(self.resolve(hparams))
        # Random starts have a generator of their own: an attack never moves the global one.
        self.start_generator = torch.Generator().manual_seed(torch.initial_seed())

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain, under attack."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        x_adv = self._attack(x, y)
        if self.hparams["at_loss"] == "ce":
            loss = F.cross_entropy(self.predict(x_adv), y)
        else:
            loss = trades_loss(self.predict(x), self.predict(x_adv), y, self.hparams["at_beta"])

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        with evaluating(self.network):
            if self.hparams["at_loss"] == "ce":
                start = draw_start(x, self.hparams["at_eps"], self.hparams["at_norm"], self.start_generator)
                return perturb(lambda x: F.cross_entropy(self.predict(x), y, reduction="sum"), x, start, self.hparams)
            with torch.no_grad():
                clean = self.predict(x)
            start = draw_noise(x, self.start_generator)
            return perturb(lambda x: kl_divergence(clean, self.predict(x)).sum(), x, start, self.hparams)


def perturb(loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, hparams: Mapping[str, Any]) -> Tensor:
    """Raise a loss, a sum over samples, by the attack that the hyperparameters `at_*` and `pixels` describe."""
    return run_pgd(
        loss,
        x,
        eps=hparams["at_eps"],
        norm=hparams["at_norm"],
        steps=hparams["at_steps"],
        step_size=hparams["at_eps"] * hparams["at_step_size"],
        spec=INPUT_SPECS[hparams["pixels"]],
        start=start,
    )


def draw_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a start beside the image, from a generator on the CPU, so that it is the same on every device."""
    return (NOISE * torch.randn(like.shape, generator=generator)).to(like)
