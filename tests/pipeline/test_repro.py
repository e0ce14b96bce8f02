"""Real `dvc repro` and `dvc exp run` over every stage, on a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.workspace import ROOT, Workspace, of_cells, stages_run
from prefscan.repo.pipeline import CELL_STAGES


def test_sweep_runs_to_the_report_and_then_nothing_is_stale(sweep: Workspace) -> None:
    summary = sweep.json("metrics/summary.json")
    assert list(summary) == ["recipe", "base", "highest"]
    assert summary["recipe"]["cell"] == "sigmoid-0.1-3"
    assert set(summary["highest"]) == {"sigmoid", "kto_pair"}
    assert "<svg" in (sweep.folder / "reports/report.html").read_text()
    assert stages_run(sweep.dvc("repro")) == []
    assert sweep.git("status", "--short") == ""


def test_the_plan_knows_what_is_left_and_by_what_speed(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    work.environment = work.environment | {"PYTHONPATH": "src", "COLUMNS": "200"}
    assert "No cell is left to run." in work.run(sys.executable, "-m", "prefscan", "plan")
    gamma = work.run(sys.executable, "-m", "prefscan", "plan", "losses.simpo.gamma=1")
    assert "No cell is left to run." in gamma  # simpo is not in this grid
    other = work.run(sys.executable, "-m", "prefscan", "plan", "judge.name=other")
    assert "No cell is left to run.\nThe judge is another than in params.yaml: every model is judged anew." in other
    planned = work.run(sys.executable, "-m", "prefscan", "plan", "--workers", "2", "beta=0.7", "sweep.beta=0.1")
    found = re.search(r"2 of 4 cells are left to run: .* by (\S+) s an update and .* \(means of 2 finished", planned)
    assert found is not None
    spent = [work.json(f"metrics/cost/train/{key}.json")["seconds"] for key in ("sigmoid-0.1-3", "kto_pair-0.1-3")]
    assert float(found[1]) == pytest.approx(sum(spent) / 6, abs=0.01)
    assert "On 2 workers: " in planned


@pytest.mark.slow
def test_sweep_none_runs_one_cell(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    ran = stages_run(work.dvc("exp", "run", "-S", "sweep=none", "-S", "loss=ipo"))
    assert set(ran) == of_cells("ipo-0.1-3") | {"check", "report"}
    assert list(work.json("metrics/summary.json")["highest"]) == ["ipo"]


@pytest.mark.slow
def test_answers_of_base_and_adapter_in_bf16_train_nothing_anew(sweep: Workspace, tmp_path: Path) -> None:
    """As the 7B study answers; the report says what margin that model has."""
    work = sweep.copy(tmp_path / "work")
    options = ["sweep=none", "merge.format=adapter", "answer.dtype=bf16"]
    ran = stages_run(work.dvc("exp", "run", *(part for option in options for part in ("-S", option))))
    models = [f"{stage}@sigmoid-0.1-3" for stage in CELL_STAGES if stage != "train"]
    assert set(ran) == {*models, "check", "answer-base", "mtbench-base", "report"}
    margin = work.json("metrics/merge/sigmoid-0.1-3.json")
    assert margin["answering_pairs"] == work.json("metrics/prepare.json")["heldout"] > margin["pairs"]
    said = f"whose held-out margin against the base in that precision is {margin['margin_answering']:.2f} nats"
    assert f"The answers come from the base with the adapter in bf16, {said}" in work.folder.joinpath(
        "reports/report.md"
    ).read_text(encoding="utf-8")


def test_queue_takes_two_experiments(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    work.dvc("exp", "run", "--queue", "-S", "beta=0.3,0.7")
    assert work.dvc("queue", "status").count("Queued") == 2


def test_the_study_is_54_train_stages(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    planned = stages_run(work.dvc("exp", "run", "--dry", "-S", "+experiment=openhermes"))
    assert len({stage for stage in planned if stage.startswith("train@")}) == 54


@pytest.mark.slow
def test_one_cell_alone_in_another_clone_is_bit_identical(sweep: Workspace, tmp_path: Path) -> None:
    clone = sweep.clone(tmp_path / "clone")
    ran = stages_run(clone.dvc("repro", "train@kto_pair-0.1-3"))
    assert {stage for stage in ran if stage.startswith("train@")} == {"train@kto_pair-0.1-3"}
    adapter = "models/adapters/kto_pair-0.1-3"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (clone.folder / adapter / name).read_bytes() == (sweep.folder / adapter / name).read_bytes()


def test_another_clone_restores_everything_from_the_remote(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    work.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote"))
    work.commit("Add a remote")
    work.dvc("push")
    clone = work.clone(tmp_path / "clone")
    clone.dvc("pull")
    assert stages_run(clone.dvc("repro")) == []
    assert (clone.folder / "models/merged/kto_pair-0.1-3/model.safetensors").exists()


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("reporting/charts.py", {"report"}),
        ("training/losses.py", {"check", "train@sigmoid-0.1-3", "train@kto_pair-0.1-3"}),
    ],
)
def test_touched_code_makes_its_own_stages_stale(
    sweep: Workspace, tmp_path: Path, module: str, first: set[str]
) -> None:
    work = sweep.copy(tmp_path / "work")
    path = work.folder / "src/prefscan" / module
    path.write_text(path.read_text() + "\n# touched\n")
    stale = {stage.strip() for stage in re.findall(r"^(\S+):$", work.dvc("status"), re.MULTILINE)}
    assert stale == first
    ran = set(stages_run(work.dvc("repro", "--dry")))
    assert first <= ran
    assert ("train@kto_pair-0.1-3" in ran) == (module == "training/losses.py")


def test_a_hyperparameter_makes_the_cells_of_its_own_loss_stale(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    ran = stages_run(work.dvc("exp", "run", "-S", 'sweep.loss="sigmoid, simpo"', "train"))
    assert {stage for stage in ran if stage.startswith("train@")} == {"train@simpo-0.1-3"}
    path = work.folder / "params.yaml"
    text = path.read_text()
    for gamma, expected in (("0.5", []), ("0.9", ["train@simpo-0.1-3"])):
        path.write_text(text.replace("gamma: 0.5", f"gamma: {gamma}"))
        assert re.findall(r"^(train@\S+):$", work.dvc("status"), re.MULTILINE) == expected


def test_fastchat_prints_the_averages_of_the_metrics(sweep: Workspace) -> None:
    printed = sweep.run(sys.executable, "-m", "fastchat.llm_judge.show_result", "--judge-model", "base-expected")
    average = printed.split("Average")[1]
    for key in ("base", "sigmoid-0.1-3", "kto_pair-0.1-3"):
        shown = re.search(rf"^{re.escape(key)}\s+(\S+)", average, re.MULTILINE)
        assert shown is not None
        expected = sweep.json(f"metrics/mtbench/{key}.json")["average"]
        assert float(shown[1]) == pytest.approx(expected, abs=1e-5)


def test_plots_are_drawn(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    work.dvc("plots", "show", "--out", "shown")
    page = (work.folder / "shown/index.html").read_text()
    assert "Training loss" in page
    assert "MT-Bench score against" in page  # the page escapes the β
    work.dvc("plots", "diff", "HEAD~1", "--out", "compared")
    assert "Training loss" in (work.folder / "compared/index.html").read_text()


def test_a_wrong_parameter_stops_before_the_first_stage(sweep: Workspace, tmp_path: Path) -> None:
    work = sweep.copy(tmp_path / "work")
    output = work.dvc("exp", "run", "-S", "loss=dppo", fails=True)
    assert "'dppo' is no known loss; known are sigmoid" in output
    assert stages_run(output) == ["check"]
    work.git("checkout", "--quiet", "--force", "HEAD")
    assert stages_run(work.dvc("repro")) == []


def test_the_committed_lock_belongs_to_the_committed_code() -> None:
    """What a clone without data can check: no stage's code or parameters changed since the committed run."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, stages_run(done.stdout)) == (0, [])
