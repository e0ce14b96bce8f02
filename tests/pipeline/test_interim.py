"""The report of finished cells beside unfinished ones, on the tiny sweep."""

import sys
from pathlib import Path

import pytest
import yaml

from pipeline.workspace import Workspace, of_cells, stages_run


def interim(work: Workspace, *arguments: str, fails: bool = False) -> str:
    work.environment = work.environment | {"PYTHONPATH": "src"}
    return work.run(sys.executable, "-m", "prefscan", "partial-report", *arguments, fails=fails)


def reported(work: Workspace) -> list[str]:
    rows = (work.folder / "runs/interim/cells.csv").read_text().splitlines()
    return [row.split(",")[0] for row in rows[1:]]


def with_another_beta(work: Workspace) -> None:
    """Two cells more, of which the first is the recipe."""
    params = yaml.safe_load((work.folder / "params.yaml").read_text())
    params |= {"beta": 0.7, "grid": params["grid"] | {"beta": [0.7, 0.1]}}
    (work.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def test_what_has_finished_is_reported_and_nothing_of_the_sweep_is_touched(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    with_another_beta(work)
    (work.folder / "metrics/train/sigmoid-0.7-3.json").write_text("{}")  # of other parameters, as it were
    assert "runs/interim/report.html: 2 of 4 cells" in interim(work)
    page = (work.folder / "runs/interim/report.md").read_text()
    assert page.startswith("# tiny: 2 of 4 cells, in the interim\n")
    assert reported(work) == ["base", "sigmoid-0.1-3", "kto_pair-0.1-3"]
    assert (work.folder / "runs/interim/cells.csv").read_bytes() == (work.folder / "reports/cells.csv").read_bytes()
    assert work.git("status", "--short").split() == ["M", "params.yaml"]

    (work.folder / "src/prefscan/merging/merge.py").open("a").write("# touched\n")
    assert "nothing to report yet: no cell has finished with these parameters" in interim(work, fails=True)
    (work.folder / "src/prefscan/generation/sampling.py").open("a").write("# touched\n")
    assert "what cells share is stale; `dvc repro answer-base mtbench-base`" in interim(work, fails=True)


@pytest.mark.slow  # two cells of four stages; test_pipeline.py has the same in a small repository
def test_what_others_have_finished_is_taken_over_and_nothing_is_run(sweep: Workspace, tmp_path: Path) -> None:
    """A clone on this machine shares the cache, as the launcher's do; a node elsewhere, the remote alone."""
    work = sweep.copy(tmp_path / "work")
    with_another_beta(work)
    clone, node = work.copy(tmp_path / "clone"), work.copy(tmp_path / "node")
    clone.dvc("config", "--local", "cache.dir", str(work.folder / ".dvc/cache"))
    clone.dvc("repro", "mtbench@sigmoid-0.7-3")
    # As in a dvc.lock of another processor, whose outputs nobody here has: DVC would look for no others.
    lock, made = (yaml.safe_load((at.folder / "dvc.lock").read_text()) for at in (work, clone))
    entry = made["stages"]["train@sigmoid-0.7-3"]
    for out in entry["outs"]:
        out["md5"] = "0" * 32 + out["md5"][32:]
    lock["stages"]["train@sigmoid-0.7-3"] = entry
    (work.folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    assert "runs/interim/report.html: 3 of 4 cells" in interim(work)
    assert reported(work) == ["base", "sigmoid-0.7-3", "sigmoid-0.1-3", "kto_pair-0.1-3"]
    assert not (work.folder / "metrics/train/kto_pair-0.7-3.json").exists()

    for at in (node, work):
        at.dvc("remote", "add", "--default", "--local", "shared", str(tmp_path / "remote"))
    node.dvc("repro", "mtbench@kto_pair-0.7-3")
    node.dvc("push", "--run-cache", *of_cells("kto_pair-0.7-3"))
    assert "runs/interim/report.html: 4 of 4 cells" in interim(work, "--pull")
    metrics = "metrics/train/kto_pair-0.7-3.json"
    assert (work.folder / metrics).read_bytes() == (node.folder / metrics).read_bytes()
    assert stages_run(work.dvc("repro")) == ["report"]
