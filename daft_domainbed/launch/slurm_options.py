"""What Slurm is told of a sweep's jobs: the user's own options, and the defaults of those that are not given."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.launch.job import Job
from daft_domainbed.launch.options import Options

_DEFAULT_MINUTES = 240
_MOST_SECONDS_TO_SAVE = 300

_LISTS = ("setup", "teardown")
_SUBMITIT = (*_LISTS, "signal_delay_s", "array_parallelism")  # what submitit makes something of; the rest is sbatch's
_WHOLE_NUMBERS = ("cpus_per_task", "signal_delay_s", "array_parallelism")
_GPU_OPTIONS = ("gres", "gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket")
# What the launcher sets itself, and what would make something else of a job than one process in this folder.
_RESERVED = frozenset(
    [
        "array",
        "chdir",
        "dependency",
        "error",
        "help",
        "input",
        "no_requeue",
        "nodes",
        "ntasks",
        "ntasks_per_node",
        "open_mode",
        "output",
        "parsable",
        "requeue",
        "signal",
        "test_only",
        "usage",
        "version",
        "wait",
        "wrap",
    ]
)


def make_parameters(options: Options, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return submitit's parameters; those in `additional_parameters` are sbatch's own, which it passes on as they are.

    Raises:
        UsageError: An option is one that the launcher sets, or its value cannot be.
    """
    given = {_normalise(key): value for key, value in options.slurm.items()}
    if taken := next((key for key in given if key in _RESERVED), None):
        raise UsageError(f"--slurm {taken}={given[taken]}: that is set by the launcher itself; leave it out")
    parameters = {"requeue": True} | {key: _convert(key, value) for key, value in given.items()}
    own: dict[str, Any] = {}
    if "cpus_per_gpu" not in given:
        # From Slurm 22.05 on, srun does not know what sbatch was told.
        own["srun_args"] = [f"--cpus-per-task={parameters.setdefault('cpus_per_task', options.threads)}"]
    if not any(key in given for key in _GPU_OPTIONS) and any(job.args.device.startswith("cuda") for job in jobs):
        parameters["gpus_per_node"] = 1
    minutes = parameters.setdefault("time", _DEFAULT_MINUTES)
    parameters.setdefault("signal_delay_s", min(_MOST_SECONDS_TO_SAVE, 60 * minutes // 4))
    parameters.setdefault("array_parallelism", options.n_jobs or options.max_array_size)
    # Read by the libraries as torch is imported.
    parameters["setup"] = [f"export OMP_NUM_THREADS={options.threads}", *parameters.get("setup", [])]
    own |= {key: parameters.pop(key) for key in _SUBMITIT if key in parameters}
    return own | {"additional_parameters": parameters}


def _normalise(key: str) -> str:
    return key.lstrip("-").replace("-", "_").removeprefix("slurm_")


def _convert(key: str, value: str) -> Any:
    if not value:
        raise UsageError(f"--slurm {key}=: the value is missing, as in {key}=VALUE; a flag without one is {key}=true")
    if key == "time":
        return _parse_minutes(value)
    if key in _WHOLE_NUMBERS:
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--slurm {key}={value}: has to be a whole number from 1 on")
        return int(value)
    if key in _LISTS:
        return [value]
    return True if value.lower() == "true" else value


def _parse_minutes(text: str) -> int:
    """Return a time in any of Slurm's forms, in minutes.

    Example:
        >>> [_parse_minutes(text) for text in ("90", "90:30", "12:00:00", "2-0", "1-06:30", "1-06:30:30")]
        [90, 91, 720, 2880, 1830, 1831]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UsageError(
            f"--slurm time={text}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds; a job that "
            f"takes longer is requeued and goes on"
        )
    days, *parts = match.groups()
    is_long = days is not None or parts[2] is not None
    hours, minutes, seconds = parts if is_long else (None, *parts[:2])
    total = math.ceil(((int(days or 0) * 24 + int(hours or 0)) * 60) + int(minutes or 0) + int(seconds or 0) / 60)
    if not total:
        raise UsageError(f"--slurm time={text}: has to be a minute or more")
    return total
