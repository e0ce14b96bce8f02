"""What is left to judge and what it may cost, against stages that really ran."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chat_server import chat_server, completion
from mtbench_data import (
    ROOT,
    default_params,
    local_judge,
    make_answers,
    make_questions,
    openai_judge,
    write_lines,
    write_params,
    write_questions,
)
from prefscan.common.config import Params, load
from prefscan.common.errors import UserError
from prefscan.common.io import read_jsonl
from prefscan.judging.fastchat import select_questions
from prefscan.launch import forecast
from prefscan.repo.pipeline import CELL_STAGES
from prefscan.reporting.power import Design, detectable, measured_variances
from prefscan.stages import judge_check, mtbench
from reward_data import PROMPTS, REPLIES, SETTINGS, write_evaluation

EVERY = make_questions(2)  # the judge check swaps answers within a category
QUESTIONS = select_questions(EVERY, 8)  # those that are answered
# Of six questions the good answer and four bad ones, and six repeats. Good and swapped ones are equal in this data, and
# asked once.
CHECK = 6 * 4 + 5
CELL = "sigmoid-0.1-24"


def prepare(root: Path, judge: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFSCAN_TEST_KEY", "sk-test")
    monkeypatch.setenv("COLUMNS", "120")
    grid = {"loss": ["sigmoid"], "beta": [0.1], "steps": [24]}
    write_params(root, judge=judge, grid=grid, stages={"mtbench": grid}, loss="sigmoid", beta=0.1, steps=24)
    write_questions(root, EVERY)
    (root / "conf").symlink_to(ROOT / "conf")


def planned(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, list[str]]:
    """The printed numbers by model."""
    capsys.readouterr()
    forecast.main([*overrides], workers=None)
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip().replace(",", "") for cell in row[1:]] for row in rows}


def most_tokens(requests: list[dict[str, Any]]) -> int:
    return sum(len(message["content"].encode()) + 16 for request in requests for message in request["messages"])


@pytest.fixture(autouse=True)
def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to run needs a DVC repository: launch/test_estimate.py and pipeline/test_repro.py have that."""
    monkeypatch.setattr(forecast, "stale_stages", lambda **_: [])
    monkeypatch.setattr(forecast, "check_root", lambda: None)


@pytest.mark.parametrize("mode", ["single", "pair"])
def test_what_is_judged_is_no_longer_planned(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    prices = {"input": 10.0, "output": 100.0}
    with chat_server(lambda *_: completion("[[5]]" if mode == "single" else "[[C]]")) as server:
        against = CELL if mode == "pair" else "base"
        judge = openai_judge(server.url, mode=mode, against=against, samples=2, prices=prices)
        prepare(in_tmp, judge, monkeypatch)
        for key in ("base", CELL):
            write_lines(in_tmp / f"data/mt_bench/model_answer/{key}.jsonl", make_answers(QUESTIONS, key))
        calls = 16 * 2 * (2 if mode == "pair" else 1)
        before = planned(capsys)
        assert before["base"][0] == str(calls)
        assert before[CELL][0] == str(0 if mode == "pair" else calls)
        mtbench.main("base")
        sent = server.requests[:]
        assert len(sent) == calls
        judge_check.main()
        of_check = server.requests[calls:]
    most = most_tokens(sent)
    assert before["base"][1:3] == [str(most), str(calls * 64)]
    assert float(before["base"][3]) == pytest.approx((most * 10 + calls * 64 * 100) / 1e6, abs=0.005)
    after = planned(capsys)
    assert after["base"] == after["judge check"] == ["0", "0", "0", "0.00"]
    assert after["all"] == after[CELL] == before[CELL]
    assert before["judge check"][:2] == [str(len(of_check)), str(most_tokens(of_check))]


def test_a_plan_before_any_answer_bounds_what_is_then_asked(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other parameters of the answers, those in the workspace do not count, nor do stale ones."""
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1"), monkeypatch)
    nothing = planned(capsys)
    assert nothing["all"][0] == str(32 + CHECK)
    assert nothing["all"][3] == "no judge.prices"
    write_lines(in_tmp / "data/mt_bench/model_answer/base.jsonl", make_answers(QUESTIONS))
    there = planned(capsys)
    assert int(there["base"][1]) < int(nothing["base"][1]) == int(there[CELL][1])
    with monkeypatch.context() as patch:
        patch.setattr(forecast, "stale_stages", lambda **_: ["answer-base", "mtbench-base"])
        assert planned(capsys) == nothing
    params = yaml.safe_load(Path("params.yaml").read_text())
    composed = planned(capsys, "judge=gpt4", f"answer.max_new_tokens={params['answer']['max_new_tokens'] + 1}")
    assert composed["base"][0] == "16"
    assert int(composed["base"][1]) > int(there["base"][1])


@pytest.mark.parametrize("mode", ["single", "pair"])
def test_stale_answers_to_compare_with_make_a_pair_of_answers_stale(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1", mode=mode, against="base"), monkeypatch)
    nothing = planned(capsys)
    for key in ("base", CELL):
        write_lines(in_tmp / f"data/mt_bench/model_answer/{key}.jsonl", make_answers(QUESTIONS, key))
    there = planned(capsys)
    assert there[CELL] != nothing[CELL]
    monkeypatch.setattr(forecast, "stale_stages", lambda **_: ["answer-base"])
    assert planned(capsys)[CELL] == (nothing if mode == "pair" else there)[CELL]


def test_the_study_is_planned_before_its_data_is_there(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    write_questions(in_tmp, make_questions(10))
    found = planned(capsys, "+experiment=openhermes", "judge.budget=5")
    assert len(found) == 54 + 3
    assert found["all"][0] == str(55 * 160 + 16 * 4 + 5)


def test_missing_questions_are_named_with_the_one_stage_that_fetches_them(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    shutil.rmtree(in_tmp / "data/questions")
    with pytest.raises(UserError, match=r"^data/questions is missing; `dvc repro fetch@questions` fetches it"):
        planned(capsys, "judge=gpt4")


def test_a_local_judge_costs_nothing(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    assert planned(capsys) == {}
    forecast.main([], workers=None)
    printed = capsys.readouterr().out
    assert "1 cells and the base, 8 questions: 32 replies to judge" in printed
    assert "costs nothing" in printed


def test_what_was_spent_is_shown(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"input": 1.0, "output": 1.0}
    prepare(in_tmp, openai_judge("http://127.0.0.1:9/v1", prices=prices, budget=2.5), monkeypatch)
    ledger = in_tmp / ".prefscan/judgements/spending.jsonl"
    write_lines(ledger, [{"judge": "a", "usd": 0.75}, {"judge": "b", "usd": 1}])
    forecast.main([], workers=None)
    said = capsys.readouterr().out
    assert "Spent so far: 1.75 USD; judge.budget 2.50 USD." in said
    assert "on average" not in said
    write_lines(ledger, [{"judge": "gpt-4", "usd": 0.01}, {"judge": "b", "usd": 1}, {"judge": "gpt-4", "usd": 0.03}])
    forecast.main([], workers=None)
    assert "2 requests to gpt-4 cost 0.0200 USD on average; at that, 61 calls would cost about 1.22 USD." in " ".join(
        capsys.readouterr().out.split()
    )


def known_reward(root: Path, **changes: Any) -> Params:
    """The parameters of the small evaluation of reward_data.py, whose files are not there."""
    write_params(root, **(SETTINGS | {"judge": local_judge("models/base"), "loss": "sigmoid", "beta": 0.5} | changes))
    return load(root / "params.yaml")


GRID = {"loss": ["sigmoid", "ipo", "hinge"], "beta": [0.1, 0.2, 0.5], "steps": [8]}


def numbers(sentence: str) -> list[str]:
    return re.findall(r"\d\.\d{3}", sentence)


def test_the_detectable_difference_is_the_designs(in_tmp: Path) -> None:
    """On assumed variances, and on those of the workspace's replies where they are there."""
    params = known_reward(in_tmp, grid=GRID, steps=8)
    design = Design(losses=3, betas=3, steps=1, seeds=1, prompts=PROMPTS, replies=REPLIES)
    (assumed,) = forecast.power_sentences(params, params)
    assert numbers(assumed) == [f"{value:.3f}" for value in detectable(design, forecast.ASSUMED)]
    assert "assumed" in assumed
    write_evaluation(in_tmp)
    workspace = load()
    (measured,) = forecast.power_sentences(params, workspace)
    rewards: dict[str, list[Any]] = {}
    for cell in workspace.grid.cells:
        rows = read_jsonl(in_tmp / f"data/replies/{cell.key}.jsonl")
        rewards.setdefault(cell.loss, []).append([[reply["score"] for reply in row["replies"]] for row in rows])
    variances = measured_variances(np.array([*rewards.values()]))
    assert numbers(measured) == [f"{value:.3f}" for value in detectable(design, variances)]
    assert "assumed" not in measured
    assert numbers(measured) != numbers(assumed)
    (in_tmp / "data/replies/ipo-0.5-8.jsonl").unlink()
    assert forecast.power_sentences(params, workspace) == [assumed]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": GRID | {"loss": ["sigmoid"]}}, "One loss"),
        ({"grid": GRID | {"beta": [0.5]}}, "sweep.beta"),
        ({"grid": GRID, "seeding": "shared"}, "seeding: shared"),
    ],
)
def test_a_design_that_detects_nothing_says_so(in_tmp: Path, changes: dict[str, Any], said: str) -> None:
    params = known_reward(in_tmp, steps=8, **changes)
    (sentence,) = forecast.power_sentences(params, params)
    assert said in sentence
    assert numbers(sentence) == []


def test_given_pairs_have_no_reward_to_detect_a_difference_in(params: Params) -> None:
    assert forecast.power_sentences(params, params) == []


def test_no_workers_are_refused() -> None:
    with pytest.raises(UserError, match="--workers 0: one at least"):
        forecast.main([], workers=0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("judge=gpt2", "Could not find 'judge/gpt2'"),
        ("judge.nonsense=1", "Could not override 'judge.nonsense'"),
        ("beta", "missing EQUAL"),
        ("beta=", "beta: '' is refused"),
        ("beta=${foo}", "Interpolation key 'foo' not found"),
        ('sweep.loss="sigmoid, [ipo"', "'[ipo' is no"),
        ("sweep.beta=0.1,0.5", "double quotes, as in 'sweep.beta=\"0.1, 0.5\"'"),
        ("beta=-1", "beta=-1: beta: -1 is refused"),
        ("loss=dpo", "loss=dpo: grid.loss: 'dpo' is no known loss; known are sigmoid"),
    ],
)
def test_a_wrong_override_is_a_sentence(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        forecast.main([override], workers=None)
    assert str(caught.value).startswith(f"{override}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"beta: [0.1", "name: caf\u00e9".encode("latin-1")], ids=["no YAML", "no UTF-8"])
def test_a_damaged_file_of_conf_is_a_sentence(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    prepare(in_tmp, local_judge("models/base"), monkeypatch)
    (in_tmp / "conf").unlink()
    shutil.copytree(ROOT / "conf", in_tmp / "conf")
    (in_tmp / "conf/model/smollm2.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"seed=1: .*; correct the override, or the file of conf/") as caught:
        forecast.main(["seed=1"], workers=None)
    assert "\n" not in str(caught.value)


def test_the_cells_of_a_changed_hyperparameter_are_left_and_no_others(in_tmp: Path) -> None:
    write_params(in_tmp, steps=8, grid={"loss": ["sigmoid", "simpo"], "steps": [8]})
    workspace = load()
    grid = {"loss": ["sigmoid", "simpo"], "steps": [8]}
    sections = default_params()["losses"] | {"simpo": {"gamma": 1.0}}
    write_params(in_tmp, steps=8, grid=grid, losses=sections, runtime={"gradient_checkpointing": True})
    params = load()
    assert params.runtime != workspace.runtime
    assert forecast.models_settings(params) == forecast.models_settings(workspace)
    keys = [cell.key for cell in params.grid.cells if cell.loss == "simpo"]
    assert forecast.retrained(params, workspace) == [f"{stage}@{key}" for key in keys for stage in CELL_STAGES]
    assert forecast.retrained(params, params) == []
