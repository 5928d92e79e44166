"""DomainBed's published accuracies of ERM beside a user's: is the set-up right?"""

from __future__ import annotations

from daft_domainbed.errors import UsageError
from daft_domainbed.methods import PLAIN
from daft_domainbed.results.asked import LEAVE_OUT
from daft_domainbed.results.cells import Row, Table
from daft_domainbed.results.statistics import standard_error
from daft_domainbed.results.tables import Results

# Percent, training-domain validation, mean over held-out domains (Gulrajani and Lopez-Paz, 2021, arXiv 2007.01434, as
# DomainBed's tables have it today): ResNet-50, 5,000 steps (10,000 on DomainNet), 3 trials of 20 random draws; for
# the two MNIST sets a small network.
PUBLISHED = {
    "ColoredMNIST": 51.5,
    "RotatedMNIST": 98.0,
    "VLCS": 77.5,
    "PACS": 85.5,
    "OfficeHome": 66.5,
    "TerraIncognita": 46.1,
    "DomainNet": 40.9,
}
_SMALL = ("ColoredMNIST", "RotatedMNIST")
_NETWORKS = ("default", "resnet50")


def format_published(results: Results) -> str:
    """Return a line for each data set whose ERM has a published accuracy, and what else differs from it.

    Raises:
        UsageError: There is none with ERM's accuracy on every held-out domain.
    """
    tables = [table for table in results.tables if table.selection == "training-domain"]
    lines = [line for table in tables for row in table.rows if (line := _format(table, row))]
    if not lines:
        raise UsageError(
            f"--published: no {PLAIN} of {', '.join(PUBLISHED)} with every held-out domain in this sweep: nothing is "
            f"published of others"
        )
    lines.append(
        "  DomainBed, arXiv 2007.01434: 5,000 steps, 3 trials of 20 random draws; a rerun differs by up to a point"
    )
    return "\n".join(lines) + "\n"


def _format(table: Table, row: Row) -> str | None:
    is_plain = (row.role, row.algorithm) == ("student", PLAIN)
    is_whole = table.kind == LEAVE_OUT and {*table.held_out} == {*table.environments}
    if not is_plain or row.average is None or table.dataset not in PUBLISHED or not is_whole:
        return None
    trials = [number for cell in row.cells for number in cell.numbers]
    seeds = sorted({number.choice.run.key.trial_seed for number in trials})
    by_trial = [[number.accuracy for number in trials if number.choice.run.key.trial_seed == seed] for seed in seeds]
    means = [sum(values) / len(values) for values in by_trial if len(values) == len(row.cells)]
    error = standard_error(means)
    theirs = PUBLISHED[table.dataset]
    yours = f"{row.average:.1f}" + ("" if error is None else f" +- {error:.1f}")
    networks = sorted({str(number.choice.run.hparams.get("backbone", "default")) for number in trials})
    is_other = table.dataset not in _SMALL and any(name not in _NETWORKS for name in networks)
    network = f"; yours is {', '.join(networks)}, theirs ResNet-50" if is_other else ""
    return (
        f"{table.dataset}, {row.name}, training-domain validation: yours {yours} (n = {len(seeds)} trials), published "
        f"{theirs:.1f}: {row.average - theirs:+.1f}{network}{''.join(f'; rests on {text}' for text in row.origins)}"
    )
