"""Ask many things of a server at once, in threads that end with the stage: on Ctrl-C and SIGTERM within two seconds.

One breaker stands between all of them and the server.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

STRIKES = 3  # requests in a row that fail in the same way, with no success between them, end the stage
GRACE = 0.3  # seconds in which replies under way at an interruption may still come, and be kept

T = TypeVar("T")
R = TypeVar("R")


class NoReply(Exception):
    """A request without a reply to use: the text is the reason, without key or prompt.

    `passing`: the same request may succeed in a later run. `stops`: no other request of this stage would do better.
    """

    def __init__(self, reason: str, passing: bool = False, stops: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing
        self.stops = stops


class Breaker:
    """Ends all requests of a stage: at a fault that each would meet, after several in a row, or with the stage."""

    def __init__(self) -> None:
        self.reason = ""
        self.tripped = Event()
        self.proven = Event()  # set by the first reply that can be used
        self.lock = Lock()
        self.strikes = 0

    def trip(self, reason: str) -> None:
        with self.lock:
            self.reason = self.reason or reason
        self.tripped.set()
        self.proven.set()  # nobody is to wait for it

    def strike(self, reason: str) -> None:
        """One more request that failed in a way that others may share; the last one in a row ends the stage."""
        with self.lock:
            self.strikes += 1
            enough = self.strikes >= STRIKES
        if enough:
            self.trip(f"{reason}, {STRIKES} times in a row")

    def clear(self) -> None:
        with self.lock:
            self.strikes = 0
        self.proven.set()

    def check(self) -> None:
        """Raises NoReply once no request is to be sent."""
        if self.tripped.is_set():
            raise NoReply(f"not asked after this: {self.reason}", passing=True)

    def wait(self, seconds: float) -> None:
        """Sleep; raises NoReply as soon as no request is to be sent."""
        self.tripped.wait(seconds)
        self.check()


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
    not one a worker. When the caller stops or is interrupted, no further item is asked: replies that come in a moment
    are waited for, and the daemon threads that wait for others end with the process.
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
