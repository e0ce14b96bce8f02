"""What a launch shows, as text."""

import re

import pytest
from rich.console import Console

from prefscan.launch.clone import Chain, Outcome, Progress
from prefscan.launch.display import Display

CELLS = ("sigmoid-0.1-24", "sigmoid-0.11-24", "sigmoid-0.12-24")


def test_the_display_counts_expects_an_end_and_sums_the_cost() -> None:
    names = ["reference-train", *CELLS]
    chains = [Chain(name, ("reference@train" if name == "reference-train" else f"train@{name}",)) for name in names]
    display = Display(chains, workers=1, usd_per_hour=36.0, console=Console(width=100, force_terminal=True))
    assert display.seconds_left() is None
    display.update({"reference-train": Progress("reference"), CELLS[0]: Progress("train", "3 of 24", "0.69")})
    display.ended(Outcome("reference-train", 100.0, "node"))
    assert display.seconds_left() is None  # no cell has ended, and what cells share says nothing of them
    display.ended(Outcome(CELLS[0], 50.0, "node", usd=0.25))
    display.update({CELLS[1]: Progress("train", "3 of 24", "0.69")})
    assert display.seconds_left() == pytest.approx(100, abs=2)
    assert display.usd() == pytest.approx(150 * 36 / 3600 + 0.25, abs=0.05)
    display.ended(Outcome(CELLS[1], 1.0, "node", error="died"))
    display.update({CELLS[2]: Progress("train", "7 of 24", "0.42")})
    with display.console.capture() as captured:
        display.console.print(display)
    shown = captured.get()
    assert "2 done, 1 running, 0 waiting, 1 failed" in shown
    assert re.search(r"expected end \w+ \d\d:\d\d", shown)
    assert "7 of 24" in shown
    assert "0.42" in shown
    assert CELLS[1] not in shown


def test_what_waits_for_a_judge_is_neither_expected_to_train_nor_paid_by_the_hour() -> None:
    chains = [Chain(CELLS[0], (f"train@{CELLS[0]}",)), Chain("judge-base", ("mtbench-base",), computes=False)]
    display = Display(chains, workers=1, usd_per_hour=36.0)
    display.ended(Outcome(CELLS[0], 50.0, "node"))
    display.update({"judge-base": Progress("mtbench-base")})
    assert display.seconds_left() == 0
    assert display.usd() == pytest.approx(50 * 36 / 3600)
    display.ended(Outcome("judge-base", 1000.0, "node", usd=0.25))
    assert display.usd() == pytest.approx(50 * 36 / 3600 + 0.25)


def test_elsewhere_than_on_a_terminal_each_end_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display([Chain(name, ()) for name in CELLS], workers=1, usd_per_hour=None, console=Console(width=20))
    display.ended(Outcome(CELLS[0], 12.4, "node"))
    display.ended(Outcome(CELLS[1], 1.0, "node", error="first\nprefscan: beta: 0 is refused"))
    assert capsys.readouterr().out == (
        "sigmoid-0.1-24: done in 12 s (1 of 3)\nsigmoid-0.11-24: failed: prefscan: beta: 0 is refused (2 of 3)\n"
    )
    assert display.usd() == 0
