"""Adversarial fine-tuning: an ERM teacher's rich features, recombined to withstand perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.losses import mix_targets, soft_cross_entropy, worst_case_linear_loss
from daft_domainbed.hparams import Hparam, is_eps, number, one_of, or_auto, parse_eps, pick
from daft_domainbed.models.backbones import freeze_backbone
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.frozen import remember
from daft_domainbed.teachers.facts import take_teacher

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


class AFT(ERM):
    """The adversarially fine-tuned teacher of DAFT (Nasery et al., 2022).

    Starts from an ERM teacher f = h(phi(x)) and minimises, over the head h alone or over all of f (`aft_scope`),

        (1 - aft_weight) L(f(x), q) + aft_weight max_delta L(f perturbed by delta, q)

    where L is the soft cross-entropy and delta lives in pixels, f(x + delta), or in features, h(phi(x) + delta). The
    target q mixes the one-hot label with the ERM teacher's own belief (`aft_target_mix`; 0 is standard adversarial
    training). The attack maximises the cross-entropy against the label; in features, by default, the maximum is taken
    in closed form. The paper's abstract leaves scope, place, radius and target open: they are declared choices.

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
            is_eps,
            "pixels: radius in units of [0, 1] pixels whatever the normalisation, auto 4/255 (`l2`: 0.5); features: "
            "share of the batch's mean feature norm, auto 0.025. A number, a fraction such as `4/255`, or `auto*1/2`",
            pick(0.0, "auto*1/4", "auto*1/2", "auto", "auto*2"),
        ),
        "aft_attack_steps": Hparam(
            "auto",
            or_auto(number(0, integer=True)),
            "pixels: 3 PGD steps of 1.5 eps / steps from a random start; features: 0, the closed-form bound",
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
        norm, steps = hparams["aft_norm"], hparams["aft_attack_steps"]
        if hparams["aft_attack"] == "features":
            if norm == "linf":
                raise UsageError('hyperparameter aft_norm is "linf": an attack on features is measured in "l2"')
            norm, auto, auto_steps = "l2", 0.025, 0
        else:
            norm = "linf" if norm == "auto" else norm
            auto, auto_steps = (4 / 255 if norm == "linf" else 0.5), 3
            if steps == 0:
                raise UsageError("hyperparameter aft_attack_steps is 0: an attack on pixels takes at least 1 step")
        return {
            "aft_norm": norm,
            "aft_eps": parse_eps(hparams["aft_eps"], auto),
            "aft_attack_steps": auto_steps if steps == "auto" else steps,
        }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        teacher = take_teacher()
        # The architecture is the teacher's; every weight comes from it, so none has to be downloaded.
        architecture = teacher.get_architecture()
        super().__init__(input_shape, num_classes, num_domains, {**hparams, **architecture, "weights": "none"})
        try:
            self.network.load_state_dict(teacher.model.network.state_dict())
        except (AttributeError, RuntimeError) as error:
            raise UsageError(
                f"{teacher.path} has no featurizer and head as ERM has: fine-tune an ERM checkpoint"
            ) from error
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
            freeze_backbone(self.featurizer)
            if self.attack == "features" and not hparams["data_augmentation"]:
                remember(self.featurizer, FeatureMemory())  # images that are augmented or attacked never come again
            self.optimizer = type(self.optimizer)(
                self.classifier.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
            )
        # Random starts have a generator of their own: an attack never moves the global one.
        self.start_generator = torch.Generator().manual_seed(teacher.seed)

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one fine-tuning step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        weight = self.hparams["aft_weight"]

        features = self._encode(x)
        targets = self._make_targets(x, features, y)
        losses = {}
        if weight < 1:
            losses["clean_loss"] = soft_cross_entropy(self.classifier(features), targets)
        if weight > 0:
            losses["adversarial_loss"] = self._get_adversarial_loss(x, features, y, targets)
        # A weight of 0 or 1 leaves one term, and that one untouched: plain fine-tuning to the last bit.
        if len(losses) == 2:
            loss = (1 - weight) * losses["clean_loss"] + weight * losses["adversarial_loss"]
        else:
            (loss,) = losses.values()

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}

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

    def _get_adversarial_loss(self, x: Tensor, features: Tensor, y: Tensor, targets: Tensor) -> Tensor:
        eps = self.hparams["aft_eps"]
        if eps == 0:
            return soft_cross_entropy(self.classifier(features), targets)
        if self.attack == "pixels":
            x_adv = self._attack(lambda x: self.classifier(self.featurizer(x)), x, y, eps)
            return soft_cross_entropy(self.classifier(self._encode(x_adv)), targets)
        radius = eps * features.detach().norm(dim=1).mean()
        if self.is_bound:
            return worst_case_linear_loss(self.classifier(features), self.classifier.weight, targets, radius)
        delta = self._attack(self.classifier, features.detach(), y, radius) - features.detach()
        return soft_cross_entropy(self.classifier(features + delta), targets)

    def _attack(self, model: Any, inputs: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
        """Maximise the cross-entropy against the label; batch norm stays in evaluation mode meanwhile."""
        was_training = self.featurizer.training
        self.featurizer.eval()
        try:
            return run_pgd(
                lambda perturbed: F.cross_entropy(model(perturbed), y, reduction="sum"),
                inputs,
                eps=eps,
                norm=self.hparams["aft_norm"],
                steps=self.hparams["aft_attack_steps"],
                spec=self.teacher.input_spec if self.attack == "pixels" else None,
                generator=self.start_generator,
            )
        finally:
            self.featurizer.train(was_training)
