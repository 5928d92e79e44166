"""Which domains are held out: all, some, or all but one, as words say."""

from __future__ import annotations

from collections.abc import Sequence

from daft_domainbed.arguments import SweepArgs
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.host.contract import describe_dataset, find_host
from daft_domainbed.plugin.registration import register


def find_env(word: str, environments: Sequence[str], dataset: str) -> int:
    """Return the position of a domain: a whole number is one where there is such a position, else a name.

    "01" is no number where a domain is called so.

    Raises:
        UsageError: There is no such domain.

    Example:
        >>> [find_env(word, ["L38", "3", "0"], "traps") for word in ("0", "3", "L38")]
        [0, 1, 0]
        >>> [find_env(word, ["01", "02", "03"], "days") for word in ("1", "01")]
        [1, 0]
    """
    is_position = word.isdecimal() and int(word) < len(environments)
    if word in environments and not (is_position and word == str(int(word))):
        return list(environments).index(word)
    if is_position:
        return int(word)
    raise UsageError(
        f"--test_envs {word!r}: {dataset} has {len(environments)} environments, numbered 0 to {len(environments) - 1}: "
        f"{', '.join(environments)}.{suggest(word, environments)}"
    )


def find_test_envs(words: Sequence[str], dataset: str, host: str) -> list[int]:
    """Return the positions of the domains that a run holds out, all of which its words name.

    Raises:
        UsageError: There is no such data set, or no such domain.
    """
    found = find_host(host)
    register(found)
    environments = describe_dataset(found, dataset, {}).environments
    return [find_env(word, environments, dataset) for word in words]


def find_set(word: str, environments: Sequence[str], dataset: str) -> list[int]:
    """Return the positions of the domains that one word names, ascending; a domain's name may hold commas itself.

    Raises:
        UsageError: One does not exist, or is named twice.
    """
    members = [word] if word in environments else word.split(",")
    envs = [find_env(member.strip(), environments, dataset) for member in members]
    if len({*envs}) < len(envs):
        raise UsageError(f"--test_envs {word}: an environment is named twice")
    return sorted(envs)


def list_test_envs(sweep: SweepArgs, environments: Sequence[str], dataset: str) -> list[list[int]]:
    """Return the sets of domains that a sweep holds out of a data set.

    Args:
        sweep: Says which.
        environments: Names of the data set's domains.
        dataset: Its name.

    Raises:
        UsageError: A word names no domain, or flags contradict each other.

    Example:
        >>> list_test_envs(SweepArgs(["D"], ["ERM"], "out", single_source=True), ["a", "b", "c"], "D")
        [[1, 2], [0, 2], [0, 1]]
    """
    numbers = range(len(environments))
    if sweep.test_envs is not None:
        sets = [find_set(word, environments, dataset) for word in sweep.test_envs]
        return [envs for i, envs in enumerate(sets) if envs not in sets[:i]]
    if sweep.single_source:
        return [[env for env in numbers if env != source] for source in numbers]
    combinations = []
    for i in numbers:
        combinations.append([i])
        # A pair has to leave something to train on.
        is_single = sweep.single_test_envs or len(environments) < 3
        combinations += [] if is_single else [[i, j] for j in numbers if j > i]
    return combinations


def check_flags(sweep: SweepArgs) -> None:
    """Refuse flags that say different things of which domains are held out.

    Raises:
        UsageError: Names two of them.
    """
    given = [
        flag
        for flag, value in (
            ("--test_envs", sweep.test_envs is not None),
            ("--single_test_envs", sweep.single_test_envs),
            ("--single_source", sweep.single_source),
        )
        if value
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} say different things of which domains are held out: give one of them")
