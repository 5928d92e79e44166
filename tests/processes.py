"""Processes of the tests: commands that start without importing torch anew, and waiting for what they do."""

from __future__ import annotations

import fcntl
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[1]

# All that a run imports; the last is what torch imports with the first optimizer.
_PRELOADED = ["daft_domainbed.launch.work", "daft_domainbed.launch.local", "daft_domainbed.algorithms.daft"]
_PRELOADED += ["torch._dynamo", "pytest"]
_ASIDE = 500  # no process has so many files open

_is_warm = False
_KEPT: list[Any] = []  # files that are no longer: closing one would close what has its number now


class WarmPopen:
    """A `subprocess.Popen` of `python -m MODULE ...` or `python FILE ...`, forked where torch is imported already.

    The rest is as after an exec: of the open files it has those that it is given, its signals are at their defaults.
    The server of jobs that a launcher started in this way starts is forked in turn. There are no pipes: give files.
    """

    def __init__(
        self,
        command: Iterable[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        pass_fds: Iterable[int] = (),
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(part) for part in command]
        assert self.args[0] == sys.executable
        with open(os.devnull, "r+b") as nowhere:
            given = {0: stdin, 1: stdout, 2: stderr, **dict.fromkeys(pass_fds)}
            files = {number: _Handle(number, file, nowhere) for number, file in given.items()}
            environment = dict(os.environ if env is None else env)
            target = (self.args[1:], environment, os.fspath(cwd or os.getcwd()), files, start_new_session)
            self._process = get_context(is_warm=_is_warm).Process(target=_become, args=target)
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_warm(command: Iterable[object], timeout: float = 300.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run such a command to its end, and return what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = WarmPopen(command, stdout=out, stderr=err, **options)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(process.args, status, out.read(), err.read())


class _Handle:
    """An open file of the process to come, by its number there."""

    def __init__(self, number: int, file: int | IO[Any] | None, nowhere: IO[Any]) -> None:
        if file is None:
            self.descriptor = number
        elif file == subprocess.DEVNULL:
            self.descriptor = nowhere.fileno()
        else:
            self.descriptor = file if isinstance(file, int) else file.fileno()

    def __getstate__(self) -> Any:
        return DupFd(self.descriptor)

    def __setstate__(self, duplicate: Any) -> None:
        self.descriptor = duplicate.detach()


@functools.cache
def get_context(*, is_warm: bool) -> Any:
    """Return what starts processes: a fork where all is imported already, else a server that imports it once."""
    if is_warm:
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _become(argv: list[str], environment: dict[str, str], folder: str, files: dict[int, _Handle], leads: bool) -> None:
    """Be what the command says, in a process that was forked for it."""
    import torch

    from daft_domainbed.launch import fork_server

    global _is_warm
    _is_warm = True
    fork_server.Popen = WarmPopen  # type: ignore[assignment, misc]
    os.fsync = lambda file: None  # type: ignore[assignment]  # as in the tests' own process
    if leads:
        os.setsid()
    _take_files(files)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(argv[1], None)
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def _take_files(files: dict[int, _Handle]) -> None:
    aside = {number: fcntl.fcntl(handle.descriptor, fcntl.F_DUPFD, _ASIDE) for number, handle in files.items()}
    os.closerange(0, _ASIDE)
    for number, descriptor in aside.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    _KEPT.extend([sys.stdin, sys.stdout, sys.stderr])
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), sys.__stdout__, sys.__stderr__  # noqa: SIM115


def wait_until(condition: Callable[[], Any], what: str = "what was waited for", seconds: float = 120.0) -> None:
    """Wait for what is sure to come; the limit is for what is broken."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.01)


def list_group(group: int) -> list[int]:
    """Return the processes of a group that are not dead, as /proc tells them."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = path.read_text().partition(" (")
        except OSError:
            continue  # gone in the meantime
        state, _, process_group = rest.rpartition(") ")[2].split()[:3]
        if int(process_group) == group and state != "Z":
            members.append(int(pid))
    return members
