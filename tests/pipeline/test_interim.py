"""The report of finished cells beside unfinished ones, on the tiny sweep."""

import sys
from pathlib import Path

import yaml

from pipeline.workspace import Workspace


def interim(work: Workspace, fails: bool = False) -> str:
    work.environment = work.environment | {"PYTHONPATH": "src"}
    return work.run(sys.executable, "-m", "prefscan.interim", fails=fails)


def test_what_has_finished_is_reported_and_nothing_of_the_sweep_is_touched(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    params = yaml.safe_load((work.folder / "params.yaml").read_text())
    params |= {"beta": 0.7, "grid": params["grid"] | {"beta": [0.7, 0.1]}}
    (work.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (work.folder / "metrics/train/sigmoid-0.7-3.json").write_text("{}")  # of other parameters, as it were
    assert "runs/interim/report.html: 2 of 4 cells" in interim(work)
    page = (work.folder / "runs/interim/report.md").read_text()
    assert page.startswith(f"# {params['model']['name']}: 2 of 4 cells, in the interim\n")
    rows = (work.folder / "runs/interim/cells.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["base", "sigmoid-0.1-3", "kto_pair-0.1-3"]
    assert rows == (work.folder / "reports/cells.csv").read_text().splitlines()
    assert work.git("status", "--short").split() == ["M", "params.yaml"]

    (work.folder / "src/prefscan/merge.py").open("a").write("# touched\n")
    assert "nothing to report yet: no cell has finished with these parameters" in interim(work, fails=True)
    (work.folder / "src/prefscan/generation.py").open("a").write("# touched\n")
    assert "what cells share is stale; `dvc repro answer-base mtbench-base`" in interim(work, fails=True)
