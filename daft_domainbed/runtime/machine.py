"""What a run runs on: its versions and hardware, how many cores it may use, how memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daft_domainbed._version import __version__

if TYPE_CHECKING:
    import torch


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep the memory of a step's activations, which the next step would ask for again."""
    trim_threshold, mmap_threshold = -1, -3  # M_* of glibc's malloc.h; other libraries have no mallopt
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, 2**30)


@cache
def find_commit(file: Path) -> str | None:
    """Return the commit that a file belongs to, "+" after it where the working tree differs; None if there is none.

    It is asked once: what runs is the code as it was imported, whatever is committed meanwhile. A file that git does
    not know, such as one installed into an environment inside someone's repository, has none.
    """

    def ask(*command: str) -> str:
        git = ["git", "-C", str(file.parent), *command]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        ask("ls-files", "--error-unmatch", file.name)
        return ask("describe", "--always", "--exclude=*", "--dirty=+")
    return None


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """Return versions and hardware, for the first record of a run."""
    import numpy as np
    import torch
    import torchvision

    return {
        "daft_domainbed": __version__,
        "commit": find_commit(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
    }


def _name_processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
