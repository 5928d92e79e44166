"""Label-free distillation of a teacher's features: a map that keeps their angles, and a student that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.functional.similarity import cosine_loss, sne_loss, solve_procrustes, vote_by_neighbours
from daft_domainbed.hparams import Hparam, is_text, number, one_of, or_auto
from daft_domainbed.models.tokens import count_tokens, encode_tokens, has_tokens
from daft_domainbed.teachers.facts import take_teacher

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

TEMPERATURES = [0.01 * i for i in range(1, 11)]
_KEPT = 0.9  # of the running mean behind the Procrustes map
_BANK = 2048  # features that vote


class TinTeM(ERM):
    """TinTeM, published as CosPress: features distilled without labels (Mannix et al., 2025).

    With a frozen teacher's vectors t and a student's s of the same images, a map h (a layer norm and a linear layer)
    and the student are trained at once, each by terms of its own:

        L = SNE(t -> h(t))            for h: the neighbourhoods of pairwise cosines, at ten temperatures
          + 1 - cos(s, stop h(t))     for the student

    Of vision transformers both terms are taken twice, for the class tokens of a batch and for all tokens of each image;
    of other networks once, for the pooled features, after a layer norm of the student's. The map serves training only.
    The classifier is a linear probe, trained on the student's detached features, and is all that labels are for;
    `knn_acc` is how often the nearest of the latest features name a new image's class.

    `tintem_map` "procrustes" is an ablation, the orthogonal map that fits the student best; "proteus" the method that
    TinTeM is compared with, a map of the student's features onto the teacher's by their squared distance.
    """

    SOURCE = "Mannix et al., 2025, TMLR, arXiv 2411.15239"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "teacher_backbone": Hparam("timm/tf_efficientnet_lite0", is_text, "network of the teacher"),
        "teacher_input_size": Hparam(
            96,
            or_auto(number(8, integer=True)),
            "side in pixels to which the network of the teacher resizes its input",
        ),
        "tintem_map": Hparam("sne", one_of("sne", "procrustes", "proteus"), "what brings the features together"),
        "tintem_probe_lr": Hparam(0.01, number(0, open_low=True), "learning rate of the probe"),
    }

    map: Any  # beside the modules: it is thrown away, so that a checkpoint is plain ERM's

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.num_classes, self.teacher = num_classes, take_teacher()
        ours: Any = self.featurizer
        theirs = self.teacher.model.featurizer
        self.uses_tokens = has_tokens(ours) and has_tokens(theirs)
        if self.uses_tokens:
            self.uses_tokens = count_tokens(ours, input_shape) == count_tokens(theirs, input_shape)
        self.cross = torch.zeros(theirs.n_outputs, ours.n_outputs)  # of the two sides' vectors
        vars(self)["map"] = self._build_map(theirs.n_outputs, ours.n_outputs)
        groups = [
            {"params": [*self.featurizer.parameters(), *self.map.parameters()]},
            {"params": self.classifier.parameters(), "lr": hparams["tintem_probe_lr"]},
        ]
        self.optimizer = type(self.optimizer)(groups, lr=hparams["lr"], weight_decay=hparams["weight_decay"])
        self.bank, self.bank_labels = torch.zeros(0, ours.n_outputs), torch.zeros(0, dtype=torch.long)

    def _build_map(self, wide: int, narrow: int) -> nn.Module:
        widths = {"sne": (wide, narrow), "proteus": (narrow, wide)}.get(self.hparams["tintem_map"])
        with torch.random.fork_rng(devices=[]):  # the student begins as ERM does
            return nn.Sequential(nn.LayerNorm(widths[0]), nn.Linear(*widths)) if widths else nn.Identity()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the map with the modules."""
        self.map._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step of map, student and probe on a minibatch (x [B, C, H, W], y [B]) of every training domain."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        teacher, (features, student) = self._encode_by_teacher(x), self._encode(x)
        distil = {"sne": self._follow_map, "procrustes": self._follow_procrustes, "proteus": self._answer_teacher}
        losses = distil[self.hparams["tintem_map"]](teacher, student)
        loss = torch.stack(list(losses.values())).sum()
        probe_loss = F.cross_entropy(self.classifier(features.detach()), y)

        self.optimizer.zero_grad()
        (loss + probe_loss).backward()  # of parameters that have nothing in common
        self.optimizer.step()
        named = {name: value.item() for name, value in losses.items()}
        knn_acc = self._ask_neighbours(student[:, 0].detach(), y)
        return {"loss": loss.item()} | named | {"probe_loss": probe_loss.item(), "knn_acc": knn_acc}

    # --- vectors: [B, n, D], of n tokens, or of the pooled features alone ----------------------------------------

    @torch.no_grad()
    def _encode_by_teacher(self, x: Tensor) -> Tensor:
        self.teacher.follow(x)
        featurizer = self.teacher.model.featurizer
        vectors: Tensor = encode_tokens(featurizer, x) if self.uses_tokens else featurizer(x).unsqueeze(1)
        return vectors.float()

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's features, [B, D], and what of them is compared."""
        if self.uses_tokens:
            tokens = encode_tokens(self.featurizer, x)
            return tokens[:, 0], tokens
        features = self.featurizer(x)
        # The norm that ends a transformer: what comes from a ReLU could not point everywhere.
        return features, F.layer_norm(features, features.shape[1:]).unsqueeze(1)

    # --- what brings them together -------------------------------------------------------------------------------

    def _follow_map(self, teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
        mapped = self.map(teacher)
        losses = {"sne_global_loss": sne_loss(teacher[:, 0], mapped[:, 0], TEMPERATURES)}
        if self.uses_tokens:
            losses["sne_local_loss"] = sne_loss(teacher, mapped, TEMPERATURES)
        return losses | self._follow(student, mapped.detach(), cosine_loss)

    def _follow_procrustes(self, teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            units = F.normalize(teacher, dim=2).flatten(0, 1), F.normalize(student.float(), dim=2).flatten(0, 1)
            self.cross = _KEPT * self.cross.to(teacher) + units[0].T @ units[1] / len(units[0])
            mapped = teacher @ solve_procrustes(self.cross)
        return self._follow(student, mapped, cosine_loss)

    def _answer_teacher(self, teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
        return self._follow(self.map(student), teacher, F.mse_loss)

    def _follow(self, student: Tensor, target: Tensor, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
        losses = {"token_loss": loss(student[:, 0], target[:, 0])}
        return losses | ({"feature_loss": loss(student, target)} if self.uses_tokens else {})

    def _ask_neighbours(self, features: Tensor, labels: Tensor) -> float:
        """Return how many of these images the bank knows, and put them into it."""
        bank, bank_labels = self.bank.to(features), self.bank_labels.to(labels)
        accuracy = 0.0
        if len(bank):
            logits = vote_by_neighbours(features, bank, bank_labels, self.num_classes)
            accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        self.bank, self.bank_labels = torch.cat([bank, features])[-_BANK:], torch.cat([bank_labels, labels])[-_BANK:]
        return accuracy
