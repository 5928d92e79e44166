"""Hand a plan over to Slurm through submitit: arrays of jobs that wait for each other, requeued where cut short."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from daft_domainbed import checkpoints, locks, stopping
from daft_domainbed.errors import RunError, UsageError, suggest
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.plan import STAGES, Job
from daft_domainbed.launch.progress import STAGE_NAMES
from daft_domainbed.launch.schedule import Observer
from daft_domainbed.launch.states import FAILED_FILE, is_done
from daft_domainbed.run_folder import own

FOLDER = "slurm"
JOBS_FILE = "jobs.json"
SCHEMA = 1

_DEFAULT_MINUTES = 240
_MOST_SECONDS_TO_SAVE = 300
# A job goes on where it was each time; the end of it is for one that never gets anywhere.
_MOST_TIMEOUTS = 100

_WHOLE_NUMBERS = ("cpus_per_task", "signal_delay_s", "array_parallelism")
_LISTS = ("setup", "teardown")
_GPU_OPTIONS = ("gres", "gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket")
# What the launcher sets itself, and what would make something else of a job than one process in this folder.
_OURS = (
    *(
        "additional_parameters",
        "array",
        "chdir",
        "dependency",
        "error",
        "help",
        "input",
        "no_requeue",
        "nodes",
        "ntasks",
    ),
    *("ntasks_per_node", "num_gpus", "open_mode", "output", "parsable", "requeue", "signal", "srun_args", "test_only"),
    *("stderr_to_stdout", "usage", "use_srun", "version", "wait", "wrap"),
)


@dataclass(frozen=True)
class Submission:
    """One array in the queue.

    Attributes:
        job_id: Its number.
        stage: Of its jobs.
        folders: Of its jobs, in the order of its elements; a single one is a job without elements.
    """

    job_id: str
    stage: str
    folders: list[str]


def submit_slurm(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str] | None:
    """Submit what is neither done nor in the queue already, and return None at once; no failures where all is done.

    Args:
        root: The sweep's folder, at the same path on every node.
        jobs: The plan, teachers before students.
        options: With Slurm's own under `slurm`.
        observer: Not needed: nothing is run here.

    Raises:
        UsageError: There is no Slurm or no submitit here, or one of Slurm's options cannot be.
        RunError: Slurm refuses the jobs; what it took before goes on.
        Stopped: By a signal; what was submitted goes on.
    """
    _check_programs()
    parameters = _make_parameters(options, jobs)
    root = root.resolve()
    open_jobs = [job for job in jobs if not is_done(root / job.folder)]
    if not open_jobs:
        return {}
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with own(folder, wait=True), _without_surrounding_job():
        _submit_all(root, open_jobs, options, parameters)
    _say(f"'daft-domainbed sweep status --output_dir {root}' shows how they do; their logs are in {folder}")
    return None


def list_queued(root: Path) -> dict[str, str]:
    """Return the jobs of a sweep that are waiting or running in Slurm's queue: their ids by folder.

    Raises:
        RunError: Slurm does not answer.
    """
    submissions = _read_submissions(root / FOLDER)
    if not submissions:
        return {}
    ids = ",".join(submission.job_id for submission in submissions)
    answer = _call("squeue", "--noheader", "--array", "--format=%i", "--jobs", ids)
    if answer.returncode and "Invalid job id" not in answer.stderr:  # which it says of a job that it has forgotten
        raise RunError(f"squeue cannot say what is in the queue: {_join(answer.stderr)}")
    folders = {
        f"{submission.job_id}_{i}" if len(submission.folders) > 1 else submission.job_id: folder
        for submission in submissions
        for i, folder in enumerate(submission.folders)
    }
    return {folders[name]: name for name in answer.stdout.split() if name in folders}


class Element:
    """What one element of an array does, in a Python of its own: one job.

    Args:
        root: The sweep's folder.
        job: Of its plan.
        threads: Of the job.
    """

    def __init__(self, root: Path, job: Job, threads: int) -> None:
        self.root, self.job, self.threads = root, job, threads

    def __call__(self) -> None:
        """Do the job; where it is stopped before it is done, have Slurm start it again."""
        from submitit import JobEnvironment

        from daft_domainbed.launch.work import do_job

        environment = JobEnvironment()
        number = getattr(signal, f"SIG{environment.USR_SIG}")
        hand_over: Any = signal.getsignal(number)  # submitit's own, which requeues
        for each in (number, signal.SIGTERM):
            signal.signal(each, _ask_to_stop)
        outcome = do_job(self.root, self.job, threads=self.threads)
        if os.environ.get("SLURM_RESTART_COUNT"):  # who is at work may be what this job was on a lost node
            deadline = time.monotonic() + 2 * locks.SECONDS_UNTIL_DEAD
            while outcome.kind == "busy" and time.monotonic() < deadline:
                time.sleep(1)
                outcome = do_job(self.root, self.job, threads=self.threads)
        print(f"{self.job.folder}: {outcome.kind}. {outcome.reason}", flush=True)
        if outcome.kind == "stopped":
            if _is_wanted(environment.job_id):
                hand_over(number, None)
            sys.exit(128 + signal.SIGTERM)
        if outcome.kind == "failed":
            sys.exit(RunError.exit_status)

    def checkpoint(self) -> Any:
        """Return what submitit starts next time: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _ask_to_stop(number: int, frame: FrameType | None) -> None:
    # Unlike a person, Slurm sends the same signal several times and means no more by it.
    stopping.request(number)


def _is_wanted(job_id: str) -> bool:
    """Return whether Slurm still counts a job as running, so that its end is not what somebody has asked for.

    A job that is warned before its time is up, or before another takes its place, is running; one that was cancelled,
    or that Slurm requeues by itself, is not. To requeue a cancelled one would bring it back to life.
    """
    answer = _call("squeue", "--noheader", "--format=%T", "--jobs", job_id)
    return answer.stdout.split() == ["RUNNING"]


def _check_programs() -> None:
    for program in ("sbatch", "squeue", "srun"):
        if shutil.which(program) is None:
            raise UsageError(
                f"--command_launcher slurm: there is no {program} here; launch where Slurm's commands are, on a login "
                f"node of the cluster"
            )
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UsageError("--command_launcher slurm needs submitit: pip install 'daft-domainbed[slurm]'") from error


def _make_parameters(options: Options, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return submitit's parameters, with what it does not know under `additional_parameters`.

    Raises:
        UsageError: An option is unknown, or not what the user can set, or its value cannot be.
    """
    from submitit import SlurmExecutor

    given = {_normalise(key): value for key, value in options.slurm.items()}
    if taken := next((key for key in given if key in _OURS), None):
        raise UsageError(f"--slurm {taken}={given[taken]}: that is set by the launcher itself; leave it out")
    known = SlurmExecutor._valid_parameters()
    more = {key: value for key, value in given.items() if key not in known}
    if more:
        _check_known(more, known)
    parameters = {key: _convert(key, value) for key, value in given.items() if key in known}
    if "cpus_per_gpu" not in given:
        parameters.setdefault("cpus_per_task", options.threads)
        # From Slurm 22.05 on, srun does not know what sbatch was told.
        parameters["srun_args"] = [f"--cpus-per-task={parameters['cpus_per_task']}"]
    if not any(key in given for key in _GPU_OPTIONS) and any(job.args.device.startswith("cuda") for job in jobs):
        parameters["gpus_per_node"] = 1
    minutes = parameters.setdefault("time", _DEFAULT_MINUTES)
    parameters.setdefault("signal_delay_s", min(_MOST_SECONDS_TO_SAVE, 60 * minutes // 4))
    parameters.setdefault("array_parallelism", options.n_jobs or options.max_array_size)
    # Read by the libraries as torch is imported.
    parameters["setup"] = [f"export OMP_NUM_THREADS={options.threads}", *parameters.get("setup", [])]
    parameters["additional_parameters"] = {"requeue": True} | {key: _convert(key, value) for key, value in more.items()}
    return parameters


def _normalise(key: str) -> str:
    return key.lstrip("-").replace("-", "_").removeprefix("slurm_")


def _check_known(given: Mapping[str, str], known: set[str]) -> None:
    answer = _call("sbatch", "--help")
    if answer.returncode:
        raise UsageError(f"--slurm: sbatch cannot say which options it has: {_join(answer.stderr)}")
    options = {_normalise(name) for name in re.findall(r"(?m)^\s+(?:-\w,? +)?(--[a-z][a-z-]*)", answer.stdout)}
    for key, value in given.items():
        if key not in options:
            raise UsageError(
                f"--slurm {key}={value}: neither sbatch nor submitit has such an option."
                f"{suggest(key, sorted((options | known).difference(_OURS)))}"
            )


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


def _submit_all(root: Path, jobs: Sequence[Job], options: Options, parameters: Mapping[str, Any]) -> None:
    """Submit a stage at a time, in arrays whose jobs wait for the same arrays of the stages before."""
    queued = list_queued(root)
    if queued:
        _say(f"{len(queued)} jobs are in Slurm's queue already")
    arrays = {folder: name.partition("_")[0] for folder, name in queued.items()}
    for stage in STAGES:
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in jobs:
            if job.stage == stage and job.folder not in queued:
                groups.setdefault(tuple(sorted({arrays[need] for need in job.needs if need in arrays})), []).append(job)
        for after, group in groups.items():
            for start in range(0, len(group), options.max_array_size):
                if stopping.is_requested():
                    raise stopping.Stopped("what was submitted goes on; the same command submits the rest")
                chunk = group[start : start + options.max_array_size]
                job_id = _submit(root, chunk, after, options.threads, parameters)
                arrays |= {job.folder: job_id for job in chunk}


def _submit(root: Path, jobs: Sequence[Job], after: Sequence[str], threads: int, parameters: Mapping[str, Any]) -> str:
    """Submit one array, take note of it, and return its number."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    stage, what = jobs[0].stage, f"{len(jobs)} {STAGE_NAMES[jobs[0].stage]}{'s' if len(jobs) > 1 else ''}"
    folder = root / FOLDER
    executor = SlurmExecutor(folder, max_num_timeout=_MOST_TIMEOUTS)
    # Whatever becomes of the teachers: a job marks itself as failed where its teacher has, and trains a missing one.
    waits = {"dependency": f"afterany:{':'.join(after)}"} if after else {}
    executor.update_parameters(**{"job_name": f"daft-{stage}", **parameters, **waits})
    for job in jobs:
        if not locks.is_claimed(root / job.folder):  # tried again
            (root / job.folder / FAILED_FILE).unlink(missing_ok=True)
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            submitted = executor.submit_array([Element(root, job, threads) for job in jobs])
    except (FailedJobError, FailedSubmissionError) as error:
        if "_establish_config_source" in str(error) or "ontact slurm controller" in str(error):
            raise UsageError(
                "--command_launcher slurm: no Slurm controller answers here; launch on a login node of the cluster, or "
                "use local"
            ) from error
        hint = "; --max_array_size has to be below the cluster's MaxArraySize" if "array" in str(error).lower() else ""
        raise RunError(f"Slurm refuses {what}: {_join(str(error))}{hint}") from error
    finally:
        for leftover in (*folder.glob(".submission_file_*.sh"), *folder.glob("[0-9a-f]" * 32 + ".pkl")):
            leftover.unlink()
    job_id = submitted[0].job_id.partition("_")[0]
    submissions = [*_read_submissions(folder), Submission(job_id, stage, [job.folder for job in jobs])]
    content = {"schema": SCHEMA, "submissions": [asdict(submission) for submission in submissions]}
    checkpoints.write_text(folder / JOBS_FILE, json.dumps(content, indent=1) + "\n")
    _say(f"submitted {what} as Slurm job {job_id}" + (f", after {' and '.join(after)}" if after else ""))
    return job_id


def _read_submissions(folder: Path) -> list[Submission]:
    path = folder / JOBS_FILE
    if not path.is_file():
        return []
    try:
        return [Submission(**entry) for entry in json.loads(path.read_text())["submissions"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no list of Slurm jobs ({error}): delete it, and the sweep's jobs first") from error


@contextmanager
def _without_surrounding_job() -> Iterator[None]:
    """Hide what the job around this process was given, where there is one: srun would take it for the new job's."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        names = [name for name in os.environ if name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF"]
        hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= hidden


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _join(text: str) -> str:
    """Return what one of Slurm's commands complains of, in one line."""
    lines = (re.sub(r"^(sbatch|squeue): (error|fatal): ", "", line.strip()) for line in text.splitlines())
    return " ".join(filter(None, lines)) or "it gives no reason"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
