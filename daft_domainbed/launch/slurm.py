"""Hand a plan over to Slurm through submitit: arrays of jobs that wait for each other, requeued where cut short."""

from __future__ import annotations

import io
import json
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

from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.launch.job import Job, group_by_depth, name_job
from daft_domainbed.launch.options import Options
from daft_domainbed.launch.schedule import Observer
from daft_domainbed.launch.slurm_options import make_parameters
from daft_domainbed.launch.states import forget_failures, is_done
from daft_domainbed.runtime import files, locks, stopping
from daft_domainbed.runtime.layout import QUEUE_FILE, SLURM_FOLDER
from daft_domainbed.runtime.locks import acquire

SCHEMA = 1

# A job goes on where it was each time; the end of it is for one that never gets anywhere.
MOST_TIMEOUTS = 100


@dataclass(frozen=True)
class Submission:
    """One array in the queue.

    Attributes:
        job_id: Its number.
        stage: What its jobs are for.
        folders: Those of its jobs, in the order of its elements; a single one is a job without elements.
    """

    job_id: str
    stage: str
    folders: list[str]


def submit_slurm(root: Path, jobs: Sequence[Job], options: Options, observer: Observer) -> dict[str, str] | None:
    """Submit what is neither done nor in the queue already, and return None at once; no failures where all is done.

    Args:
        root: The sweep's folder, at the same path on every node.
        jobs: The plan, teachers before students.
        options: Where and how many at a time; Slurm's own are under `slurm`.
        observer: Not needed: nothing is run here.

    Raises:
        UsageError: There is no Slurm or no submitit here, or sbatch refuses an option.
        RunError: Slurm refuses the jobs; what it took before goes on.
        Stopped: By a signal; what was submitted goes on.
    """
    _check_programs()
    parameters = make_parameters(options, jobs)
    root = root.resolve()
    open_jobs = [job for job in jobs if not is_done(root / job.folder)]
    if not open_jobs:
        return {}
    folder = root / SLURM_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with acquire(folder, wait=True), _without_surrounding_job():
        _submit_all(root, open_jobs, options, parameters)
    _say(f"'daft-domainbed sweep status --output_dir {root}' shows how they do; their logs are in {folder}")
    return None


def list_queued(root: Path) -> dict[str, str]:
    """Return the jobs of a sweep that are waiting or running in Slurm's queue: their ids by folder.

    Raises:
        RunError: Slurm does not answer.
    """
    submissions = _read_submissions(root)
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
        job: One of its plan.
        threads: How many the job computes with.
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


def _submit_all(root: Path, jobs: Sequence[Job], options: Options, parameters: Mapping[str, Any]) -> None:
    """Submit a stage at a time, in arrays whose jobs wait for the same arrays of the stages before."""
    queued = list_queued(root)
    if queued:
        _say(f"{len(queued)} jobs are in Slurm's queue already")
    arrays = {folder: name.partition("_")[0] for folder, name in queued.items()}
    for stage in group_by_depth(jobs):
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in stage:
            if job.folder not in queued:
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

    stage, what = jobs[0].stage, f"{len(jobs)} {name_job(jobs[0])}{'s' if len(jobs) > 1 else ''}"
    folder = root / SLURM_FOLDER
    executor = SlurmExecutor(folder, max_num_timeout=MOST_TIMEOUTS)
    # Whatever becomes of the teachers: a job marks itself as failed where its teacher has, and trains a missing one.
    waits = {"dependency": f"afterany:{':'.join(after)}"} if after else {}
    executor.update_parameters(**{"job_name": f"daft-{stage}", **parameters, **waits})
    forget_failures(root, jobs)
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            submitted = executor.submit_array([Element(root, job, threads) for job in jobs])
    except (FailedJobError, FailedSubmissionError) as error:
        raise _explain(what, error) from error
    finally:
        for leftover in (*folder.glob(".submission_file_*.sh"), *folder.glob("[0-9a-f]" * 32 + ".pkl")):
            leftover.unlink()
    job_id = submitted[0].job_id.partition("_")[0]
    submissions = [*_read_submissions(root), Submission(job_id, stage, [job.folder for job in jobs])]
    content = {"schema": SCHEMA, "submissions": [asdict(submission) for submission in submissions]}
    files.write_text(root / QUEUE_FILE, json.dumps(content, indent=1) + "\n")
    _say(f"submitted {what} as Slurm job {job_id}" + (f", after {' and '.join(after)}" if after else ""))
    return job_id


def _explain(what: str, error: Exception) -> Exception:
    """Return what to raise where sbatch has refused: the options themselves, or the jobs that it was to submit."""
    text = str(error)
    if "_establish_config_source" in text or "ontact slurm controller" in text:
        return UsageError(
            "--command_launcher slurm: no Slurm controller answers here; launch on a login node of the cluster, or "
            "use local"
        )
    is_sbatch = isinstance(error.__cause__, subprocess.CalledProcessError)
    if is_sbatch and "Batch job submission failed" not in text:  # which it says of all that it has understood
        return UsageError(f"--slurm: sbatch refuses the options: {_join(text)}; 'sbatch --help' lists those it has")
    hint = "; --max_array_size has to be below the cluster's MaxArraySize" if "array" in text.lower() else ""
    return RunError(f"Slurm refuses {what}: {_join(text)}{hint}")


def _read_submissions(root: Path) -> list[Submission]:
    path = root / QUEUE_FILE
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
    lines = (re.sub(r"^(sbatch|squeue): ((error|fatal): )?", "", line.strip()) for line in text.splitlines())
    return " ".join(line for line in lines if line and not line.startswith("Try ")) or "it gives no reason"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
