"""Adversarial fine-tuning: an ERM teacher's rich features, recombined to withstand perturbations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import evaluating, run_pgd
from daft_domainbed.functional.learning_rate import get_rate_factor
from daft_domainbed.functional.losses import mix_targets, soft_cross_entropy, worst_case_linear_loss
from daft_domainbed.hparams import Hparam, is_eps, number, one_of, or_auto, or_word, parse_eps, pick
from daft_domainbed.models.backbones import freeze_backbone
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers.facts import RunFacts, require_run_facts, take_teacher
from daft_domainbed.teachers.samples import Batch, draw_minibatches, read_out_splits

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


# Shares of the mean feature norm that "validated" compares: frozen features want small ones, fine-tuned ones large.
RADII = (0.0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4)


class _Seen(NamedTuple):
    """Images, [B, C, H, W], their features, [B, D], labels, [B], targets, [B, K], and how many each domain has."""

    x: Tensor
    features: Tensor
    y: Tensor
    targets: Tensor
    sizes: Sequence[int]


class AFT(ERM):
    """The adversarially fine-tuned teacher of DAFT (Nasery et al., 2022).

    Starts from an ERM teacher f = h(phi(x)) and minimises, over the head h alone or over all of f (`aft_scope`),

        (1 - aft_weight) L(f(x), q) + aft_weight max_delta L(f perturbed by delta, q)

    where L is the soft cross-entropy and delta lives in pixels, f(x + delta), or in features, h(phi(x) + delta). The
    target q mixes the one-hot label with the ERM teacher's own belief (`aft_target_mix`; 0 is standard adversarial
    training). The attack maximises the cross-entropy against the label; in features, by default, the maximum is taken
    in closed form; with `aft_adversary` "domain" all images of a training domain share one delta, and the maximum is
    searched. The paper's abstract leaves scope, place, radius and target open: they are declared choices.

    Example:
        With `aft_eps` 0 this is plain fine-tuning of the head on q, the control that isolates the adversary.
    """

    SOURCE = "Nasery, Addepalli, Netrapalli and Jain, 2022, arXiv 2208.09139"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "aft_scope": Hparam("head", one_of("head", "all"), "what fine-tuning trains: `head` or `all`"),
        "aft_attack": Hparam(
            "pixels",
            one_of("pixels", "features"),
            "where the perturbation lives: `pixels` (through the backbone) or `features`",
        ),
        "aft_norm": Hparam(
            "auto",
            one_of("auto", "linf", "l2"),
            "of the perturbation; in pixels `linf` (`auto`) or `l2`, in features `l2`",
        ),
        "aft_eps": Hparam(
            "auto",
            or_word("validated", is_eps),
            "pixels: radius in units of [0, 1] pixels whatever the normalisation, auto 4/255 (`l2`: 0.5); features: "
            "share of the batch's mean feature norm, auto 0.025. A number, a fraction such as `4/255`, or `auto*1/2`; "
            "`validated`: of a few, in features, the best on out-splits of training domains",
            pick(0.0, "auto*1/4", "auto*1/2", "auto", "auto*2"),
        ),
        "aft_attack_steps": Hparam(
            "auto",
            or_auto(number(0, integer=True)),
            "pixels: 3 PGD steps of 1.5 eps / steps from a random start; features: 0, the closed-form bound, or 10 for "
            "an adversary a domain",
        ),
        "aft_adversary": Hparam(
            "image",
            one_of("image", "domain"),
            "in features: a perturbation an image, or one that all images of a training domain share",
            is_optional=True,
        ),
        "aft_weight": Hparam(1.0, number(0, 1), "weight of the adversarial loss against the clean one", pick(0.5, 1.0)),
        "aft_target_mix": Hparam(
            0.5,
            number(0, 1),
            "share of the ERM teacher's own belief in the target; 0 is standard adversarial training",
            pick(0.0, 0.5, 1.0),
        ),
        "aft_target_temperature": Hparam(1.0, number(0, open_low=True), "softens that belief"),
    }

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of each "auto".

        Raises:
            UsageError: The norm does not go with the attack.
        """
        norm, steps, eps = hparams["aft_norm"], hparams["aft_attack_steps"], hparams["aft_eps"]
        is_shared = hparams.get("aft_adversary") == "domain"
        if eps == "validated" and (hparams["aft_attack"], hparams["aft_scope"]) != ("features", "head"):
            raise UsageError(
                'hyperparameter aft_eps is "validated": radii are compared for "aft_attack": "features" on '
                '"aft_scope": "head" alone; give a number or "auto"'
            )
        if hparams["aft_attack"] == "features":
            if norm == "linf":
                raise UsageError('hyperparameter aft_norm is "linf": an attack on features is measured in "l2"')
            norm, auto, auto_steps = "l2", 0.025, 10 if is_shared else 0
            if is_shared and steps == 0:
                raise UsageError("hyperparameter aft_attack_steps is 0: an adversary a domain takes at least 1 step")
        elif is_shared:
            raise UsageError('hyperparameter aft_adversary is "domain": give "aft_attack": "features"')
        else:
            norm = "linf" if norm == "auto" else norm
            auto, auto_steps = (4 / 255 if norm == "linf" else 0.5), 3
            if steps == 0:
                raise UsageError("hyperparameter aft_attack_steps is 0: an attack on pixels takes at least 1 step")
        return {
            "aft_norm": norm,
            "aft_eps": eps if eps == "validated" else parse_eps(eps, auto),
            "aft_attack_steps": auto_steps if steps == "auto" else steps,
        }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        teacher = take_teacher()
        # The architecture is the teacher's; every weight comes from it, so none has to be downloaded.
        architecture = teacher.get_architecture()
        super().__init__(input_shape, num_classes, num_domains, {**hparams, **architecture, "weights": "none"})
        teacher.copy_weights_to(self.network, "ERM", "fine-tune an ERM checkpoint")
        hparams.update(architecture | self.resolve(hparams))
        self.hparams = hparams
        self.teacher = teacher

        self.scope, self.attack = hparams["aft_scope"], hparams["aft_attack"]
        self.is_bound = self.attack == "features" and hparams["aft_attack_steps"] == 0
        if self.is_bound and not isinstance(self.classifier, nn.Linear):
            raise UsageError(
                "aft_attack features with aft_attack_steps 0 is a bound for linear heads, and this teacher's "
                'classifier is nonlinear: give "aft_attack_steps": 10'
            )
        if self.scope == "head":
            # Images that are attacked, or augmented without end, never come again.
            comes_again = not hparams["data_augmentation"] or hparams.get("n_views", 0) > 0
            freeze_backbone(self.featurizer, remembers=self.attack == "features" and comes_again)
            self.optimizer = self._make_optimizer(self.classifier)
        # Random starts have a generator of their own: an attack never moves the global one.
        self.start_generator = torch.Generator().manual_seed(teacher.seed)
        if hparams["aft_eps"] == "validated":
            losses = self._validate_radii(require_run_facts("aft_eps"))
            hparams["aft_eps_candidates"] = {str(radius): loss for radius, loss in losses.items()}
            hparams["aft_eps"] = min(losses, key=lambda radius: losses[radius])
            self.start_generator.manual_seed(teacher.seed)

    def _validate_radii(self, facts: RunFacts) -> dict[float, float]:
        """Return the loss on the training domains' out-splits of the head that each radius would give.

        The heads are trained side by side for the run's steps, on one and the same minibatches.
        """
        self.to(facts.device)
        self.teacher.follow(next(self.parameters()))
        featurizer = self.teacher.model.featurizer  # the same, and it may know the images already
        heads = {radius: copy.deepcopy(self.classifier) for radius in RADII}
        optimizers = {radius: self._make_optimizer(head) for radius, head in heads.items()}
        n_steps, schedule = facts.args.steps or 0, self.hparams.get("lr_schedule", "constant")
        with preserve_states():
            seed_everything(facts.args.seed)
            for step, minibatches in enumerate(draw_minibatches(facts, n_steps)):
                rate = self.hparams["lr"] * get_rate_factor(schedule, step, n_steps)
                seen = self._look(minibatches, featurizer)
                for radius, head in heads.items():
                    loss, _ = self._get_losses(head, radius, seen)
                    optimizers[radius].param_groups[0]["lr"] = rate
                    optimizers[radius].zero_grad()
                    loss.backward()
                    optimizers[radius].step()
            return _validate(featurizer, heads, read_out_splits(facts))

    def _make_optimizer(self, head: nn.Module) -> Any:
        return type(self.optimizer)(head.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one fine-tuning step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        seen = self._look(minibatches, self._encode)
        loss, losses = self._get_losses(self.classifier, self.hparams["aft_eps"], seen)

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}

    def _look(self, minibatches: Sequence[tuple[Tensor, Tensor]], encode: Callable[[Tensor], Tensor]) -> _Seen:
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        features = encode(x)
        return _Seen(x, features, y, self._make_targets(x, features, y), [len(y) for _, y in minibatches])

    def _get_losses(self, head: nn.Module, eps: float, seen: _Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a head, and its terms by name."""
        weight = self.hparams["aft_weight"]
        losses = {}
        if weight < 1:
            losses["clean_loss"] = soft_cross_entropy(head(seen.features), seen.targets)
        if weight > 0:
            losses["adversarial_loss"] = self._get_adversarial_loss(head, eps, seen)
        # A weight of 0 or 1 leaves one term, and that one untouched: plain fine-tuning to the last bit.
        if len(losses) == 2:
            return (1 - weight) * losses["clean_loss"] + weight * losses["adversarial_loss"], losses
        (loss,) = losses.values()
        return loss, losses

    def _encode(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.scope == "all"):
            features: Tensor = self.featurizer(x)
        return features

    def _make_targets(self, x: Tensor, features: Tensor, y: Tensor) -> Tensor:
        self.teacher.follow(x)
        with torch.no_grad():
            # A frozen backbone has just computed the teacher's features.
            logits = self.teacher.model.classifier(features) if self.scope == "head" else self.teacher(x)
        return mix_targets(y, logits, self.hparams["aft_target_mix"], self.hparams["aft_target_temperature"])

    def _get_adversarial_loss(self, head: Any, eps: float, seen: _Seen) -> Tensor:
        x, features, y, targets, sizes = seen
        if eps == 0:
            return soft_cross_entropy(head(features), targets)
        if self.attack == "pixels":
            x_adv = self._attack(lambda x: head(self.featurizer(x)), x, y, eps)
            return soft_cross_entropy(head(self._encode(x_adv)), targets)
        radius = eps * features.detach().norm(dim=1).mean()
        if self.is_bound:
            return worst_case_linear_loss(head(features), head.weight, targets, radius)
        known = features.detach()
        if self.hparams.get("aft_adversary") == "domain":
            domains = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(y.device)
            start = known.new_zeros(len(sizes), known.shape[1])
            delta = self._attack(lambda shared: head(known + shared[domains]), start, y, radius)[domains]
        else:
            delta = self._attack(head, known, y, radius) - known
        return soft_cross_entropy(head(features + delta), targets)

    def _attack(self, model: Any, inputs: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
        """Maximise the cross-entropy against the label; batch norm stays in evaluation mode meanwhile."""
        with evaluating(self.featurizer):
            return run_pgd(
                lambda perturbed: F.cross_entropy(model(perturbed), y, reduction="sum"),
                inputs,
                eps=eps,
                norm=self.hparams["aft_norm"],
                steps=self.hparams["aft_attack_steps"],
                spec=self.teacher.input_spec if self.attack == "pixels" else None,
                generator=self.start_generator,
            )


@torch.no_grad()
def _validate(
    featurizer: nn.Module, heads: Mapping[float, nn.Module], domains: Iterable[Sequence[Batch]]
) -> dict[float, float]:
    """Return each head's cross-entropy against the labels: the mean over domains of the mean over their images."""
    losses: dict[float, list[float]] = {radius: [] for radius in heads}
    for batches in domains:
        encoded = [(featurizer(x), y) for x, y in batches]
        for radius, head in heads.items():
            total = sum(float(F.cross_entropy(head(features), y, reduction="sum")) for features, y in encoded)
            losses[radius].append(total / sum(len(y) for _, y in encoded))
    return {radius: sum(values) / len(values) for radius, values in losses.items()}
