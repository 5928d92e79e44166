"""How work is measured: programs from start to end, and loops a few steps at a time, in processes of their own.

Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import IO, Any

from daft_domainbed.benchmark.sizes import Size
from daft_domainbed.errors import RunError

SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    Attributes:
        scratch: A folder for all that is written.
        size: How much work each row is.
        threads: Threads of each process; fixed, so that none has more than another.
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
            with_host: Whether upstream can be imported.
            keeps_memory: Whether the C library keeps what is freed, as the engine tells it to: no limit is lower
                without it.
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
                time.sleep(SECONDS_BETWEEN_LOOKS)
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
    def pace(self, function: str, *, with_host: bool = False, **kwargs: Any) -> Iterator[Worker]:
        """Start a loop in a process of its own, which then does its steps only when it is told to.

        Args:
            function: "module:function" in this package; it is given `on_step`, to be called after each step.
            with_host: Whether it imports upstream.
            kwargs: Further arguments of the function.
        """
        with self._ask(function, kwargs | {"is_paced": True}, with_host) as worker:
            worker.receive()  # the first step, with all that comes before it
            yield worker

    def call(self, function: str, *, with_host: bool = False, **kwargs: Any) -> Any:
        """Call a function in a process of its own and return what it returns."""
        with self._ask(function, kwargs, with_host) as worker:
            return worker.receive()

    @contextmanager
    def _ask(self, function: str, kwargs: dict[str, Any], with_host: bool) -> Iterator[Worker]:
        near_end, far_end = socket.socketpair()
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-m", "daft_domainbed.benchmark.child", str(far_end.fileno())]
            began = time.time()
            environment = self.make_environment(with_host=with_host, keeps_memory=not with_host)
            process = self._open(command, errors, environment, pass_fds=[far_end.fileno()])
            far_end.close()
            worker = Worker(function, Connection(near_end.detach()), process, errors)
            try:
                worker.send((function, began, kwargs))
                yield worker
            finally:
                worker.close()

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


class Worker:
    """A function in a process of its own, or a loop there that does its steps when it is told to."""

    def __init__(self, name: str, connection: Connection, process: Popen[bytes], errors: IO[bytes]) -> None:
        self.name, self.connection, self.process, self.errors = name, connection, process, errors

    def send(self, message: Any) -> None:
        """Send it a message; that it has ended shows when an answer is received."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Return its next message.

        Raises:
            RunError: It ended without one.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise _explain(self.name, self.process.wait(), self.errors) from None

    def advance(self, n_steps: int) -> list[float]:
        """Have it do so many steps, and return the seconds of each."""
        self.send(n_steps)
        seconds: list[float] = self.receive()
        return seconds

    def take_median(self, n_steps: int) -> float:
        """Have it do so many steps, and return the median of their seconds."""
        return statistics.median(self.advance(n_steps))

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        _end(self.process)


def list_flags(**values: Any) -> list[str]:
    """Return flags as DomainBed takes them, which wants a data folder whether it is read or not."""
    flags = []
    for name, value in ({"data_dir": "."} | values).items():
        flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _explain(what: str, status: int, errors: IO[bytes]) -> RunError:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return RunError(f"{what} failed while it was measured: {lines[-1].strip() if lines else f'exit status {status}'}")


def _end(process: Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


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
