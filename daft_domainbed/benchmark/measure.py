"""How a row is measured: programs from start to end and loops a few steps at a time, each in its turn.

Nothing here imports torch: what is measured runs in processes of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO, Any, Literal

from daft_domainbed.benchmark.sizes import Size
from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.machine import count_cores, find_commit

Column = Literal["ours", "host", "bare"]
COLUMNS: tuple[Column, ...] = ("ours", "host", "bare")

Play = Callable[[], Mapping[str, float]]  # does the work once; values by metric
Contest = Mapping[Column, Play]
Contests = Generator[Contest, None, None]

_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Goal:
    """What is measured, and what is to be reached.

    Attributes:
        metric: As plays call it.
        unit: Of its values.
        against: The column that ours is divided by; None judges ours itself, or nothing.
        limit: Of the ratio, or of ours; None: there is no goal, it is reported.
        at_least: The limit is a lower one.
    """

    metric: str
    unit: str
    against: Column | None = None
    limit: float | None = None
    at_least: bool = False

    def __str__(self) -> str:
        if self.limit is None:
            return "reported"
        sign, value = (
            (">=" if self.at_least else "<="),
            f"{self.limit:,.3g}" if self.limit < 1000 else f"{self.limit:,.0f}",
        )
        return f"{sign} {value} x {self.against}" if self.against else f"{sign} {value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Case:
    """A piece of work that several ways of doing it are compared on.

    Attributes:
        name: As given to `--only`.
        about: One line.
        bare: What stands in the column of the limit.
        goals: A row of the table each.
        contests: Yields what is to be played in turns; whatever it opens is closed when it goes on.
    """

    name: str
    about: str
    bare: str
    goals: tuple[Goal, ...]
    contests: Callable[[Bench], Contests]


def play(contests: Contests, repeat: int) -> dict[str, dict[Column, list[float]]]:
    """Play every contest so many rounds, the columns in turns, and return the values by metric and column."""
    values: dict[str, dict[Column, list[float]]] = defaultdict(lambda: defaultdict(list))
    with closing(contests):
        for contest in contests:
            for i in range(repeat):
                turns = list(contest.items())
                for column, do in turns if i % 2 == 0 else reversed(turns):  # nobody always comes second
                    for metric, value in do().items():
                        values[metric][column].append(value)
    return values


def make_row(case: Case, goal: Goal, values: Mapping[Column, list[float]]) -> dict[str, Any]:
    """Return a row of the table: medians, their ratio, and whether the goal was met (None where nothing says)."""
    medians: dict[str, float | None] = {
        column: statistics.median(values[column]) if values.get(column) else None for column in COLUMNS
    }
    ours, other = medians["ours"], medians[goal.against] if goal.against else None
    ratio = ours / other if ours is not None and other else None
    judged = ratio if goal.against else ours
    is_met = None
    if judged is not None and goal.limit is not None:
        is_met = judged >= goal.limit if goal.at_least else judged <= goal.limit
    row: dict[str, Any] = {
        "name": case.name,
        "metric": goal.metric,
        "unit": goal.unit,
        "about": case.about,
        "bare_is": case.bare,
    }
    return (
        row
        | medians
        | {
            "ratio": ratio,
            "against": goal.against,
            "goal": str(goal),
            "met": is_met,
            "n": len(values.get("ours", [])),
            "values": {column: list(values.get(column, [])) for column in COLUMNS},
        }
    )


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Attributes:
        scratch: A folder for all that is written.
        size: Of the work.
        threads: Of each process; fixed, so that nobody has more than another.
        clone: A copy of the user's DomainBed, in which Python may keep its bytecode; None without one.
    """

    scratch: Path
    size: Size
    threads: int
    clone: Path | None
    names: Iterator[int] = field(default_factory=itertools.count)

    def make_folder(self, name: str) -> Path:
        """Return the path of a folder that does not exist yet."""
        return self.scratch / f"{name}{next(self.names)}"

    def make_environment(self, *, with_host: bool, keeps_memory: bool) -> dict[str, str]:
        """Return the environment of a process: no GPU, so many threads, bytecode kept as on a user's machine.

        Args:
            with_host: Upstream can be imported.
            keeps_memory: The C library keeps what is freed, as the engine tells it to: no limit is lower without it.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        changed = {name: str(self.threads) for name in names} | {
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(self.scratch),
        }
        if keeps_memory:
            changed |= {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | changed
        if with_host and self.clone is not None:
            inherited = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(self.clone), *([inherited] if inherited else [])])
            # Upstream's sweep starts "python", whatever that is.
            environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        return environment

    def time(self, module: str, *args: object, with_host: bool = False) -> float:
        """Run a module as a program and return the seconds from its start to its end."""
        began = time.perf_counter()
        with self._start(module, args, with_host, keeps_memory=not with_host) as process:
            process.wait()
        return time.perf_counter() - began

    def watch(self, module: str, *args: object, with_host: bool = False) -> dict[str, float]:
        """Run a module as a program and return its peak memory in MiB and its number of processes.

        The memory of one process is its largest resident set; of several, the largest sum of their proportional sets.
        """
        peak = high_water = count = 0.0
        with self._start(module, args, with_host, keeps_memory=False) as process:
            while process.poll() is None:
                family = list_family(process.pid)
                count = max(count, len(family))
                high_water = max(high_water, _read_mib(f"/proc/{process.pid}/status", "VmHWM:"))
                if len(family) > 1:
                    peak = max(peak, sum(_read_mib(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in family))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        return {"memory": max(peak, high_water), "processes": count}

    @contextmanager
    def _start(
        self, module: str, args: Iterable[object], with_host: bool, keeps_memory: bool
    ) -> Iterator[Popen[bytes]]:
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-m", module, *map(str, args)]
            process = self._open(command, errors, self.make_environment(with_host=with_host, keeps_memory=keeps_memory))
            try:
                yield process
            finally:
                _end(process)
            if process.returncode:
                raise _explain(module, process.returncode, errors)

    @contextmanager
    def pace(self, function: str, *, with_host: bool = False, **kwargs: Any) -> Iterator[Player]:
        """Start a loop in a process of its own, which then does its steps only when it is told to.

        Args:
            function: "module:function" in this package; it is given `on_step`, to be called after each step.
            with_host: It imports upstream.
            kwargs: Further arguments of the function.
        """
        with self._ask(function, kwargs | {"is_paced": True}, with_host) as player:
            player.receive()  # the first step, with all that comes before it
            yield player

    def call(self, function: str, *, with_host: bool = False, **kwargs: Any) -> Any:
        """Call a function in a process of its own and return what it returns."""
        with self._ask(function, kwargs, with_host) as player:
            return player.receive()

    @contextmanager
    def _ask(self, function: str, kwargs: dict[str, Any], with_host: bool) -> Iterator[Player]:
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-m", "daft_domainbed.benchmark.child", str(theirs.fileno())]
            began = time.time()
            environment = self.make_environment(with_host=with_host, keeps_memory=not with_host)
            process = self._open(command, errors, environment, pass_fds=[theirs.fileno()])
            theirs.close()
            player = Player(function, Connection(ours.detach()), process, errors)
            try:
                player.send((function, began, kwargs))
                yield player
            finally:
                player.close()

    def _open(self, command: list[str], errors: IO[bytes], environment: dict[str, str], **options: Any) -> Popen[bytes]:
        return Popen(
            command,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=errors,
            cwd=self.scratch,
            env=environment,
            start_new_session=True,  # upstream's workers may outlive it, and are ended with it this way
            **options,
        )


class Player:
    """A function in a process of its own, or a loop there that does its steps when it is told to."""

    def __init__(self, name: str, connection: Connection, process: Popen[bytes], errors: IO[bytes]) -> None:
        self.name, self.connection, self.process, self.errors = name, connection, process, errors

    def send(self, message: Any) -> None:
        """Tell it something; that it has ended shows when it is listened to."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Return what it says.

        Raises:
            RunError: It ended without a word.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise _explain(self.name, self.process.wait(), self.errors) from None

    def advance(self, n_steps: int) -> list[float]:
        """Have it do so many steps; return the seconds of each."""
        self.send(n_steps)
        seconds: list[float] = self.receive()
        return seconds

    def take_median(self, n_steps: int) -> float:
        """Have it do so many steps; return the median of their seconds."""
        return statistics.median(self.advance(n_steps))

    def close(self) -> None:
        """End it."""
        self.connection.close()
        _end(self.process)


def _explain(what: str, status: int, errors: IO[bytes]) -> RunError:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return RunError(f"{what} failed while it was measured: {lines[-1].strip() if lines else f'exit status {status}'}")


def _end(process: Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def list_flags(**values: Any) -> list[str]:
    """Return flags as DomainBed takes them, which wants a data folder whether it is read or not."""
    flags = []
    for name, value in ({"data_dir": "."} | values).items():
        flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def list_family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    family = [pid]
    for member in family:  # grows meanwhile
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            with suppress(OSError):
                family += map(int, path.read_text().split())
    return family


def _read_mib(path: str, name: str) -> float:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0


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
    """Return the clone's commit, memory and load, beside which `machine.describe_machine` has versions and hardware."""
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
