"""Adversarial training on images of the classes and on images of none: sure where it should be, unsure elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.data.outside import OutsideStream, choose_source, is_source
from daft_domainbed.functional.attacks import evaluating, run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.out_distribution import measure_uniform_divergence
from daft_domainbed.hparams import Hparam, is_eps, number, parse_eps, pick

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


class RATIO(ERM):
    """Robustness by adversarial training on in- and out-distribution (RATIO, Augustin et al., 2020).

    Minimises, over images x with labels y and as many images z that show none of the classes,

        1/2 max_{|d| <= eps} CE(f(x + d), y) + 1/2 ratio_weight max_{|d| <= eps_o} KL(u || softmax f(z + d))

    in L2 balls, where u is uniform over the classes. Both batches go through the network together, so that batch norm
    sees the mixture.
    """

    SOURCE = "Augustin et al., 2020, arXiv 2003.09461"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "ratio_eps": Hparam("auto", is_eps, "L2 radius around images of the classes", pick("auto*1/2", "auto")),
        "ratio_steps": Hparam(10, number(1, integer=True), "attack steps there"),
        "ratio_outside": Hparam("auto", is_source, 'out-distribution: "noise", "digits", "emoji" or "folder:PATH"'),
        "ratio_outside_eps": Hparam("auto", is_eps, "L2 radius around out-distribution images; auto: twice ratio_eps"),
        "ratio_outside_steps": Hparam(10, number(1, integer=True), "attack steps there"),
        "ratio_weight": Hparam(1.0, number(0), "weight of the out-distribution term", pick(0.5, 1.0, 2.0)),
    }

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return the radii as numbers."""
        eps = parse_eps(hparams["ratio_eps"], auto=0.5)
        return {"ratio_eps": eps, "ratio_outside_eps": parse_eps(hparams["ratio_outside_eps"], auto=2 * eps)}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        source = choose_source(hparams["ratio_outside"], input_shape)
        self_chosen = self.resolve(hparams) | {"ratio_outside": source}
        spec, seed = INPUT_SPECS[hparams["pixels"]], torch.initial_seed()
        outside = OutsideStream(source, input_shape, spec, seed)  # refuses before anything is built
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams.update(self_chosen)
        self.spec, self.outside = spec, outside

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain and as many other images."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        z = self.outside.draw(len(x)).to(x)

        def measure_error(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, y, reduction="none")

        inside = self._attack(measure_error, x, "ratio_eps", "ratio_steps")
        outside = self._attack(measure_uniform_divergence, z, "ratio_outside_eps", "ratio_outside_steps")
        logits, outside_logits = self.network(torch.cat([inside, outside])).split(len(x))
        inside_loss = measure_error(logits).mean()
        outside_loss = measure_uniform_divergence(outside_logits).mean()
        loss = (inside_loss + self.hparams["ratio_weight"] * outside_loss) / 2

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "loss": loss.item(),
            "inside_loss": inside_loss.item(),
            "outside_loss": outside_loss.item(),
            # A network that answers everything uniformly has a low loss: these two tell.
            "inside_accuracy": (logits.argmax(dim=1) == y).float().mean().item(),
            "outside_confidence": outside_logits.softmax(dim=1).amax(dim=1).mean().item(),
        }

    def _attack(self, measure: Callable[[Tensor], Tensor], x: Tensor, eps: str, steps: str) -> Tensor:
        """Maximise a loss of each sample's logits from the image itself, as the authors do."""
        with evaluating(self.network):
            return run_pgd(
                lambda z: measure(self.network(z)).sum(),
                x,
                eps=self.hparams[eps],
                norm="l2",
                steps=self.hparams[steps],
                spec=self.spec,
            )
