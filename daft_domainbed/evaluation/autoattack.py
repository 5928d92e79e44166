"""AutoAttack, for any number of classes; its package is the extra `eval`."""

from __future__ import annotations

import torch
from torch import Tensor

from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.robustness import Model, Threat, is_wrong
from daft_domainbed.runtime.randomness import preserve_states


def list_autoattacks(n_classes: int) -> list[str]:
    """Return the attacks of AutoAttack's standard version; below four classes those that are defined there.

    The targeted difference-of-logits ratio needs four classes, so that a number below that is not "standard".
    """
    return ["apgd-ce", "apgd-t", "fab-t", "square"] if n_classes >= 4 else ["apgd-ce", "fab", "square"]


def check_autoattack() -> None:
    """Refuse to go on without AutoAttack's package.

    Raises:
        UsageError: Names the command that brings it.
    """
    try:
        import pyautoattack  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"AutoAttack needs an extra ({error}): pip install 'daft-domainbed[eval]', or choose --suite standard"
        ) from error


def run_autoattack(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, eps: float, seed: int
) -> tuple[Tensor, list[str]]:
    """Run AutoAttack (Croce and Hein, 2020), attack by attack on the examples that are left.

    Returns:
        Which examples withstood, [B], and the attacks that really ran: none runs once nothing is left.
    """
    from pyautoattack import AutoAttack

    stands = ~is_wrong(model, x, y)
    with torch.no_grad():
        n_classes = model(x[:1]).shape[1]
    suite = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[threat.norm], eps=eps, device=x.device, seed=seed)
    suite.apgd.loss = "ce"
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, n_classes - 1)
    engines = {"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "square": suite.square}
    ran = []
    for name in list_autoattacks(n_classes):
        if not stands.any():
            break
        engine = engines.get(name, suite.fab)
        suite.fab.targeted = name == "fab-t"
        engine.seed = seed
        with preserve_states():
            perturbed = engine.perturb(x[stands], y[stands])
        stands[stands.clone()] = ~is_wrong(model, perturbed, y[stands])
        ran.append(name)
    return stands, ran
