"""What a launch shows while chains run."""

import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from prefscan.launch.clone import Chain, Outcome, Progress


@dataclass
class Display:
    """What is shown while chains run: a table on a terminal, a line for each chain that ends elsewhere."""

    chains: list[Chain]
    workers: int
    usd_per_hour: float | None
    console: Console = field(default_factory=Console)
    began: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)

    def update(self, progress: dict[str, Progress]) -> None:
        self.progress = progress
        for name in progress:
            self.began.setdefault(name, time.monotonic())

    def ended(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        if not self.console.is_terminal:
            how = f"failed: {outcome.error.splitlines()[-1]}" if outcome.error else f"done in {outcome.seconds:.0f} s"
            self.console.print(
                f"{outcome.name}: {how} ({len(self.outcomes)} of {len(self.chains)})", highlight=False, soft_wrap=True
            )

    def seconds_left(self) -> float | None:
        """Of the cells to train, by the mean of those that ended well; None before the first has."""
        trained = {chain.name for chain in self.chains if any(t.startswith("train@") for t in chain.targets)}
        ended = [o.seconds for o in self.outcomes.values() if not o.error and o.name in trained]
        if not ended:
            return None
        mean, now = sum(ended) / len(ended), time.monotonic()
        left = 0.0
        for name in trained - set(self.outcomes):
            left += max(mean - (now - self.began[name]), 0) if name in self.began else mean
        return left / self.workers

    def usd(self) -> float:
        """What the judgements cost, kept ones included, and the hours of what computes where an hour has a price."""
        computing = {chain.name for chain in self.chains if chain.computes}
        seconds = sum(outcome.seconds for name, outcome in self.outcomes.items() if name in computing)
        seconds += sum(
            time.monotonic() - began
            for name, began in self.began.items()
            if name in computing and name not in self.outcomes
        )
        return sum(outcome.usd for outcome in self.outcomes.values()) + (self.usd_per_hour or 0) * seconds / 3600

    def __rich__(self) -> Group:
        running = [name for name in self.began if name not in self.outcomes]
        failed = sum(bool(outcome.error) for outcome in self.outcomes.values())
        done, waiting = len(self.outcomes) - failed, len(self.chains) - len(self.outcomes) - len(running)
        title = f"{done} done, {len(running)} running, {waiting} waiting, {failed} failed"
        if (left := self.seconds_left()) is not None:
            title += f"; expected end {datetime.now() + timedelta(seconds=left):%a %H:%M}"
        if usd := self.usd():
            title += f"; {usd:.2f} USD"
        table = Table("chain", "stage", "update", "loss", "seconds")
        for name in running:
            now, seconds = self.progress[name], time.monotonic() - self.began[name]
            table.add_row(name, now.stage, now.step, now.loss, f"{seconds:.0f}")
        return Group(Text(title), table)
