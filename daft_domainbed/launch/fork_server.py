"""A process that has imported torch once and forks a job's process whenever it is asked to.

It is asked over a socket, and given one end of another socket, over which the job is described, reports, and is
stopped. When the launcher dies, however it dies, its sockets close, and everything here ends with it. Nothing of this
is in a file.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen

from daft_domainbed.runtime import machine, stopping

_PRELOADED = ("daft_domainbed.launch.work", "daft_domainbed.algorithms", "daft_domainbed.embedded.datasets")
SECONDS_BETWEEN_REPORTS = 0.25
STOP = "stop"


class ForkServer:
    """The server as the launcher sees it.

    Args:
        environment: Variables of the server and of all that it forks, beside the launcher's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, far_end = socket.socketpair()
        command = [sys.executable, "-m", __name__, str(far_end.fileno())]
        self._process = Popen(command, pass_fds=[far_end.fileno()], env=os.environ | environment)
        far_end.close()

    def fork(self) -> Connection:
        """Start a process and return the connection to it, over which it waits for its job."""
        near_end, far_end = socket.socketpair()
        with suppress(OSError), far_end:  # a dead server shows as the end of the connection
            socket.send_fds(self._socket, [b"f"], [far_end.fileno()])
        return Connection(near_end.detach())

    def close(self) -> None:
        """End the server; jobs end when their connections are closed."""
        self._socket.close()
        self._process.wait()


def _serve(requests: socket.socket) -> None:
    machine.find_commit(Path(machine.__file__))  # while what is imported below is what is committed
    # A terminal or a scheduler sends these to everybody; the launcher says what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the jobs' processes here
    for name in _PRELOADED:
        import_module(name)
    while True:
        try:
            data, handles, _, _ = socket.recv_fds(requests, 1, 1)
        except OSError:
            return
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _work(Connection(handles[0]))
            os._exit(0)
        os.close(handles[0])


def _work(connection: Connection) -> None:
    from daft_domainbed.launch.work import do_job

    try:
        root, job, threads, environment = connection.recv()
    except (EOFError, OSError):
        return
    os.environ |= environment
    sys.stderr = sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - the run's own files have it all
    last = 0.0

    def report(step: int, n_steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_REPORTS or step == n_steps:
            last = time.monotonic()
            with suppress(OSError):  # the launcher is gone: an interruption, not a failure
                connection.send((step, n_steps))

    with stopping.listening(signal.SIGTERM):
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()
        outcome = do_job(root, job, threads=threads, on_step=report)
    with suppress(OSError):
        connection.send(outcome)


def _obey(connection: Connection) -> None:
    """Stop in good order when the launcher says so, and at once when its end of the connection closes."""
    with suppress(EOFError, OSError):
        while connection.recv() == STOP:
            stopping.request()
    os._exit(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
