"""No key of a row that may change its meaning is ignored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.config import Data, PackagePairs
from prefscan.common.errors import UserError
from prefscan.data.pairs import parse_pair, prepare, read_rows, tokenize
from prefscan.models.loading import load_tokenizer
from tiny import CHAT_TEMPLATE, sharegpt_rows, write_rows

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "5?"}
ROW: dict[str, Any] = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": "two", "right": "zwölf"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
# As templates with support for tools and thought have it.
RICH = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def rich(tiny_model: Path) -> Any:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = RICH
    return tokenizer


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Callable[..., Any]:
    source = PackagePairs(
        kind="package", requirement="demo==1", archive="wheel", sha256="0" * 64, train="a.json", heldout="b.json"
    )
    data = Data(
        name="demo",
        source=source,
        folder="data/raw",
        max_prompt_length=4000,
        max_length=8000,
        heldout_share=0.3,
        heldout_max=None,
    )

    def run(rows: list[Any], tokenizer: Any = None, positions: int | None = None) -> Any:
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        write_rows(tmp_path / "raw/train/pairs.jsonl", rows)
        return prepare(data, tokenizer or load_tokenizer(tiny_model), tmp_path / "raw", positions)

    return run


# Keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        ROW | {"images": ["a.png"]},
        ROW | {"margin": 2.0},
        ROW | {"chat_template_kwargs": {"enable_thinking": False}},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5", "history": [["Hi", "Hello"]]},
        sharegpt_rows(1)[0] | {"label": False},
        ROW | {"chosen": [USER, GOOD | {"weight": 0}]},
        ROW | {"chosen": [USER | {"name": "Ann"}, GOOD], "rejected": [USER | {"name": "Ann"}, BAD]},
        ROW | {"chosen": [USER, GOOD | {"audio": {"id": "a"}}]},
    ],
    ids=lambda row: "-".join(sorted(row)),
)
def test_a_key_that_may_change_the_meaning_is_refused_by_name_and_row(row: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        parse_pair(row, "a.jsonl, row 7")
    assert str(caught.value).startswith("a.jsonl, row 7: ")
    named = ("images", "margin", "chat_template_kwargs", "history", "label", "weight", "name", "audio")
    assert any(f"'{key}'" in str(caught.value) for key in named)


def test_keys_that_say_where_a_row_comes_from_change_nothing() -> None:
    extras = {"id": 3, "source": "somewhere", "score_chosen": 9.0, "prompt_id": "ab", "tools": None, "images": []}
    restated = {"prompt": USER["content"], "messages": ROW["chosen"]}  # as UltraFeedback's rows have them
    assert parse_pair(ROW | extras | restated, "row") == parse_pair(ROW, "row")


# Tools, calls and thought -------------------------------------------------------------------------


def test_tools_calls_and_thought_are_rendered_by_a_template_that_has_them(rich: Any) -> None:
    chosen, rejected = GOOD | {"content": None, "tool_calls": [CALL]}, BAD | {"reasoning_content": "Let me see"}
    row = {"tools": [TOOL], "chosen": [USER, chosen], "rejected": [USER, rejected]}
    found = tokenize(parse_pair(row, "row"), rich)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        whole = rich.apply_chat_template([USER, answer | {"content": answer["content"] or ""}], tools=[TOOL])
        assert found["prompt_ids"] + found[f"{name}_ids"] == whole["input_ids"]
    assert '"description": "Adds."' in found["prompt"]
    assert "zwölf" in found["chosen"]
    assert found["rejected"].startswith("<think>Let me see</think>5?")


def test_a_conversation_with_a_tools_reply_keeps_every_turn(rich: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "four!"}]
    row = {"tools": json.dumps([TOOL]), "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    found = tokenize(parse_pair(row, "row"), rich)
    prompt = rich.apply_chat_template(turns, tools=[TOOL], add_generation_prompt=True)["input_ids"]
    assert found["prompt_ids"] == prompt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"tools": [TOOL]}, r"tools \(add\)"),
        (ROW | {"chosen": [USER, GOOD | {"tool_calls": [CALL]}]}, "tool_calls of the assistant's turn"),
        (ROW | {"chosen": [USER, GOOD | {"reasoning_content": "Hm"}]}, "reasoning_content of the assistant's turn"),
        # Rows in which nothing else differs.
        ({"chosen": [USER, GOOD | {"reasoning_content": "Hm"}], "rejected": [USER, GOOD]}, "reasoning_content of the"),
        (
            {
                "chosen": [USER, GOOD | {"tool_calls": [CALL]}],
                "rejected": [USER, GOOD | {"tool_calls": [CALL | {"function": {"name": "sub", "arguments": {}}}]}],
            },
            "tool_calls of the assistant's turn",
        ),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_row(row: Any, reason: str, run: Callable[..., Any]) -> None:
    rows = [*sharegpt_rows(20), row]
    with pytest.raises(UserError, match=rf"pairs\.jsonl, row 21: pair \w+: the chat template leaves out {reason}"):
        run(rows)


def test_rows_in_which_only_the_thought_differs_are_pairs_where_the_template_renders_it(
    run: Callable[..., Any], rich: Any
) -> None:
    rows = [
        {
            "chosen": [USER | {"content": f"{i}?"}, GOOD | {"reasoning_content": "Well"}],
            "rejected": [USER | {"content": f"{i}?"}, GOOD | {"reasoning_content": "Oh"}],
        }
        for i in range(20)
    ]
    train, heldout, metrics = run(rows, rich)
    assert len(train) + len(heldout) == 20
    assert all("<think>Well</think>It is 4." in row["chosen"] for row in train)
    assert metrics["dropped"]["identical"] == 0


# TRL's explicit prompt ----------------------------------------------------------------------------


@pytest.mark.parametrize("repeated", [[], [USER], [SYSTEM, USER]])
def test_an_explicit_prompt_is_the_prompt(repeated: list[Any]) -> None:
    row = {"prompt": [SYSTEM, USER], "chosen": [*repeated, GOOD], "rejected": [*repeated, BAD]}
    pair = parse_pair(row, "row")
    assert pair.messages == [SYSTEM, USER]
    assert (pair.chosen, pair.rejected) == ("It is 4.", "5?")


def test_an_explicit_prompt_gives_trls_tokens(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    row = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
    config = DPOConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    theirs = DPOTrainer._prepare_dataset(None, Dataset.from_list([row]), tokenizer, config, "train")[0]
    ours = tokenize(parse_pair(row, "row"), tokenizer)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, {"role": "user", "content": "3 + 3?"}]} | ROW,
        {"prompt": "3 + 3?"} | ROW,
        sharegpt_rows(1)[0] | {"prompt": "something else"},
        ROW | {"messages": [USER, {"role": "assistant", "content": "A third answer"}]},
    ],
)
def test_a_prompt_that_contradicts_the_lists_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^a\.jsonl, row 7: .*(contradicts|no turn of the user's|neither chosen nor)"):
        parse_pair(row, "a.jsonl, row 7")


# Files --------------------------------------------------------------------------------------------

LINES = "".join(json.dumps(row) + "\n" for row in sharegpt_rows(3))


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        "\ufeff" + LINES,
        json.dumps(sharegpt_rows(3)),
        "\ufeff" + json.dumps(sharegpt_rows(3), indent=1),
        LINES.replace("\n", "\r\n"),
    ],
    ids=["lines", "lines after a byte order mark", "list", "indented list after a mark", "lines of Windows"],
)
def test_lists_and_lines_are_read_under_either_name(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert [row for _, row in read_rows(tmp_path)] == sharegpt_rows(3)


@pytest.mark.parametrize(("name", "place"), [("pairs.json", ", line 4"), ("pairs.jsonl", ", line 4")])
def test_a_file_that_is_cut_short_is_refused_with_its_line(name: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LINES + '{"conversations": [')
    with pytest.raises(UserError, match=rf"{name}{place} is not JSON: .* may be cut short"):
        list(read_rows(tmp_path))


# Lengths ------------------------------------------------------------------------------------------


def test_a_pair_beyond_the_models_positions_is_refused(run: Callable[..., Any]) -> None:
    train, heldout, _ = run(sharegpt_rows(24))
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in train + heldout
    )
    run(sharegpt_rows(24), positions=longest)
    with pytest.raises(
        UserError,
        match=rf"row \d+: the pair has {longest} tokens, and the model was made for {longest - 1} .*"
        rf"set data\.max_length to {longest - 1} or less",
    ):
        run(sharegpt_rows(24), positions=longest - 1)


def test_the_templates_own_trim_makes_alike_answers_identical(run: Callable[..., Any], tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    rows = sharegpt_rows(24)
    alike = rows[0] | {"chosen": {"from": "gpt", "value": "Oslo"}, "rejected": {"from": "gpt", "value": "Oslo\n"}}
    train, heldout, metrics = run([*rows, alike], tokenizer)
    assert metrics["dropped"]["identical"] == 1
    assert len(train) + len(heldout) == 24
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in train + heldout)
