"""The stage and what it fetches: each kind of reward from its source to models/reward and metrics/reward.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.workspace import make_wheel
from prefscan.common.config import RewardSettings
from prefscan.common.errors import UserError
from prefscan.common.paths import RAW_REWARD, REWARD, REWARD_METRICS
from prefscan.data.sources import fetch_reward
from prefscan.rewards.reward import load_reward
from prefscan.stages import reward as stage
from review_data import review_rows, write_reviews
from tiny import make_reward_model, write_rows

REPOSITORY = Path(__file__).parents[2]
CONF = sorted(path for path in (REPOSITORY / "conf/reward").glob("*.yaml") if path.stem != "none")
IFEVAL = {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def settings(kind: str, **changes: Any) -> Any:
    """A shipped configuration, with changes."""
    files = {"sentiment": "sentiment", "model": "model", "checkable": "ifeval"}
    raw = yaml.safe_load((REPOSITORY / f"conf/reward/{files[kind]}.yaml").read_text())
    return TypeAdapter(RewardSettings).validate_python(raw | changes)


def run(monkeypatch: pytest.MonkeyPatch, params: Any, chosen: Any) -> dict[str, Any]:
    monkeypatch.setattr(stage, "load", lambda: params.model_copy(update={"reward": chosen}))
    stage.main()
    metrics: dict[str, Any] = json.loads(REWARD_METRICS.read_text())
    return metrics


@pytest.mark.usefixtures("in_tmp")
def test_sentiment(monkeypatch: pytest.MonkeyPatch, params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_reviews(Path("mine.csv"), review_rows(360))
    source = {"kind": "file", "file": "mine.csv"}
    chosen = settings("sentiment", source=source, excerpt_words=20, check_share=0.3, prompts_share=0.2)
    fetch_reward(chosen)
    metrics = run(monkeypatch, params, chosen)
    before = {path.name: path.read_bytes() for path in REWARD.iterdir()}
    assert metrics["kind"] == "sentiment"
    assert metrics["score"] == "P(positive)"
    assert metrics["check"]["excerpts"]["auc"]["low"] > 0.6
    assert "reward sentiment: AUC 0." in capsys.readouterr().out
    good, bad = load_reward(chosen, REWARD).scores(["p", "p"], ["wonderful and moving", "dull and awful"])
    assert good > 0.5 > bad
    run(monkeypatch, params, chosen)
    assert {path.name: path.read_bytes() for path in REWARD.iterdir()} == before


@pytest.mark.usefixtures("in_tmp")
def test_model(monkeypatch: pytest.MonkeyPatch, params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make_reward_model(Path("mine"))
    Path("mine/modeling_own.py").write_text("raise SystemExit")
    write_rows(Path("pairs.jsonl"), [{"prompt": "q", "chosen": "yes", "rejected": "no " * i} for i in range(1, 9)])
    source = {"kind": "folder", "folder": "mine"}
    chosen = settings("model", source=source, dtype="fp32", pairs="pairs.jsonl")
    fetch_reward(chosen)
    assert not (RAW_REWARD / "modeling_own.py").exists()
    metrics = run(monkeypatch, params, chosen)
    assert metrics["check"]["pairs"] == 8
    assert metrics["parameters"] > 1000
    assert "on 8 pairs with known order" in capsys.readouterr().out
    assert len(load_reward(chosen, REWARD).utilities(["q"], ["yes"])) == 1
    assert run(monkeypatch, params, chosen.model_copy(update={"pairs": None}))["check"] is None
    assert "not checked (reward.pairs: null)" in capsys.readouterr().out


@pytest.mark.usefixtures("in_tmp")
def test_checkable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unusable = IFEVAL | {"prompt": "Many.", "instruction_id_list": ["length_constraints:number_sentences"]}
    lines = "".join(json.dumps(row) + "\n" for row in (IFEVAL, unusable))
    source = make_wheel(tmp_path, "demo", {"demo/prompts.jsonl": lines}) | {"file": "demo/prompts.jsonl"}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    chosen = settings("checkable", source=source)
    fetch_reward(chosen)
    metrics = run(monkeypatch, params, chosen)
    assert (metrics["prompts"], metrics["left_out"]) == (1, {"download": 1})
    assert "1 prompts with 1 instructions of 1 kinds, 1 prompts left out" in capsys.readouterr().out
    assert load_reward(chosen, REWARD).scores(["Write."] * 2, ["No comma", "One, two"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"length_constraints:number_sentences cannot be checked"):
        run(monkeypatch, params, chosen.model_copy(update={"unusable": "refuse"}))


@pytest.mark.usefixtures("in_tmp")
def test_what_is_missing_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch, params: Any) -> None:
    with pytest.raises(UserError, match="reward: null, so there is none to make"):
        run(monkeypatch, params, None)
    with pytest.raises(UserError, match=r"nowhere\.csv is no file; correct reward\.source\.file"):
        fetch_reward(settings("sentiment", source={"kind": "file", "file": "nowhere.csv"}))
    model = settings("model", source={"kind": "folder", "folder": "nowhere"})
    with pytest.raises(UserError, match=r"nowhere is no folder; correct reward\.source\.folder"):
        fetch_reward(model)
    Path("nowhere").mkdir()
    with pytest.raises(UserError, match="has no safetensors file"):
        fetch_reward(model)
    assert not RAW_REWARD.exists()


@pytest.mark.parametrize("path", CONF, ids=[path.stem for path in CONF])
def test_each_shipped_configuration_is_valid(path: Path) -> None:
    TypeAdapter(RewardSettings).validate_python(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sentiment", {"check_share": 0.5, "prompts_share": 0.5}),
        ("sentiment", {"check_share": 0.0}),
        ("sentiment", {"excerpt_words": 0}),
        ("sentiment", {"split_seed": -1}),
        ("sentiment", {"source": {"kind": "hub", "repo": "a/b", "revision": "0" * 40}}),
        ("model", {"dtype": "fp64"}),
        ("model", {"batch_size": 0}),
        ("model", {"source": {"kind": "hub", "repo": "a/b", "revision": "main"}}),
        ("model", {"trust_remote_code": True}),
        ("checkable", {"unusable": "ignore"}),
        ("checkable", {"name": ""}),
    ],
)
def test_bad_values_are_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(kind, **changes)
