"""How data sets are called in tables: folders of images by name, by more of their paths where two share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from daft_domainbed.results.values import show_name

_FOLDER = "folder:"


def identify_dataset(args: Mapping[str, Any]) -> str:
    """Return what tells a run's data set from others: its files where it is a folder that says so, else its name."""
    data_id = args.get("data_id")
    return f"{_FOLDER}{data_id}" if isinstance(data_id, str) and data_id else str(args["dataset"])


def label_datasets(runs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the label of each data set, by `identify_dataset`.

    Args:
        runs: Arguments of runs; of one data set the first counts.

    Example:
        >>> label_datasets([{"dataset": "PACS"}, {"dataset": "folder:/data/birds/"}])
        {'PACS': 'PACS', 'folder:/data/birds/': 'folder:birds'}
        >>> list(label_datasets([{"dataset": "folder:a/birds"}, {"dataset": "folder:b/birds"}]).values())
        ['folder:a/birds', 'folder:b/birds']
    """
    first: dict[str, Mapping[str, Any]] = {}
    for args in runs:
        first.setdefault(identify_dataset(args), args)
    labels = {key: show_name(str(args["dataset"])) for key, args in first.items()}
    folders = {key: args for key, args in first.items() if str(args["dataset"]).startswith(_FOLDER)}
    names = [args["dataset"] for args in folders.values()]
    parts = {
        key: PurePosixPath(_get_path(args, is_unique=names.count(args["dataset"]) == 1)).parts
        for key, args in folders.items()
    }
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        n = next((n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others)), len(own))
        label = _FOLDER + "/".join(own[-n:]).replace("//", "/")
        is_alone = all(other != own for other in others)
        labels[key] = show_name(label if is_alone else f"{label} ({key.removeprefix(_FOLDER)[:8]})")
    return labels


def _get_path(args: Mapping[str, Any], *, is_unique: bool) -> str:
    """Return a folder's path as it was typed, which stays when it is moved; where it lay, if that is not enough."""
    path = args.get("data_path")
    return path if isinstance(path, str) and not is_unique else args["dataset"].removeprefix(_FOLDER)
