"""Where it is measured: the clone of DomainBed that is compared with, the machine, and its load."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.machine import count_cores, find_commit


def copy_clone(scratch: Path) -> Path | None:
    """Copy the package of the clone at DOMAINBED_ROOT, which itself stays byte for byte as it is; None without one.

    Raises:
        UsageError: There is no clone at DOMAINBED_ROOT.
    """
    root = os.environ.get("DOMAINBED_ROOT")
    if not root:
        return None
    if not Path(root, "domainbed", "scripts", "train.py").is_file():
        raise UsageError(f"DOMAINBED_ROOT is {root}, which is no clone of DomainBed: unset it, or name one")
    target = scratch / "clone"
    shutil.copytree(Path(root, "domainbed"), target / "domainbed", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def describe_place() -> dict[str, Any]:
    """Return the clone's commit, memory and load: what `machine.describe_machine` does not say."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host_commit": find_commit(Path(root, "README.md")) if (root := os.environ.get("DOMAINBED_ROOT")) else None,
        "node": platform.node(),
        "cores_usable": count_cores(),
        "memory_gib": round(memory, 1),
        "load": get_load(),
    }


def get_load() -> float:
    """Return how many processes wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 2)
