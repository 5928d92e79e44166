"""The process behind `Bench.pace` and `Bench.call`, which does what one connection tells it."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from multiprocessing.connection import Connection


class Pace:
    """Holds a loop after each of its turns until it is given the next; measures every step."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.wanted = connection, 1
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def __call__(self) -> None:
        """End a step, and wait where it was the last of a turn."""
        self.seconds.append(time.perf_counter() - self.since)
        if len(self.seconds) == self.wanted:
            try:
                self.connection.send(self.seconds)
                self.seconds, self.wanted = [], self.connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # whoever measures has seen enough
        self.since = time.perf_counter()


def main(handle: int) -> None:
    """Do one thing and answer, or do steps until the connection closes."""
    connection = Connection(handle)
    function, began, kwargs = connection.recv()
    module, _, name = function.partition(":")
    if kwargs.pop("is_paced", False):
        kwargs["on_step"] = Pace(connection)
    if name.startswith("profile"):
        kwargs["began"] = began
    connection.send(getattr(import_module(f"daft_domainbed.benchmark.{module}"), name)(**kwargs))


if __name__ == "__main__":
    main(int(sys.argv[1]))
