"""Ask many things of a server at once, in threads that end with the stage: on Ctrl-C and SIGTERM within two seconds."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

from prefscan.endpoints.chat_client import Breaker

GRACE = 1.0  # seconds in which replies under way at an interruption may still come, and be kept

T = TypeVar("T")
R = TypeVar("R")


def _terminated(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM becomes an exit that passes through the blocks' ends, in the main thread, the only one that may ask."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def at_once(ask: Callable[[T], R], items: Iterable[T], concurrency: int, breaker: Breaker) -> Iterator[tuple[T, R]]:
    """Each item and what `ask` gives for it, as they come; an exception of `ask` is raised here.

    One at a time until the breaker has seen a reply that can be used, so that a wrong key or setting costs one request,
    not one a worker. When the caller stops or is interrupted, no further item is asked: replies that come within a
    second are waited for, and the daemon threads that wait for others end with the process.
    """
    waiting = deque(items)
    results: SimpleQueue[tuple[T, Any, BaseException | None]] = SimpleQueue()

    def work(first: bool) -> None:
        if not first:
            breaker.proven.wait()
        while not ended:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                results.put((item, ask(item), None))
            except BaseException as error:
                results.put((item, None, error))

    ended: list[bool] = []
    count = len(waiting)
    threads = [Thread(target=work, args=(i == 0,), daemon=True) for i in range(min(concurrency, count))]
    with sigterm_exits():
        try:
            for thread in threads:
                thread.start()
            for _ in range(count):
                item, result, error = results.get()
                if error:
                    raise error
                yield item, result
        except BaseException:
            breaker.trip("the stage was interrupted")
            raise
        finally:
            ended.append(True)
            breaker.proven.set()
            until = time.monotonic() + GRACE
            for thread in threads:
                thread.join(max(until - time.monotonic(), 0.0))
