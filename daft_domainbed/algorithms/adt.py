"""Adversarial training against a distribution of perturbations, in the place of one worst perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.attacks import evaluating, get_norms
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.perturbations import (
    bound_negative_entropy,
    place_perturbation,
    sample_perturbation,
    search_distribution,
)
from daft_domainbed.hparams import Hparam, is_eps, number, one_of, or_auto, parse_eps, pick
from daft_domainbed.models.generators import CODE_SIZE, CodeEncoder, Generator, Helpers

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


class ADT(ERM):
    """Adversarial distributional training (ADT, Dong et al., 2020).

    Minimises over the network f, where p is a distribution of perturbations d in an Linf ball and H its entropy,

        max_p E_{d ~ p}[CE(f(x + d), y)] + adt_entropy H(p)

    The inner distribution is, as `adt_family` says, a squashed normal that is sought anew for each image ("explicit"),
    one that a generator answers with ("amortised"), or what a generator makes of random codes ("implicit"; its entropy
    is bounded by how well an encoder reads the codes back). Generators train beside the network, in the same backward
    pass, with the gradient reversed between the two; they are no part of the checkpoint.
    """

    SOURCE = "Dong et al., 2020, arXiv 2002.05999"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "adt_family": Hparam("explicit", one_of("explicit", "amortised", "implicit"), "where distributions come from"),
        "adt_eps": Hparam("auto", is_eps, "Linf radius; auto: 8/255", pick("auto*1/4", "auto*1/2", "auto")),
        "adt_entropy": Hparam("auto", or_auto(number(0)), "weight of the entropy; auto: 0.01, implicit: 1"),
        "adt_steps": Hparam(7, number(1, integer=True), "explicit: steps of the search"),
        "adt_samples": Hparam(5, number(1, integer=True), "explicit: samples a step"),
        "adt_rate": Hparam(0.3, number(0, open_low=True), "explicit: length of a step before the squashing"),
        "adt_width": Hparam(32, number(1, integer=True), "the generators' channels; the authors' have 256"),
        "adt_generator_lr": Hparam(2e-4, number(0, open_low=True), "the generators' learning rate"),
        "adt_threshold": Hparam(0.9, number(0), "implicit: negative entropy below which nothing is asked"),
    }

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return radius and weight of the entropy as numbers."""
        auto = 1.0 if hparams["adt_family"] == "implicit" else 0.01
        weight = auto if hparams["adt_entropy"] == "auto" else hparams["adt_entropy"]
        return {"adt_eps": parse_eps(hparams["adt_eps"], auto=8 / 255), "adt_entropy": weight}

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams.update(self.resolve(hparams))
        self.spec, self.family = INPUT_SPECS[hparams["pixels"]], hparams["adt_family"]
        # Noise has a generator of its own: what perturbations are drawn never moves the global one.
        self.noise_generator = torch.Generator().manual_seed(torch.initial_seed())
        with torch.random.fork_rng(devices=[]):
            self.helpers = self._build_helpers(input_shape[0])

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        unit, entropy, penalty = self._choose_perturbation(x, y)
        x_adv = place_perturbation(x, unit, self.hparams["adt_eps"], self.spec)
        if x_adv.requires_grad:
            x_adv.register_hook(torch.neg)  # the generator raises the loss that the network lowers
        loss = F.cross_entropy(self.predict(x_adv), y)

        optimizers = [self.optimizer] if self.helpers is None else [self.optimizer, self.helpers.optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + penalty).backward()
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss.item(), "entropy": entropy.item()}

    def _build_helpers(self, channels: int) -> Helpers | None:
        lr, width = self.hparams["adt_generator_lr"], self.hparams["adt_width"]
        betas = {"generator": (0.5, 0.999), "encoder": (0.9, 0.999)}
        if self.family == "amortised":
            return Helpers({"generator": Generator(3 * channels, 2 * channels, width)}, lr, betas)
        if self.family == "implicit":
            generator = Generator(3 * channels, channels, width, has_code=True)
            return Helpers({"generator": generator, "encoder": CodeEncoder(channels)}, lr, betas)
        return None

    def _choose_perturbation(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return a perturbation of each image in [-1, 1], its distribution's entropy, and what is added to the loss."""
        # Drawn where it is needed: for a large image, numbers from the CPU would take longer than the network.
        seed = int(torch.randint(2**62, (), generator=self.noise_generator))
        noise = torch.Generator(x.device).manual_seed(seed)
        weight = self.hparams["adt_entropy"]
        if self.family == "explicit":
            mean, spread = self._search(x, y, noise)
            unit, surprise = sample_perturbation(mean, spread, _draw_normal(x, noise))
            return unit, surprise.mean(), 0.0

        assert self.helpers is not None
        self.helpers.follow(x)
        sight = self._look(x, y)
        if self.family == "amortised":
            mean, spread = self.helpers["generator"](sight).chunk(2, dim=1)
            unit, surprise = sample_perturbation(mean, spread, _draw_normal(x, noise))
            entropy = surprise.mean()
            return unit, entropy, -weight * entropy
        codes = 2 * torch.rand(len(x), CODE_SIZE, generator=noise, device=x.device) - 1
        unit = torch.tanh(self.helpers["generator"](sight, codes))
        bound = bound_negative_entropy(codes, *self.helpers["encoder"](unit))
        return unit, -bound, weight * F.relu(bound - self.hparams["adt_threshold"])

    def _search(self, x: Tensor, y: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        with evaluating(self.network):
            return search_distribution(
                lambda z: F.cross_entropy(self.predict(z), y, reduction="sum"),
                x,
                lambda: _draw_normal(x, noise),
                eps=self.hparams["adt_eps"],
                entropy_weight=self.hparams["adt_entropy"],
                steps=self.hparams["adt_steps"],
                samples=self.hparams["adt_samples"],
                rate=self.hparams["adt_rate"],
                spec=self.spec,
            )

    def _look(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what a generator sees: the image, and the loss's slope there and one step uphill, [B, 3 C, H, W]."""
        with evaluating(self.network):
            here = self._get_slope(x, y)
            uphill = place_perturbation(x, here.sign(), self.hparams["adt_eps"], self.spec)
            there = self._get_slope(uphill, y)
        return torch.cat([x, here, there], dim=1)

    def _get_slope(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss's gradient with respect to each image, its largest entry 1."""
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(self.predict(x), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, x)
        return slope / get_norms(slope, "linf").clamp_min(torch.finfo(slope.dtype).tiny)


def _draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
