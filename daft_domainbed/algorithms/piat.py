"""Perturbation-invariant adversarial training: lists that keep their order when their documents are attacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.algorithms.at import draw_noise
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import evaluating, run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.ranking import DIVERGENCES
from daft_domainbed.functional.robust import kl_divergence
from daft_domainbed.functional.synonyms import find_synonyms
from daft_domainbed.hparams import Hparam, is_bool, is_eps, number, one_of, or_auto, parse_eps, pick
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.ranker import find_ranker, moving_documents
from daft_domainbed.models.ranking_attacks import promote_by_embedding, promote_by_words
from daft_domainbed.teachers.facts import require_run_facts, take_teacher

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

_STEP = 2.5  # steps that would lead from the centre of a ball to its edge, shared by all


class PIAT(ERM):
    """Perturbation-invariant adversarial training of a ranker (PIAT, Liu et al., 2024).

    With s the scores of a list and s' those after its wrong documents were attacked, minimises

        "kl"           CE(s, y) + piat_lambda KL(softmax(s) || softmax(s'))
        "pairwise"     CE(s, y) + piat_lambda sum over pairs of KL(sigmoid(s_i - s_j) || sigmoid(s'_i - s'_j))
        "listmle"      CE(s, y) - piat_lambda log Plackett-Luce(order of s | s'), less its value at s' = s
        "adversarial"  CE(s', y), the control: plain adversarial training

    Wrong documents are promoted in the space of embeddings, or by synonyms; with `piat_static` once, against a ranker
    that was trained naturally, else against this one at every step. Of images the classes' logits are the list, and
    pixels are attacked so that they move.

    Example:
        Of images, "kl" with examples made on line is TRADES: `AT` with `at_loss` "trades" and `at_beta` piat_lambda.
    """

    rebuilt = ("memory", "synonyms")  # nothing that a resumed run would miss
    SOURCE = "Liu et al., 2024, AAAI, arXiv 2312.10329; its code has no training loss: what is ours is on its page"
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "piat_form": Hparam(
            "kl", one_of(*DIVERGENCES, "adversarial"), "what keeps a list invariant; adversarial: CE under attack alone"
        ),
        "piat_lambda": Hparam(
            "auto",
            or_auto(number(0)),
            "weight of the invariance; auto: of texts 1, of images 6, divided by the places for listmle, by the pairs "
            "for pairwise",
        ),
        "piat_attack": Hparam(
            "auto",
            one_of("auto", "embedding", "words", "pixels"),
            "what is perturbed; auto: of texts words, of images pixels",
        ),
        "piat_static": Hparam(False, is_bool, "examples made once, against a naturally trained model"),
        "piat_eps": Hparam(
            "auto",
            is_eps,
            "radius: a share of the norm of a document's embeddings, auto 0.5; of images as `at_eps`, auto 8/255",
            pick("auto*1/2", "auto"),
        ),
        "piat_steps": Hparam("auto", or_auto(number(1, integer=True)), "ascent steps; auto: of texts 2, of images 10"),
        "piat_words": Hparam(4, number(1, integer=True), "most words of a document that are replaced"),
    }

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return what depends on whether texts or images are ranked.

        Raises:
            UsageError: The attack is not of this input, or static examples of embeddings are asked for.
        """
        is_text, attack = hparams["pixels"] == "tokens", hparams["piat_attack"]
        if attack == "auto":
            attack = "words" if is_text else "pixels"
        if is_text == (attack == "pixels"):
            choice = "embedding or words" if is_text else "pixels"
            raise UsageError(
                f"hyperparameter piat_attack is {attack}: {'texts' if is_text else 'images'} need {choice}"
            )
        if hparams["piat_static"] and attack == "embedding":
            raise UsageError(
                "hyperparameter piat_static: another ranker's embeddings are no embeddings here: use words"
            )
        steps = hparams["piat_steps"]
        return {
            "piat_attack": attack,
            "piat_eps": parse_eps(hparams["piat_eps"], 0.5 if is_text else 8 / 255),
            "piat_steps": (2 if is_text else 10) if steps == "auto" else steps,
        }

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams.update(self.resolve(hparams))
        if hparams["piat_lambda"] == "auto":
            weight = 6.0 if hparams["piat_attack"] == "pixels" else 1.0
            n_terms = {"pairwise": math.comb(num_classes, 2), "listmle": num_classes}  # that these two forms add up
            hparams["piat_lambda"] = weight / n_terms.get(hparams["piat_form"], 1)
        self.start_generator = torch.Generator().manual_seed(torch.initial_seed())
        self.natural = take_teacher("natural") if hparams["piat_static"] else None
        if hparams["piat_attack"] != "pixels" and find_ranker(self) is None:
            raise UsageError(
                f"hyperparameter backbone is {hparams.get('backbone')}: PIAT attacks texts in 'ranker_w<N>'"
            )
        self.memory = FeatureMemory()
        self.synonyms = find_synonyms(list_source_documents()) if hparams["piat_attack"] == "words" else None

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, ...], y [B]) of every training domain, beside the attacked one."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])

        attacked, moved = self._attack(x, y)
        form = self.hparams["piat_form"]
        natural = None if form == "adversarial" else self.predict(x)
        with moving_documents(self, moved):
            scores = self.predict(attacked)
        if natural is None:
            loss = F.cross_entropy(scores, y)
            losses = {}
        else:
            natural_loss, invariance_loss = F.cross_entropy(natural, y), DIVERGENCES[form](natural, scores).mean()
            loss = natural_loss + self.hparams["piat_lambda"] * invariance_loss
            losses = {"natural_loss": natural_loss.item(), "invariance_loss": invariance_loss.item()}

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()} | losses

    def _attack(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the model is given under attack, and how the embeddings of its documents are moved."""
        attack, budget = self.hparams["piat_attack"], (self.hparams["piat_eps"], self.hparams["piat_steps"])
        if attack == "embedding":
            return x, promote_by_embedding(self.network, self.predict, x, y, *budget)
        if self.natural is None:
            if attack == "pixels":
                return self._move_pixels(x, self, draw_noise(x, self.start_generator)), None
            return self._replace_words(x, y, self), None
        model = self.natural.model
        self.natural.follow(x)
        # Each image and each list is attacked once, whenever it comes.
        if attack == "pixels":
            # From one start for all, so that an image's example does not depend on when it comes.
            start = draw_noise(x[:1], torch.Generator().manual_seed(self.start_generator.initial_seed()))
            return self.memory.recall(x, lambda rows: self._move_pixels(rows, model, start.expand_as(rows))), None
        labelled = torch.cat([x.flatten(1), y[:, None]], dim=1)
        attacked = self.memory.recall(
            labelled, lambda rows: self._replace_words(rows[:, :-1].view(-1, *x.shape[1:]), rows[:, -1], model)
        )
        return attacked, None

    def _replace_words(self, x: Tensor, y: Tensor, model: Any) -> Tensor:
        assert self.synonyms is not None
        budget = self.hparams["piat_words"], self.hparams["piat_eps"], self.hparams["piat_steps"]
        return promote_by_words(model.network, model.predict, x, y, self.synonyms.to(x.device), *budget)

    def _move_pixels(self, x: Tensor, model: Any, start: Tensor) -> Tensor:
        eps, steps = self.hparams["piat_eps"], self.hparams["piat_steps"]
        with evaluating(model.network):
            with torch.no_grad():
                clean = model.predict(x)
            return run_pgd(
                lambda x: kl_divergence(clean, model.predict(x)).sum(),
                x,
                eps=eps,
                norm="linf",
                steps=steps,
                step_size=eps * (_STEP / steps),
                spec=INPUT_SPECS[self.hparams["pixels"]],
                start=start,
            )


def list_source_documents() -> Tensor:
    """Return the documents of the run's training domains, [N, L]: synonyms come from these alone."""
    facts = require_run_facts("piat_attack")
    sources = [in_ for i, (in_, _) in enumerate(facts.splits) if i not in facts.args.test_envs]
    return torch.cat([split.underlying_dataset.documents for split in sources])
