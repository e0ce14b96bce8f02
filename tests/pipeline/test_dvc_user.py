"""What a DVC user sees of this repository: plots, metrics, experiments, the data folder, a file as data source."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from git_data import git
from prefscan.common.config import FilePairs
from prefscan.common.errors import UserError
from prefscan.common.io import rounded
from prefscan.data.sources import fetch_pairs

ROOT = Path(__file__).parents[2]
# README's line for a table of experiments.
SHOW = r"exp show --drop '.*' --keep '^(Experiment|rev|loss|beta|steps|seed|recipe\.(gain|kl|score|accuracy|margin))$'"


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(in_tmp: Path, reported: Path) -> Path:
    """This repository's pipeline with the small sweep's reports, as a fresh clone has them: without DVC's cache."""
    for name in ("dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".gitignore", "data/.gitignore"):
        Path(name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, name)
    for name in ("params.yaml", "reports", "metrics/summary.json", "metrics/judge.json"):
        Path(name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (reported / name).is_dir() else shutil.copy)(reported / name, name)
    git("init", "--quiet", "--initial-branch", "main")
    git("add", "--all")
    git("commit", "--quiet", "--message", "main")
    return in_tmp


def changed() -> None:
    """Other numbers in all that git holds."""
    for path in (*Path("reports").glob("*.csv"), Path("metrics/summary.json"), Path("metrics/judge.json")):
        path.write_text(re.sub(r"\d\.\d+", lambda found: f"{float(found[0]) + 1:.3g}", path.read_text()))


@pytest.mark.usefixtures("repository")
def test_plots_are_one_chart_a_subject_with_title_axes_and_cells_by_name() -> None:
    shown = json.loads(dvc("plots", "show", "--json"))["data"]
    assert set(shown) == {next(iter(plot)) for plot in yaml.safe_load(Path("dvc.yaml").read_text())["plots"]}
    cells = pd.read_csv("reports/curves.csv")["cell"].unique()
    for name, charts in shown.items():
        assert len(charts) == 1, name
        chart = json.loads(charts[0]["content"]) if isinstance(charts[0]["content"], str) else charts[0]["content"]
        encoding = str(chart)
        assert chart["title"]["text"], name
        if "every cell" in name:
            assert "'field': 'cell'" in encoding
            assert all(cell in encoding for cell in cells)
    changed()
    diff = json.loads(dvc("plots", "diff", "main", "--json"))["data"]["Training loss of the recipe"]
    assert len(diff) == 1
    assert set(diff[0]["revisions"]) == {"main", "workspace"}


@pytest.mark.usefixtures("repository")
def test_metrics_diff_fits_a_screen() -> None:
    changed()
    diff = dvc("metrics", "diff", "main").splitlines()
    assert 5 < len(diff) <= 60
    assert any("recipe." in line for line in diff)


@pytest.mark.usefixtures("repository")
def test_the_line_for_experiments_fits_120_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = dvc(*shlex.split(SHOW), "--no-pager").splitlines()
    assert max(map(len, shown)) <= 120
    assert {"Experiment", "recipe.score", "beta"} <= set(" ".join(shown).split())


def test_the_data_folder_is_in_a_clone_with_dvcs_gitignore(repository: Path) -> None:
    git("clone", "--quiet", ".", "../clone")
    assert Path("../clone/data/.gitignore").exists()
    Path("data/mine.jsonl").write_text("{}\n")
    Path("data/raw").mkdir()
    Path("data/raw/pairs.json").write_text("[]")
    dvc("add", "data/mine.jsonl")
    assert git("status", "--porcelain", "--untracked-files=all").splitlines() == ["?? data/mine.jsonl.dvc"]


def test_a_local_file_is_copied_as_the_raw_pairs(in_tmp: Path) -> None:
    source = FilePairs(kind="file", path="data/mine.jsonl")
    with pytest.raises(UserError, match=r"^data\.source\.path: data/mine\.jsonl is no file here; `dvc pull"):
        fetch_pairs(source)
    Path("data").mkdir()
    Path("data/mine.jsonl").write_text('{"conversations": []}\n')
    fetch_pairs(source)
    assert Path("data/raw/train/mine.jsonl").read_text() == '{"conversations": []}\n'


def test_numbers_in_git_have_three_digits_and_parameters_all() -> None:
    assert rounded({"a": 4.303027, "beta": 0.12345, "n": 1234, "list": [0.0669, True, None], "t": "1.23456"}) == {
        "a": 4.3,
        "beta": 0.12345,
        "n": 1234,
        "list": [0.0669, True, None],
        "t": "1.23456",
    }
    table = rounded(
        pd.DataFrame({"cell": ["base", "a"], "beta": [float("nan"), 0.12345], "score": [4.31999, float("nan")]})
    )
    assert table.to_csv(index=False) == "cell,beta,score\nbase,,4.32\na,0.12345,\n"


def test_what_git_holds_does_not_change_with_the_machines_speed_or_rounding(
    tmp_path: Path, reported: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The same sweep with every cost doubled and every measured number off by one part in ten million."""
    from prefscan.stages import report

    shutil.copytree(reported, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def off(value: object, by: float) -> object:
        if isinstance(value, dict):
            return {key: off(each, by) for key, each in value.items()}
        if isinstance(value, list):
            return [off(each, by) for each in value]
        return value * (1 + by) if isinstance(value, float) else value

    def doubled(value: object) -> object:
        return (
            {key: doubled(each) for key, each in value.items()}
            if isinstance(value, dict)
            else (value * 2 if isinstance(value, (int, float)) else value)
        )

    def held() -> dict[str, str]:
        paths = [Path("metrics/summary.json"), Path("reports/report.md"), *Path("reports").glob("*.csv")]
        return {str(path): path.read_text() for path in paths}

    results = [path for path in Path("metrics").rglob("*.json") if path.name not in ("summary.json", "judge.json")]
    for path in results:  # made-up numbers are tidy, and many lie exactly in the middle between two roundings
        path.write_text(json.dumps(off(json.loads(path.read_text()), 3.7e-4)))
    report.main()
    before = held()
    for path in results:
        read = json.loads(path.read_text())
        path.write_text(json.dumps(doubled(read) if "cost" in path.parts else off(read, 1e-7)))
    report.main()
    assert held() == before
