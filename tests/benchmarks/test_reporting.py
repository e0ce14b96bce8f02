"""The benchmark of the report, at small size: the stage takes the made-up files for a sweep's."""

import reporting


def test_the_stage_reports_the_made_up_sweep() -> None:
    result = reporting.measure(reporting.TWO_CELLS, 16)
    assert (result["cells"], result["judgements"]) == (2, 32)
    assert set(result["bytes"]) == {"report.html", "answers.html"}
    assert all(size > 10_000 for size in result["bytes"].values())
