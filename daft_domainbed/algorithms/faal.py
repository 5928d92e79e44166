"""Fine-tuning of an adversarially trained network for the classes that it protects worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from daft_domainbed.algorithms.at import AT
from daft_domainbed.functional.class_weights import choose_sample_weights, get_margins
from daft_domainbed.functional.robust import kl_divergence
from daft_domainbed.hparams import Hparam, number, one_of, pick
from daft_domainbed.teachers.facts import take_teacher


class FAAL(AT):
    """Fairness-aware adversarial learning (FAAL, Zhang et al., 2024).

    Starts from an adversarially trained network and minimises AT's loss under attack, l(x, y), with the class weights
    that hurt most among those near the uniform ones u:

        max_p sum_c p_c E_c[l]  subject to  KL(u || p) <= faal_radius

    The weights are chosen in each batch by the classes' probability margins under attack, over the classes that it
    shows. With `faal_awp` the network's weights, too, are moved to where the plain loss is worse before each step, and
    back after it (AWP, Wu et al., 2020).

    Example:
        With `faal_radius` 0 and `faal_awp` 0 this is more of the training that made its start.
    """

    SOURCE = "Zhang et al., 2024, arXiv 2402.17729"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "faal_radius": Hparam(0.5, number(0), "how far class weights may go, a KL divergence", pick(0.25, 0.5, 1.0)),
        "faal_gain": Hparam("mean", one_of("mean", "sum"), "a class counts by the mean or the sum of its margins"),
        "faal_awp": Hparam(0.0, number(0), "length of the weights' perturbation, relative to each layer"),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        teacher = take_teacher()
        # The architecture is its start's; every weight comes from there, so none has to be downloaded.
        architecture = teacher.get_architecture()
        super().__init__(input_shape, num_classes, num_domains, {**hparams, **architecture, "weights": "none"})
        teacher.copy_weights_to(self.network, "AT", "name an AT checkpoint")
        hparams.update(architecture | self.resolve(hparams))
        self.hparams = hparams

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one fine-tuning step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        x_adv = self._attack(x, y)
        ascent = self._find_ascent(x, x_adv, y) if self.hparams["faal_awp"] > 0 else {}
        self._move_weights(ascent, 1)
        losses, logits = self._measure(self.predict, x, x_adv, y)
        weights = choose_sample_weights(
            get_margins(logits, y), y, self.hparams["faal_radius"], by=self.hparams["faal_gain"]
        )
        loss = (weights * losses).mean()

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._move_weights(ascent, -1)
        return {"loss": loss.item(), "plain_loss": losses.mean().item(), "largest_weight": weights.max().item()}

    def _measure(
        self, predict: Callable[[Tensor], Tensor], x: Tensor, x_adv: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return AT's loss of each sample, [B], and its logits under attack, [B, K]."""
        if self.hparams["at_loss"] == "ce":
            logits = predict(x_adv)
            return F.cross_entropy(logits, y, reduction="none"), logits
        clean, logits = predict(x), predict(x_adv)
        divergence = kl_divergence(clean, logits)
        return F.cross_entropy(clean, y, reduction="none") + self.hparams["at_beta"] * divergence, logits

    def _find_ascent(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return each weight's step up the plain loss, `faal_awp` times as long as the weight itself."""
        weights = {name: w for name, w in self.network.named_parameters() if w.dim() > 1 and w.requires_grad}
        # What is tried here is no data: batch norm's statistics are moved on copies.
        copies = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        losses, _ = self._measure(lambda z: functional_call(self.network, copies, (z,)), x, x_adv, y)
        gradients = torch.autograd.grad(losses.mean(), list(weights.values()))
        return {
            name: scale_ascent(weight.detach(), gradient, self.hparams["faal_awp"])
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }

    @torch.no_grad()
    def _move_weights(self, ascent: dict[str, Tensor], sign: int) -> None:
        for name, step in ascent.items():
            self.network.get_parameter(name).add_(step, alpha=sign)


def scale_ascent(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """Return the direction of a weight's gradient at gamma times the weight's length (AWP, Wu et al., 2020).

    Example:
        >>> scale_ascent(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), gamma=0.1)
        tensor([[0.0000, 0.5000]])
    """
    return gamma * weight.norm() * (gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny))
