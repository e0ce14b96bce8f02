"""The rounding of both layouts, on the tiny model."""

from pathlib import Path

import rounding
from mtbench_data import ROOT


def test_both_layouts_are_near_float64_and_neither_is_it(prepared: Path) -> None:
    (prepared / "conf").symlink_to(ROOT / "conf")
    found = rounding.measure(Path("models/base"), micro_batch=2, count=2)
    assert len(found) == 2
    for update in found:
        exact = update["exact"]
        assert exact["gradient_error"] == 0
        assert abs(exact["loss"] - 0.693147) > 1e-5  # else a tie would hide a wrong path
        for layout in ("stock", "fast"):
            assert 0 < abs(update[layout]["loss"] - exact["loss"]) < 3e-5
            assert 0 < update[layout]["gradient_error"] < 1e-4
    printed = rounding.table(found)
    assert [*printed.columns[0].cells] == ["stock", "fast"]
