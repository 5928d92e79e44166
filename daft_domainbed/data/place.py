"""Where a folder of images lies, and by which files it is known wherever that is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from daft_domainbed.arguments import SweepArgs, TrainArgs, find_data_path
from daft_domainbed.embedded.datasets import identify_folder
from daft_domainbed.errors import UsageError

Place = Mapping[str, str | None]  # `data_id` and `data_path`


def locate(args: TrainArgs) -> TrainArgs:
    """Return the arguments of a run with the place of its folder of images, and by which files that is known.

    Raises:
        UsageError: There is no such folder, or it is no data set.
    """
    if not args.dataset.startswith("folder:"):
        return args
    return replace(args, data_id=identify(args.dataset), data_path=_expand(args.dataset))


def identify(dataset: str) -> str:
    """Return by which files a `folder:PATH` is known.

    Raises:
        UsageError: There is no such folder, or it is no data set.
    """
    return identify_folder(_expand(dataset))


def settle_data(sweep: SweepArgs, begun: Mapping[str, Place]) -> SweepArgs:
    """Return a sweep whose folders of images have their places, and each the name under which it was begun.

    Args:
        sweep: As it was asked for; `data` has the places of what was not asked for now, but when it was begun.
        begun: What is known of the data sets of which the sweep has records already, by name.

    Raises:
        UsageError: A folder is no data set, or is not what the sweep was begun with; says what to do.
    """
    settled: dict[str, Place | None] = {}
    for asked in sweep.datasets:
        name, place = asked, None
        if asked.startswith("folder:"):
            name, place = _settle(asked, sweep.data.get(asked), begun, sweep.data_dir)
            same = [other for other, known in settled.items() if known and known["data_id"] == place["data_id"]]
            name = same[0] if same and place["data_id"] else name
        settled.setdefault(name, place)
    data = {name: dict(place) for name, place in settled.items() if place}
    return replace(sweep, datasets=list(settled), data=data)


def _settle(asked: str, stored: Place | None, begun: Mapping[str, Place], data_dir: str | None) -> tuple[str, Place]:
    """Return under which name a folder is known in a sweep, and its place."""
    path = stored and stored["data_path"] or _expand(asked)
    if asked in begun and (stored or begun[asked]["data_id"] is None or not os.path.isdir(path)):
        return asked, _find_again(asked, begun[asked], data_dir)
    place = {"data_id": identify(f"folder:{path}"), "data_path": path}
    for name, known in begun.items():
        if known["data_id"] == place["data_id"]:
            return name, place
    if asked in begun and begun[asked]["data_path"] == path:
        raise _explain(asked, f"{path} holds other files")
    return (f"folder:{path}" if asked in begun else asked), place


def _find_again(name: str, begun: Place, data_dir: str | None) -> Place:
    """Return where the data of a sweep lie now: where the user says, where they lay, or where their name says."""
    told = find_data_path({"dataset": name}, data_dir) if data_dir is not None else None
    paths = [path for path in (told, begun["data_path"], _expand(name)) if path and os.path.isdir(path)]
    if begun["data_id"] is None:  # of before files were known
        return {"data_id": None, "data_path": paths[0] if paths else _expand(name)}
    for path in paths:
        if _try_to_identify(path) == begun["data_id"]:
            return {"data_id": begun["data_id"], "data_path": path}
    raise _explain(name, f"{paths[0]} holds other files" if paths else f"there is no {begun['data_path']} any more")


def _explain(name: str, why: str) -> UsageError:
    return UsageError(
        f"the data of {name} are not those that the sweep was begun with ({why}): bring them back, or say where "
        "they lie now with --data_dir or --datasets folder:NEW"
    )


def _try_to_identify(path: str) -> str | None:
    try:
        return identify_folder(path)
    except (UsageError, OSError):
        return None


def _expand(name: str) -> str:
    return str(Path(name.removeprefix("folder:")).expanduser().absolute())
