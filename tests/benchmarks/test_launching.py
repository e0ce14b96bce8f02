"""The launcher's benchmark, on two cells that sleep for a second."""

import pytest

import launch


@pytest.mark.slow
def test_the_figures_are_of_the_cells_that_ran() -> None:
    found = launch.measure(workers=2, cells=2, seconds=1)
    assert found["workers"] == 2
    # Two cells of a second on two workers: one second of sleep, the rest is the launcher's and DVC's.
    assert found["cells_seconds"] > 1
    assert 0 < found["efficiency"] == round(1 / found["cells_seconds"], 3) < 1
    assert 0 < found["overhead_a_cell"] <= found["cells_seconds"]
    assert found["before_the_cells"] > 0
    assert found["after_the_cells"] > 0
