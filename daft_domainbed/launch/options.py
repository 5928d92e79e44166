"""How a sweep is launched, which has no influence on its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """The flags of `sweep launch` that say where and how many at a time.

    Attributes:
        n_jobs: Jobs at a time; None leaves it to the launcher.
        threads: Threads of each job; fixed, so that numbers do not depend on how many run at a time.
        slurm: Slurm's own options, such as partition or time.
        max_array_size: The most jobs in one Slurm job array.
        ray_address: The address of a running Ray cluster; None starts one on this machine.
    """

    n_jobs: int | None = None
    threads: int = 1
    slurm: Mapping[str, str] = field(default_factory=dict)
    max_array_size: int = 1000
    ray_address: str | None = None
