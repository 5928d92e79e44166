"""Distillation of a plain teacher (KD) and of an adversarially fine-tuned one (DAFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.entropy import find_matching_scale, get_mean_entropy
from daft_domainbed.functional.losses import kd_loss
from daft_domainbed.hparams import Hparam, is_bool, number, or_auto, pick, uniform
from daft_domainbed.runtime.randomness import preserve_states, seed_everything
from daft_domainbed.teachers.facts import require_run_facts, take_teacher
from daft_domainbed.teachers.samples import read_in_splits

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin


MOST_APART = 1e-3  # nats, between the mean entropies that kd_match makes equal


class KD(ERM):
    """Knowledge distillation (Hinton et al., 2015): a student learns from the labels and from a frozen teacher.

    Minimises (1 - kd_weight) CE(S(x), y) + kd_weight kd_temperature^2 KL(teacher || student) over the student S.
    With `kd_match`, the rival explanation of DAFT, the teacher's logits are divided by the s for which its beliefs,
    softened, have the mean entropy of those of the AFT teacher on the training images: then KD and DAFT differ in the
    direction of the teacher's logits only.

    The teacher sees the student's own augmented view. The student has no parameter beyond ERM's, and the teacher is
    none of its modules: state dict, optimizer and train() know only the student.
    """

    SOURCE = "Hinton, Vinyals and Dean, 2015, arXiv 1503.02531"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "kd_weight": Hparam(
            0.9, number(0, 1), "weight a of the teacher: (1 - a) CE + a kd_temperature² KL", uniform(0.5, 1)
        ),
        "kd_temperature": Hparam(
            4.0, number(0, open_low=True), "softens teacher and student", pick(1.0, 2.0, 4.0, 5.0, 10.0)
        ),
        "kd_match": Hparam(
            False,
            is_bool,
            "scale the teacher's logits to the confidence of the AFT teacher that DAFT would have",
            is_optional=True,
        ),
    }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.teacher = take_teacher()
        self.match_scale = 1.0
        if hparams.get("kd_match"):
            self.match_scale = self.hparams["kd_match_scale"] = self._find_match_scale()

    def _find_match_scale(self) -> float:
        """Return what the teacher's logits are divided by to be as confident as the AFT teacher on training images."""
        facts, temperature = require_run_facts("kd_match"), self.hparams["kd_temperature"]
        rival = take_teacher("aft_teacher")
        with preserve_states():
            seed_everything(facts.args.seed)
            pairs = [(self.teacher(x), rival(x)) for x, _ in read_in_splits(facts)]
        own, theirs = (torch.cat(logits) for logits in zip(*pairs, strict=True))
        wanted = get_mean_entropy(theirs, temperature)
        scale = find_matching_scale(own, temperature, wanted)
        reached = get_mean_entropy(own, scale * temperature)
        if abs(reached - wanted) > MOST_APART:
            raise UsageError(
                f"kd_match: no scale makes the ERM teacher as confident as the AFT teacher (mean entropy {reached:.4f} "
                f"instead of {wanted:.4f}): leave it out"
            )
        return scale

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one student step on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        weight = self.hparams["kd_weight"]

        logits = self.predict(x)
        task_loss = F.cross_entropy(logits, y)
        teacher_logits = self.teacher(x) / self.match_scale  # by 1, nothing changes
        distillation_loss = kd_loss(logits, teacher_logits, self.hparams["kd_temperature"])
        loss = (1 - weight) * task_loss + weight * distillation_loss

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), "task_loss": task_loss.item(), "kd_loss": distillation_loss.item()}


class DAFT(KD):
    """DAFT, "Distilling Adversarially Fine-tuned Models for Better OOD Generalization" (Nasery et al., 2022).

    1. An ERM teacher learns rich features by standard training.
    2. Adversarial fine-tuning of it combines them robustly: the AFT teacher (`aft.py`).
    3. Its knowledge is distilled into the student, by KD's update to the letter: DAFT and KD differ in nothing but
       the teacher, so what separates their results is the teacher.

    Its row in `methods.py` accepts nothing but an AFT teacher; with `teacher: "auto"` stages 1 and 2 are made first.
    """

    SOURCE = "Nasery, Addepalli, Netrapalli and Jain, 2022, arXiv 2208.09139"
    HPARAMS: ClassVar[dict[str, Hparam]] = {name: KD.HPARAMS[name] for name in ("kd_weight", "kd_temperature")} | {
        "aft_steps": Hparam(
            "auto",
            or_auto(number(1, integer=True)),
            "updates of the AFT teacher; `auto`: a quarter of the ERM teacher's",
        ),
    }
