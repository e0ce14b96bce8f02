"""The stages of a cell of the study, run as they are on a tiny model; no clock is compared."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import study_cell
from mtbench_data import make_questions, write_questions
from prefscan.common.errors import UserError
from tiny import write_rows


@pytest.fixture
def workspace(prepared: Path, pairs: list[dict[str, Any]]) -> Path:
    write_rows(prepared / "data/pairs/heldout.jsonl", pairs[:4])
    write_questions(prepared, make_questions())
    return prepared


def test_it_needs_a_gpu(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study_cell"])
    with pytest.raises(UserError, match=r"mistral-7b needs a CUDA GPU"):
        study_cell.main()


@pytest.mark.slow
def test_each_stage_leaves_its_line_and_figures(
    workspace: Path, wide_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def small(shape: str, vocabulary: int) -> Iterator[Path]:
        yield Path(shutil.copytree(wide_model, "weights")).absolute()

    monkeypatch.setattr(study_cell, "base_model", small)
    monkeypatch.setattr(study_cell.torch.cuda, "mem_get_info", lambda: (2**31, 2**32))
    words = ["--steps", "2", "--max-new-tokens", "5", "--rows", "3,auto", "--json", "result.json"]
    monkeypatch.setattr(sys, "argv", ["study_cell", *words])
    study_cell.main()
    result = json.loads(Path("result.json").read_text())
    stages = result["stages"]
    assert list(stages) == [
        *("reference train", "reference heldout", "train", "merge"),
        *("answer, 3 at once", "answer, auto at once"),
    ]
    assert all(stage["seconds"] > stage.get("within", 0) for stage in stages.values())
    of_tokens = {name for name, stage in stages.items() if "tokens_per_second" in stage}
    assert of_tokens == {"train", "answer, 3 at once", "answer, auto at once"}
    printed = capfd.readouterr().out
    assert "sigmoid-0.1-2, answers of 5 tokens a turn" in printed
    assert all(f"{name}: {stage['seconds']:.0f} s, 0.0 GiB of the GPU" in printed for name, stage in stages.items())
