"""Which domains a sweep was asked to hold out: what its tables show, and what their averages are means over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAVE_OUT, SINGLE_SOURCE = "leave-out", "single-source"

Held = tuple[int, ...]  # domains that a run holds out, ascending


@dataclass(frozen=True)
class Asked:
    """What was asked of a data set.

    Attributes:
        kind: "leave-out", or "single-source" where each run trains on one domain and is judged on every other.
        held_out: The domains that averages are means over.
        cells: Which runs a cell shows, by source (None but of single sources) and domain.
        has_pairs: Whether runs with pairs of domains may validate those with a single one.
    """

    kind: str
    held_out: Held
    cells: dict[tuple[int | None, int], Held]
    has_pairs: bool = False

    @property
    def sources(self) -> list[int | None]:
        """The domains that rows are of; None where they are of none."""
        return list(dict.fromkeys(source for source, _ in self.cells))


def find_asked(kind: str, sets: Iterable[Held], n_envs: int, validation: Iterable[Held] = ()) -> Asked:
    """Return what sets of held-out domains ask for, in the order in which they were asked.

    A domain's cell shows the runs that hold out the fewest others beside it: a pair is validation alone where each of
    its domains is held out alone, too.

    Args:
        kind: "leave-out" or "single-source".
        sets: What runs hold out.
        n_envs: How many domains there are.
        validation: Pairs that nothing else is asked of.

    Example:
        >>> find_asked("leave-out", [(2,), (0, 1)], 4).held_out
        (2, 0, 1)
        >>> find_asked("leave-out", [(0,), (0, 1), (1,)], 3).cells
        {(None, 0): (0,), (None, 1): (1,)}
        >>> find_asked("single-source", [(1, 2), (0, 2)], 3).cells
        {(0, 1): (1, 2), (0, 2): (1, 2), (1, 0): (0, 2), (1, 2): (0, 2)}
    """
    sets = list(dict.fromkeys(sets))
    order = tuple(dict.fromkeys(env for held_out in sets for env in held_out))
    cells: dict[tuple[int | None, int], Held] = {}
    if kind == SINGLE_SOURCE:
        for held_out in sets:
            (source,) = set(range(n_envs)) - set(held_out)
            cells |= {(source, env): held_out for env in held_out}
        return Asked(kind, tuple(sorted(order)), dict(sorted(cells.items())))
    for held_out in sorted(sets, key=len):
        for env in held_out:
            cells.setdefault((None, env), held_out)
    paired = {frozenset(held_out) for held_out in [*sets, *validation] if len(held_out) == 2}
    singles = [env for (_, env), held_out in cells.items() if len(held_out) == 1]
    has_pairs = any(all({env, other} in paired for other in range(n_envs) if other != env) for env in singles)
    return Asked(kind, order, {key: cells[key] for key in sorted(cells, key=lambda key: key[1])}, has_pairs)


def guess_kind(held_out: Held, n_envs: int, others: Sequence[Held]) -> str:
    """Return of which kind a run is that no plan says anything of.

    Args:
        held_out: The domains that it holds out.
        n_envs: How many there are.
        others: What other runs of its data set hold out: of three domains a pair is DomainBed's cross-validation, where
            single ones are held out, too.
    """
    is_pair = n_envs == 3 and any(len(other) == 1 for other in others)
    return SINGLE_SOURCE if n_envs > 2 and len(held_out) == n_envs - 1 and not is_pair else LEAVE_OUT
