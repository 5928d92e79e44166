"""Once-for-all adversarial training: one network for every trade-off between accuracy and robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.algorithms.at import AT, perturb
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import draw_start, evaluating
from daft_domainbed.hparams import Hparam, is_bool, number
from daft_domainbed.models.conditional import Condition, make_conditional

if TYPE_CHECKING:
    from daft_domainbed.algorithms.base import ERM
else:
    ERM = object  # `plugin.register` puts the host's ERM behind the mixin

_ATTACK = ("at_norm", "at_eps", "at_steps", "at_step_size")
_CODE_SIZE = 128


def parse_lambdas(text: str) -> list[float]:
    """Return the numbers of a list such as "0, 0.2, 1", in increasing order.

    Raises:
        ValueError: It holds something else, or a number twice or outside [0, 1].
    """
    lambdas = sorted(float(part) for part in text.split(","))
    if len({*lambdas}) < len(lambdas) or not all(0 <= value <= 1 for value in lambdas):
        raise ValueError(text)
    return lambdas


def are_lambdas(value: Any) -> str | None:
    """Return what a list of trade-offs should have been, or None where it is one."""
    try:
        fits = isinstance(value, str) and 1 <= len(parse_lambdas(value)) <= _CODE_SIZE
    except ValueError:
        fits = False
    return None if fits else 'different numbers from 0 to 1 in a text, as in "0, 0.2, 1"'


def find_choice(lambdas: Sequence[float], wanted: float) -> int:
    """Return the place of a number among the trained ones.

    Raises:
        UsageError: It is none of them: its code would mean nothing to the network.
    """
    for j, value in enumerate(lambdas):
        if math.isclose(value, wanted):
            return j
    known = ", ".join(f"{value:g}" for value in lambdas)
    raise UsageError(f"lambda {wanted:g} is none of those that OAT is trained for ({known}): add it to oat_lambdas")


def draw_choices(n: int, lambdas: Sequence[float], generator: torch.Generator) -> Tensor:
    """Draw for each of n samples a place in `lambdas`, which increase; [n].

    As OAT's authors do, ceil(n / J) samples have 0 where it is one of J values, and the others any other value; which
    samples these are is drawn as well, since a batch here comes domain by domain.
    """
    has_zero = int(lambdas[0] == 0)
    n_zero = math.ceil(n / len(lambdas)) * has_zero
    others = has_zero + torch.randint(max(len(lambdas) - has_zero, 1), (n - n_zero,), generator=generator)
    choices = torch.cat([torch.zeros(n_zero, dtype=torch.long), others])
    return choices[torch.randperm(n, generator=generator)]


def mix_losses(clean: Tensor, adversarial: Tensor, lambdas: Tensor) -> Tensor:
    """Return the batch mean of (1 - lambda) clean + lambda adversarial, where samples come in order of lambda.

    Args:
        clean: Losses of the first samples, at least of those whose lambda is below 1.
        adversarial: Losses of the last samples, at least of those whose lambda is above 0.
        lambdas: Of all samples, [B].

    Example:
        >>> lambdas = torch.tensor([0.0, 0.5, 1.0])
        >>> mix_losses(torch.tensor([3.0, 2.0]), torch.tensor([4.0, 6.0]), lambdas)
        tensor(4.)
    """
    clean_part = ((1 - lambdas[: len(clean)]) * clean).sum()
    return (clean_part + (lambdas[len(lambdas) - len(adversarial) :] * adversarial).sum()) / len(lambdas)


class OAT(ERM):
    """Once-for-all adversarial training (OAT, Wang et al., 2020).

    One network f(x, lambda) minimises, for every lambda of `oat_lambdas` at once, each sample having one of its own,

        (1 - lambda) CE(f(x, lambda), y) + lambda max_delta CE(f(x + delta, lambda), y)

    Lambda enters by feature-wise modulation after every norm layer, and by which set of batch norm a sample goes
    through: the first where lambda is 0, the second elsewhere. `predict` answers at `oat_lambda`; `set_lambda` moves
    along the trade-off without training.
    """

    SOURCE = "Wang et al., 2020, arXiv 2010.11828"
    HPARAMS: ClassVar[dict[str, Hparam]] = {name: AT.HPARAMS[name] for name in _ATTACK} | {
        "oat_lambdas": Hparam("0, 0.1, 0.2, 0.3, 0.4, 1", are_lambdas, "trade-offs to train for"),
        "oat_lambda": Hparam(0.2, number(0, 1), "the one of them at which it predicts"),
        "oat_dual_norm": Hparam(True, is_bool, "a second set of batch norm for every lambda but 0"),
    }
    rebuilt = ("condition",)  # nothing that a resumed run would miss

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return the radius as a number.

        Raises:
            UsageError: It would predict at a lambda that it is not trained for, or is not to train its backbone.
        """
        find_choice(parse_lambdas(hparams["oat_lambdas"]), hparams["oat_lambda"])
        if hparams.get("backbone_frozen"):
            raise UsageError("hyperparameter backbone_frozen is true: OAT trains layers inside the backbone")
        return AT.resolve(hparams)

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        resolved = self.resolve(hparams)
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams.update(resolved)
        self.lambdas = parse_lambdas(hparams["oat_lambdas"])
        seed = torch.initial_seed()
        self.start_generator = torch.Generator().manual_seed(seed)  # AT's own starts
        self.lambda_generator = torch.Generator().manual_seed(seed)
        # Rows of an orthogonal matrix: as far from each other as codes can be.
        normal = torch.randn(_CODE_SIZE, _CODE_SIZE, generator=torch.Generator().manual_seed(seed))
        self.codes: Tensor
        self.register_buffer("codes", torch.linalg.qr(normal)[0][: len(self.lambdas)].clone())

        self.condition = Condition()
        with torch.random.fork_rng(devices=[]):  # the new layers' weights do not move what ERM would draw next
            n_layers = make_conditional(self.network, self.condition, _CODE_SIZE, is_dual=hparams["oat_dual_norm"])
        if n_layers == 0:
            raise UsageError(f"backbone {hparams['backbone']!r} has no batch norm for OAT to modulate: use a ResNet")
        self.optimizer = type(self.optimizer)(
            self.network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """Take one step on a minibatch (x [B, C, H, W], y [B]) of every training domain, each sample at its lambda."""
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        # In order of lambda: at 0 there is no adversarial loss to compute, at 1 no clean one.
        choices, order = draw_choices(len(x), self.lambdas, self.lambda_generator).sort(stable=True)
        lambdas = torch.tensor(self.lambdas)[choices]
        n_zero, n_clean = int((lambdas == 0).sum()), int((lambdas < 1).sum())
        x, y, choices, lambdas = x[order], y[order], choices.to(y.device), lambdas.to(x)

        clean, adversarial = x.new_zeros(0), x.new_zeros(0)
        if n_clean > 0:
            logits = self._predict(x[:n_clean], choices[:n_clean], n_zero)
            clean = F.cross_entropy(logits, y[:n_clean], reduction="none")
        if n_zero < len(x):
            x_adv = self._attack(x[n_zero:], y[n_zero:], choices[n_zero:])
            logits = self._predict(x_adv, choices[n_zero:], 0)
            adversarial = F.cross_entropy(logits, y[n_zero:], reduction="none")
        loss = mix_losses(clean, adversarial, lambdas)

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        losses = {"clean_loss": clean, "adversarial_loss": adversarial}
        return {"loss": loss.item()} | {name: part.mean().item() for name, part in losses.items() if len(part)}

    def predict(self, x: Tensor) -> Tensor:
        """Return logits, [B, K], at the lambda of the hyperparameter `oat_lambda`, or of `set_lambda`."""
        choice = find_choice(self.lambdas, self.hparams["oat_lambda"])
        choices = torch.full((len(x),), choice, device=x.device)
        return self._predict(x, choices, len(x) if self.lambdas[choice] == 0 else 0)

    def set_lambda(self, value: float) -> None:
        """Predict at another of the trained lambdas from now on.

        Raises:
            UsageError: It is none of them.
        """
        self.hparams["oat_lambda"] = self.lambdas[find_choice(self.lambdas, value)]

    def _predict(self, x: Tensor, choices: Tensor, n_zero: int) -> Tensor:
        """Return the logits of samples of which the first `n_zero` have lambda 0."""
        self.condition.set(self.codes, choices, n_zero)
        logits: Tensor = self.network(x)
        return logits

    def _attack(self, x: Tensor, y: Tensor, choices: Tensor) -> Tensor:
        """Attack each sample at its own lambda, above 0."""
        start = draw_start(x, self.hparams["at_eps"], self.hparams["at_norm"], self.start_generator)
        with evaluating(self.network):
            return perturb(
                lambda z: F.cross_entropy(self._predict(z, choices, 0), y, reduction="sum"), x, start, self.hparams
            )
