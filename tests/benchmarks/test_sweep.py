"""The study's loop, run as it is on the tiny model, and the comparison around it; no clock is compared."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import sweep
from mtbench_data import ROOT, local_judge, make_questions, write_params, write_questions
from prefscan.common.config import load
from prefscan.common.errors import UserError
from prefscan.common.io import write_json

GRID = {"loss": ["ipo", "kto_pair"], "beta": [0.1], "steps": [3]}


@pytest.fixture
def workspace(prepared: Path) -> Path:
    """What fetch and prepare leave, tiny, with a grid of two cells, committed but for data and model."""
    (prepared / "src").symlink_to(ROOT / "src")
    write_questions(prepared, make_questions(each=1))
    recipe = {"loss": "ipo", "beta": 0.1, "steps": 3, "grid": GRID}
    answer = {"questions": 8, "max_new_tokens": 5, "batch_size": 8}
    write_params(prepared, **recipe, answer=answer, judge=local_judge(prepared / "models/base"))
    return prepared


def test_a_cell_of_the_loop_does_the_study_s_work(workspace: Path) -> None:
    (cell,) = sweep.study_loop(workspace, ["ipo-0.1-3"])
    assert (cell["trained_as"], cell["updates"], cell["judged_turns"]) == ("ipo", 3, 16)
    assert len(cell["losses"]) == 3
    assert cell["losses"][0] == pytest.approx(25, rel=1e-3)  # (0 − 1/(2β))²
    assert cell["losses"][-1] < cell["losses"][0]
    assert 16 <= cell["generated_tokens"] <= 16 * 5
    assert 1 <= cell["score"] <= 10
    assert list(cell["seconds"]) == list(sweep.PHASES)
    assert sum(cell["seconds"].values()) == pytest.approx(cell["total_seconds"])
    assert not (workspace / "models/merged").exists()


def test_a_loss_that_stock_trl_lacks_has_a_stand_in(workspace: Path) -> None:
    cell = sweep.study_cell("kto_pair-0.1-3")
    assert cell["trained_as"] == "sigmoid"
    assert cell["losses"][0] == pytest.approx(0.693147, abs=1e-5)


def test_a_failed_cell_ends_the_loop(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="failed in cell none-1-1"):
        sweep.study_loop(workspace, ["none-1-1"])
    assert "cell 'none-1-1' is not in the grid" in capfd.readouterr().err


def loop_of(keys: list[str]) -> list[dict[str, Any]]:
    seconds = dict.fromkeys(sweep.PHASES, 2.0)
    return [{"cell": key, "trained_as": "ipo", "seconds": seconds, "total_seconds": 12.0} for key in keys]


@pytest.mark.parametrize(("limit", "study", "extrapolated"), [(None, 24, False), (1, 24, True), (2, 24, False)])
def test_both_sides_run_in_a_fresh_clone(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int | None,
    study: float,
    extrapolated: bool,
) -> None:
    (workspace / ".gitignore").write_text("/data/\n/models/\n/.dvc/cache\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=workspace, check=True)
    ran: list[Any] = []
    launch = ("prefscan", "launch", "--dirty")

    def run(folder: Path, *arguments: str) -> float:
        assert folder != workspace
        assert not (folder / "data").exists() or arguments == launch
        ran.append(arguments)
        for cell in load(folder / "params.yaml").grid.cells:
            write_json(folder / f"metrics/answer/{cell.key}.json", {"mean_tokens": 4.5, "questions": 8})
        return 8.0

    def loop(folder: Path, keys: list[str]) -> list[dict[str, Any]]:
        ran.append(keys)
        return loop_of(keys)

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.setattr(sweep, "study_loop", loop)
    result = sweep.compare(workspace, limit)
    assert ran == [("dvc", "repro", "fetch"), launch, ["ipo-0.1-3", "kto_pair-0.1-3"][:limit]]
    assert result["cells"] == 2
    assert result["ours"] == {"seconds": 8.0, "generated_tokens": 144}
    assert (result["study"]["seconds"], result["study"]["extrapolated"]) == (study, extrapolated)
    assert result["ratio"] == 3
    sweep.show(result, Console(width=120))
    assert ("extrapolated from 1 of 2 cells" in capsys.readouterr().out) == extrapolated


def test_a_paid_judge_is_refused(workspace: Path) -> None:
    params = yaml.safe_load((ROOT / "conf/judge/gpt4.yaml").read_text())
    write_params(workspace, judge=params)
    with pytest.raises(UserError, match=r"^judge\.kind: 'openai'"):
        sweep.compare(workspace, None)


def test_losses_of_other_trainers_are_refused(workspace: Path) -> None:
    write_params(workspace, loss="ipo", beta=0.1, steps=3, grid=GRID | {"loss": ["ipo", "kto", "cpo"]})
    with pytest.raises(UserError, match=r"^grid\.loss: stock TRL's DPOTrainer has no cpo, kto; take them out"):
        sweep.compare(workspace, None)
