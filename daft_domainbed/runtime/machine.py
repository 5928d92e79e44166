"""What a run runs on: its versions and hardware, how many cores it may use, how memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daft_domainbed._version import __version__
from daft_domainbed.errors import UsageError

if TYPE_CHECKING:
    import torch


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible here; use cpu or auto")
    return device


def measure_peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in MB: the device's own, or the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def share_free_memory(least: int = 2**28) -> int:
    """Return the bytes that a job may keep of what could be computed again: half of a core's share of what is free.

    Args:
        least: What it may keep on any machine, and where nobody says what is free.
    """
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(least, min(limits, default=0) // (2 * count_cores()))


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
