"""Threads that read images, and hold nobody up who wants to leave: a file that hangs ends with the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any


class Readers(Executor):
    """An executor whose threads are daemons: the standard one's would be waited for when the process ends.

    Args:
        count: Of threads, which begin with the first task.
    """

    def __init__(self, count: int) -> None:
        self._count, self._threads = count, 0
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called on one of the threads."""
        while self._threads < self._count:
            self._threads += 1
            threading.Thread(target=_work, args=(self._tasks,), name="images", daemon=True).start()
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once their tasks are done; nobody waits for them."""
        for _ in range(self._threads):
            self._tasks.put(None)


def _work(tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (task := tasks.get()) is not None:
        future, call = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        del task, future, call  # a batch is not kept until the next one comes
