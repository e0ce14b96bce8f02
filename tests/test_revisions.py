"""What git holds of a revision is read as it was committed, and what is missing is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from git_data import branch, git, make_repository
from prefscan.errors import UserError
from prefscan.revisions import changed, judge_of, leaves, read_revision, settings
from sweep_data import CATEGORY_OF, CELLS

ROOT = Path(__file__).parent.parent
OPENAI = yaml.safe_load((ROOT / "conf/judge/gpt4.yaml").read_text())


@pytest.fixture
def repository(in_tmp: Path, reported: Path) -> Path:
    make_repository(reported)
    return in_tmp


def test_a_branch_and_the_workspace_are_read_apart(repository: Path, reported: Path) -> None:
    branch("other", lambda params: params.update(seed=7), lambda scores: scores.assign(base=scores["base"] + 1))
    main, other = read_revision("main"), read_revision("other")
    mean = json.loads((reported / "metrics/mtbench/base.json").read_text())["questions"]
    assert main.scores["base"].to_dict() == {int(n): pytest.approx(score, abs=1e-6) for n, score in mean.items()}
    assert (other.scores["base"] - main.scores["base"]).to_list() == pytest.approx([1.0] * len(CATEGORY_OF))
    assert (main.name, main.recipe, main.pins) == ("main", "sigmoid-0.5-8", {"torch": "2.13.0", "trl": "1.16.0"})
    assert list(main.scores.columns) == ["category", "base", *CELLS]
    assert changed(settings(main), settings(other)) == {"seed": (main.params["seed"], 7)}
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace(f"seed: {main.params['seed']}", "seed: 11"))
    assert read_revision(None).params["seed"] == 11
    assert read_revision("main").params == main.params


@pytest.mark.usefixtures("repository")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"^nowhere: .*; name a branch, tag or commit$"):
        read_revision("nowhere")
    git("checkout", "--quiet", "-b", "old")
    git("rm", "--quiet", "reports/questions.csv")
    git("commit", "--quiet", "--message", "old")
    with pytest.raises(UserError, match=r"^old has no reports/questions\.csv in git; run `dvc repro` there"):
        read_revision("old")
    with pytest.raises(UserError, match=r"^reports/questions\.csv is missing; run `dvc repro`"):
        read_revision(None)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("name", ["params.yaml", "metrics/summary.json", "reports/questions.csv"])
def test_a_committed_file_that_cannot_be_read_is_named(name: str) -> None:
    branch("broken", files={name: "{\x00: ["})
    with pytest.raises(UserError, match=r"^broken: "):
        read_revision("broken")


def test_leaves_have_dotted_names_and_lists_are_values() -> None:
    assert dict(leaves({"a": {"b": 1, "c": [1, 2]}, "d": None})) == {"a.b": 1, "a.c": [1, 2], "d": None}
    assert changed({"a.b": 1, "c": 2}, {"a.b": 3, "d": 4}) == {"a.b": (1, 3), "c": (2, None), "d": (None, 4)}


@pytest.mark.usefixtures("repository")
def test_the_settings_are_what_decides_a_cells_result() -> None:
    found = settings(read_revision("main"))
    assert (found["judge.name"], found["trl"]) == ("tiny", "1.16.0")
    assert not [name for name in found if name.startswith(("grid", "sweep")) or name in ("loss", "beta", "steps")]


@pytest.mark.usefixtures("repository")
def test_how_a_result_is_reached_is_no_setting_of_it() -> None:
    def change(params: Any) -> None:
        params["judge"] = OPENAI | {"budget": 50.0, "concurrency": 2}
        params["train"]["report_to"] = "wandb"

    branch("first", lambda params: params.update(judge=OPENAI))
    branch("second", change)
    first, second = read_revision("first"), read_revision("second")
    assert changed(settings(first), settings(second)) == {}
    assert changed(settings(read_revision("main")), settings(first))["judge.kind"] == ("local", "openai")


@pytest.mark.usefixtures("repository")
def test_a_local_judge_is_its_weights_and_one_behind_an_api_its_name() -> None:
    main = judge_of(read_revision("main"))
    branch("renamed", lambda params: params["judge"].update(name="other"))
    branch("larger", lambda params: params["model"]["source"].update(file="larger.gguf"))
    branch("elsewhere", lambda params: params["judge"].update(folder="judges/large"))
    assert judge_of(read_revision("renamed")) == main
    assert list(changed(main, judge_of(read_revision("larger")))) == ["model.source.file"]
    assert "judge.folder" in changed(main, judge_of(read_revision("elsewhere")))
    branch("gpt4", lambda params: params.update(judge=OPENAI))
    branch("gpt5", lambda params: params.update(judge=OPENAI | {"name": "gpt-5", "folder": "judges/large"}))
    gpt4, gpt5 = judge_of(read_revision("gpt4")), judge_of(read_revision("gpt5"))
    assert changed(gpt4, gpt5) == {"judge.name": ("gpt-4", "gpt-5")}
