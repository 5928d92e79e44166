"""ERM with its weights averaged along the way: the cheap baseline that any gain has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from daft_domainbed.hparams import Hparam, number

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


class SMA(ERM):
    """The simple moving average of ERM's weights ("Ensemble of Averages", Arpit et al., 2022, equation 1).

    Trains as ERM does, to the last bit, and predicts with the mean of the weights after every step from `sma_start`
    on; until then with the latest. Batch norm's statistics are averaged like weights. One more copy of the network,
    no more steps.
    """

    SOURCE = "Arpit, Wang, Zhou and Xiong, 2022, arXiv 2110.10832"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "sma_start": Hparam(
            100,
            number(0, integer=True),
            "updates before the average of the weights begins: a run of no more steps than that is plain ERM",
        ),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        # Without a function torch averages all tensors at once, which fails on a GPU for batch norm's counters.
        averaged = AveragedModel(self.network, avg_fn=get_swa_avg_fn(), use_buffers=True)
        self.averaged = averaged.requires_grad_(False)
        self.n_steps: Tensor
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take ERM's step on a minibatch (x [B, C, H, W], y [B]) of every training domain, and average."""
        losses = super().update(minibatches, unlabeled)
        self.n_steps += 1
        if self.n_steps <= self.hparams["sma_start"]:
            self.averaged.n_averaged.zero_()  # the next update copies
        self.averaged.update_parameters(self.network)
        return losses

    def predict(self, x: Tensor) -> Tensor:
        """Return logits, [B, K]: of the network in training mode, of the averaged one in evaluation mode."""
        logits: Tensor = (self.network if self.training else self.averaged)(x)
        return logits
