"""How large are the networks of a run: its own, and its teachers'?"""

from __future__ import annotations

from collections.abc import Callable

from daft_domainbed.host.sizes import measure_network
from daft_domainbed.methods import list_slots
from daft_domainbed.runtime.sizes import compare_sizes
from daft_domainbed.teachers.facts import RunFacts


def measure_networks(facts: RunFacts, note: Callable[[str], None]) -> dict[str, dict[str, int]]:
    """Return how large the run's own network is, "", and those of its teachers are, by slot.

    Args:
        facts: Of the run, with its teachers.
        note: Told of a student that is not the smaller one.
    """
    algorithm, shape = facts.args.algorithm, (facts.input_shape, facts.num_classes)
    sizes = {"": measure_network(facts.host, algorithm, facts.hparams, *shape)}
    for slot in list_slots(algorithm, facts.hparams):
        teacher = facts.teachers[slot.prefix]
        if teacher.facts["algorithm"]:
            sizes[slot.prefix] = measure_network(facts.host, teacher.facts["algorithm"], teacher.hparams, *shape)
            note("" if slot.starts else compare_sizes(algorithm, sizes[""], sizes[slot.prefix]))
    return sizes
