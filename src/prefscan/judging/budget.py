"""What a judge's replies cost, and the budget that they stay within.

Before a request is sent, the most that it can cost is held back; when its reply has come, what it did cost takes that
place. So the sum of what was paid and what is under way never exceeds the budget. A request whose reply got lost on the
way, or was given up when the stage was interrupted, may have been billed, and counts with its most.
"""

import errno
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any

from prefscan.common.config import Prices
from prefscan.common.io import read_jsonl
from prefscan.endpoints.workers import NoReply

MESSAGE_TOKENS = 16  # for what a chat template puts around a message; OpenAI's is 3 or 4 tokens


def most_tokens(messages: Iterable[dict[str, str]]) -> int:
    """No fewer tokens than the messages have: no tokenizer makes more of a text than its UTF-8 has bytes."""
    return sum(len(message["content"].encode()) + MESSAGE_TOKENS for message in messages)


def fewest_tokens(messages: Iterable[dict[str, str]]) -> int:
    """No more tokens than the messages have, runs of one character apart: a token of text has 4 to 5 bytes."""
    return (
        sum(len(re.sub(r"(.)\1+", r"\1", message["content"], flags=re.DOTALL).encode()) for message in messages) // 10
    )


def price(prices: Prices | None, input_tokens: int, output_tokens: int) -> float:
    """USD; 0 where the judge has no prices."""
    return (prices.input * input_tokens + prices.output * output_tokens) / 1e6 if prices else 0.0


@dataclass(eq=False)  # two of equal price are two
class Purchase:
    """One request under way: the most that it can cost, and what it did cost, nothing where the server refused it."""

    most: float
    usd: float = 0.0


class Spending:
    """USD spent by the judges of a workspace: the sum over the lines of `ledger`, one a request that cost something.

    `by_judge` has what each request cost that is in the ledger when this is made, by the judge's name.
    """

    def __init__(self, ledger: Path, budget: float | None) -> None:
        self.ledger = ledger
        self.budget = budget
        self.by_judge: defaultdict[str, list[float]] = defaultdict(list)
        self.booked: set[str] = set()  # requests of a batch that are in the ledger
        for row in read_jsonl(ledger) if ledger.exists() else ():
            self.by_judge[row["judge"]].append(row["usd"])
            self.booked.add(row.get("request", ""))
        self.spent = sum(sum(requests) for requests in self.by_judge.values())
        self.under_way: list[Purchase] = []
        self.changed = Condition()

    @contextmanager
    def purchase(self, most: float, judge: str) -> Iterator[Purchase]:
        """Hold `most` USD while a request is under way, then record what it cost.

        Waits where requests under way may turn out cheap enough. Raises NoReply where the budget is too small.
        """
        purchase = Purchase(most)
        with self.changed:
            while self.budget is not None and self.spent + sum(p.most for p in self.under_way) + most > self.budget:
                if self.spent + most > self.budget:
                    raise self.too_small(most)
                self.changed.wait()
            self.under_way.append(purchase)
        try:
            yield purchase
        finally:
            with self.changed:
                if purchase in self.under_way:  # else it was given up
                    self._close(purchase, judge)

    def too_small(self, most: float) -> NoReply:
        return NoReply(
            f"judge.budget is {self.budget:.2f} USD, {self.spent:.2f} are spent and the request may cost {most:.2f}",
            passing=True,
        )

    def give_up(self, judge: str) -> None:
        """Book what is still under way at its most, when the stage ends without waiting for it."""
        with self.changed:
            for purchase in list(self.under_way):
                purchase.usd = purchase.most
                self._close(purchase, judge)

    def book(self, usd: float, judge: str, request: str) -> None:
        """Record what a request of a batch cost, once."""
        with self.changed:
            if usd and request not in self.booked:
                self.spent += usd
                self.booked.add(request)
                self._record({"judge": judge, "usd": usd, "request": request})

    def _close(self, purchase: Purchase, judge: str) -> None:
        self.under_way.remove(purchase)
        self.spent += purchase.usd
        self.changed.notify_all()
        if purchase.usd:
            self._record({"judge": judge, "usd": purchase.usd})

    def _record(self, row: dict[str, Any]) -> None:
        """Append a whole line or nothing: half of one, left by a full disk, would spoil the ledger."""
        line = (json.dumps(row) + "\n").encode()
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.ledger))
            except OSError:
                file.truncate(size)
                raise
