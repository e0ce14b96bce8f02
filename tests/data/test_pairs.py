import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from hostile import changed
from mtbench_data import default_params
from prefscan.common.config import Data, PackagePairs
from prefscan.common.errors import UserError
from prefscan.common.io import read_json, read_jsonl
from prefscan.data.pairs import Pair, is_held_out, parse_pair, prepare, tokenize
from prefscan.models.loading import load_tokenizer
from prefscan.stages.prepare import main
from tiny import CHAT_TEMPLATE, sharegpt_rows, write_rows

REPOSITORY = Path(__file__).parents[2]
SYSTEM, QUESTION, GOOD, BAD = "Be brief.", "2 + 2?", "It is 4.\n", "\n5?"


def orca(system: Any = SYSTEM, question: Any = QUESTION, chosen: Any = GOOD, rejected: Any = BAD) -> dict[str, Any]:
    return {"system": system, "question": question, "chosen": chosen, "rejected": rejected}


def ultrafeedback(*prompt: tuple[str, str], chosen: str = GOOD, rejected: str = BAD) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in prompt]
    return {
        "prompt": next((content for role, content in reversed(prompt) if role == "user"), QUESTION),
        "chosen": [*messages, {"role": "assistant", "content": chosen}],
        "rejected": [*messages, {"role": "assistant", "content": rejected}],
    }


def sharegpt(*prompt: tuple[str, str], chosen: str = GOOD, rejected: str = BAD) -> dict[str, Any]:
    return {
        "conversations": [{"from": role, "value": content} for role, content in prompt],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def limits(**changes: Any) -> Data:
    source = PackagePairs(
        kind="package", requirement="demo==1", archive="wheel", sha256="0" * 64, train="a.json", heldout="b.json"
    )
    values = {"max_prompt_length": 4000, "max_length": 8000, "heldout_share": 0.3, "heldout_max": None}
    return Data(name="demo", folder="data/raw", source=source, **{**values, **changes})


Prepared = tuple[list[Any], list[Any], dict[str, Any]]
Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    """`prepare` over rows, and held-out rows where the data set has such a file."""
    tokenizer = load_tokenizer(tiny_model)

    def run(rows: list[Any], heldout: list[Any] | None = None, **changes: Any) -> Prepared:
        raw = tmp_path / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        write_rows(raw / "train/pairs.jsonl", rows)
        if heldout is not None:
            write_rows(raw / "heldout/pairs.jsonl", heldout)
        return prepare(limits(**changes), tokenizer, raw)

    return run


# Rows ---------------------------------------------------------------------------------------------

ALIKE = [
    orca(),
    ultrafeedback(("system", SYSTEM), ("user", QUESTION)),
    sharegpt(("system", SYSTEM), ("human", QUESTION)),
    sharegpt(("human", QUESTION)) | {"system": SYSTEM},
]


@pytest.mark.parametrize("row", ALIKE)
def test_every_shape_becomes_the_same_pair(row: dict[str, Any]) -> None:
    assert parse_pair(row, "row") == Pair((("system", SYSTEM), ("user", QUESTION)), GOOD, BAD)


@pytest.mark.parametrize(
    "row", [orca(system=""), orca(system=None), {k: v for k, v in orca().items() if k != "system"}]
)
def test_without_a_system_prompt_there_is_no_system_turn(row: dict[str, Any]) -> None:
    assert parse_pair(row, "row") == Pair((("user", QUESTION),), GOOD, BAD)


def test_earlier_turns_belong_to_the_prompt() -> None:
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", QUESTION))
    names = {"user": "human", "assistant": "gpt"}
    assert parse_pair(ultrafeedback(*turns), "row").prompt == turns
    assert parse_pair(sharegpt(*((names[role], text) for role, text in turns)), "row").prompt == turns


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", [0, 1, 2])
def test_every_format_holds_the_same_pairs(suffix: str, shape: int, tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        [
            orca(),
            ultrafeedback(("system", SYSTEM), ("user", QUESTION)),
            sharegpt(("system", SYSTEM), ("human", QUESTION)),
        ][shape],
        [orca("", "é\u2028?"), ultrafeedback(("user", "é\u2028?")), sharegpt(("human", "é\u2028?"))][shape],
        [orca("", "Third?"), ultrafeedback(("user", "Third?")), sharegpt(("human", "Third?"))][shape],
    ]
    path = tmp_path / "train" / f"pairs{suffix}"
    if suffix == ".parquet":
        import pandas as pd

        path.parent.mkdir()
        pd.DataFrame(rows).to_parquet(path)
    else:
        write_rows(path, [rows] if suffix == ".json" else rows)
    train, heldout, _ = prepare(limits(heldout_share=0.9), load_tokenizer(tiny_model), tmp_path)
    ids = {parse_pair(row, "row").id for row in (orca(), orca("", "é\u2028?"), orca("", "Third?"))}
    assert {row["id"] for row in train + heldout} == ids


MALFORMED = {
    "expected an object, found list": [1],
    "expected an object, found NoneType": None,
    "the pair has no 'rejected' (keys: 'chosen', 'question', 'system')": {
        k: v for k, v in orca().items() if k != "rejected"
    },
    "the pair has no 'chosen' (keys: 'conversations', 'rejected')": {
        k: v for k, v in sharegpt(("human", QUESTION)).items() if k != "chosen"
    },
    "unknown shape (keys: 'chosen', 'instruction', 'rejected')": {"instruction": "", "chosen": GOOD, "rejected": BAD},
    "unknown shape (keys: 'chosen', 'prompt', 'rejected')": ultrafeedback(("user", QUESTION)) | {"rejected": BAD},
    "malformed pair (KeyError: 'observation')": sharegpt(("observation", QUESTION)),
    "malformed pair (KeyError: 'from')": sharegpt(("human", QUESTION)) | {"conversations": [{"value": QUESTION}]},
    "malformed pair (TypeError: ": sharegpt(("human", QUESTION)) | {"conversations": QUESTION},
    "malformed pair (TypeError: 'NoneType'": sharegpt(("human", QUESTION)) | {"rejected": None},
    "malformed pair (IndexError: ": {"chosen": [], "rejected": []},
    "malformed pair (TypeError: unhashable": ultrafeedback(("user", QUESTION)) | {"chosen": [{"role": []}] * 2},
    "chosen and rejected answer different prompts": ultrafeedback(("user", QUESTION))
    | {"rejected": ultrafeedback(("user", "3 + 3?"))["rejected"]},
    "a prompt or response is not text": orca(chosen=["4"]),
    "a prompt or response is not text; ": orca(question=None),
    "a prompt or response is not text; correct": orca(system={"text": SYSTEM}),
    "a prompt or response is not text; correct or remove": orca(rejected="half an emoji: \ud83d"),
    "the prompt does not end with the user's turn": sharegpt(("human", QUESTION), ("gpt", "4")),
    "the prompt does not end with the user's turn; ": ultrafeedback(),
    "the prompt does not end with the user's turn; correct": sharegpt(),
    "chosen or rejected is not the assistant's turn": sharegpt(("human", QUESTION))
    | {"chosen": {"from": "human", "value": GOOD}},
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_row_is_named_with_its_place(message: str, run: Run) -> None:
    with pytest.raises(UserError) as caught:
        run([orca(), MALFORMED[message]])
    assert f"raw/train/pairs.jsonl, row 2: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.json", json.dumps([orca()] * 2)[:-9].encode(), "pairs.json is not JSON: "),
        ("pairs.jsonl", json.dumps(orca()).encode() + b'\n{"question": "cut sh', "pairs.jsonl, line 2 is not JSON: "),
        ("pairs.parquet", b"PAR1 cut short", "pairs.parquet is not Parquet: "),
        ("pairs.json", '[{"question": "caf\u00e9"}]'.encode("latin-1"), "is not UTF-8: byte 0xe9 at offset 18"),
        ("pairs.json", json.dumps(orca()).encode(), "pairs.json: expected a list of pairs, found dict"),
        (
            "pairs.csv",
            b"question,chosen\n",
            "pairs.csv: pairs are read from .jsonl, .json and .parquet files, not .csv",
        ),
        ("pairs", b"", "pairs: pairs are read from .jsonl, .json and .parquet files, not this"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(limits(), load_tokenizer(tiny_model), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What is kept, dropped and held out ---------------------------------------------------------------


def test_every_row_is_kept_or_counted_as_dropped_for_one_reason(run: Run) -> None:
    kept = sharegpt_rows(40)
    reserved, twice = orca(question="Reserved?"), orca(question="Twice?")
    rows = [
        *kept,
        *kept[:3],  # duplicates
        orca(chosen=""),
        orca(rejected=" \n"),
        orca(rejected=None),
        orca(chosen="", rejected=None),
        orca(question=" "),
        orca(rejected=GOOD),
        orca(question="Long?" * 100),
        orca(chosen="Long." * 100),
        orca(rejected="Long." * 100),
        {**reserved, "chosen": "Another answer"},
        twice,
    ]
    train, heldout, metrics = run(
        rows, [reserved, twice, orca(question="Third?")], max_prompt_length=150, max_length=300, heldout_max=4
    )
    assert metrics["dropped"] == {
        "one_sided": 3,
        "empty": 2,
        "identical": 1,
        "duplicate": 4,
        "held_out_prompt": 1,
        "too_long": 3,
        "over_heldout_max": 43 - len(train) - 4,
    }
    assert metrics["rows"] == len(rows) + 3 == len(train) + len(heldout) + sum(metrics["dropped"].values())
    assert (metrics["train"], metrics["heldout"]) == (len(train), len(heldout)) == (len(train), 4)
    assert metrics["dropped"]["over_heldout_max"] > 0


def test_the_metrics_describe_the_pairs_that_are_kept(run: Run) -> None:
    rows = [orca("", "Q" * n, "a" * (n + 1), "b" * (2 * n)) for n in range(1, 20)]
    train, heldout, metrics = run(rows)
    lengths = sorted(len(row["rejected_ids"]) for row in train + heldout)
    assert len(lengths) == 19
    assert metrics["tokens"]["rejected"] == {
        "mean": round(sum(lengths) / 19, 1),
        "median": lengths[9],
        "max": lengths[-1],
    }
    assert metrics["chosen_longer_share"] == 0.0
    *_, metrics = run([orca("", "Q" * n, "a" * 5, "b" * n) for n in range(1, 20) if n != 5])
    assert metrics["chosen_longer_share"] == round(4 / 18, 4)


@pytest.mark.parametrize("key", ["max_prompt_length", "max_length"])
def test_a_limit_is_the_longest_pair_that_fits(key: str, run: Run) -> None:
    rows = [orca("", f"{i}?" * (1 + i), "4" * (i + 2), "5" * (20 - i)) for i in range(12)]
    pairs = [row for side in run(rows)[:2] for row in side]
    lengths = [len(row["prompt_ids"]) for row in pairs]
    if key == "max_length":
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in pairs]
    limit = sorted(lengths)[6]
    train, heldout, metrics = run(rows, **{key: limit})
    assert len(train) + len(heldout) == sum(length <= limit for length in lengths) >= 7
    assert metrics["dropped"]["too_long"] == sum(length > limit for length in lengths) > 0


@pytest.mark.parametrize("rows", [[], None])
def test_an_empty_data_set_is_refused(rows: list[Any] | None, run: Run, tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"the data set is empty; check data\.source in conf/"):
        run(rows) if rows is not None else prepare(limits(), load_tokenizer(tiny_model), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 8}, r"0 training pairs are left, 1 needed, of 24 rows \(too_long 24; data.max_length = 8, "),
        (
            {"max_prompt_length": 9},
            r"0 training pairs are left, .*data.max_prompt_length = 9 tokens\); raise the limits or",
        ),
        ({"heldout_share": 0.99}, "0 training pairs are left, 1 needed, .* or lower data.heldout_share"),
        ({"heldout_share": 1e-6}, "0 held-out pairs are left, 2 needed, .* raise the limits, data.heldout_share or"),
        ({"heldout_max": 1}, "1 held-out pairs are left, 2 needed, .* or data.heldout_max"),
    ],
)
def test_a_side_without_pairs_is_refused_with_the_key_to_change(changes: Any, message: str, run: Run) -> None:
    with pytest.raises(UserError, match=message):
        run(sharegpt_rows(24), **changes)


def many_rows(prompts: int, seed: int = 0) -> list[dict[str, Any]]:
    """One to three pairs a prompt, in random order."""
    rng = random.Random(seed)
    rows = [
        orca("", f"Question {seed}-{i}?", f"answer {j}", f"wrong {rng.random()}")
        for i in range(prompts)
        for j in range(rng.randint(1, 3))
    ]
    rng.shuffle(rows)
    return rows


def ids(rows: list[Any]) -> list[str]:
    return [row["id"] for row in rows]


def prompts(rows: list[Any]) -> set[str]:
    return {row["prompt"] for row in rows}


def test_no_prompt_is_on_both_sides_and_more_rows_move_none(run: Run) -> None:
    rows = many_rows(150)
    train, heldout, _ = run(rows)
    assert len(train) + len(heldout) == len(rows)
    assert not prompts(train) & prompts(heldout)
    more = [*many_rows(40, seed=1), *rows, *many_rows(40, seed=2)]
    more_train, more_heldout, _ = run(more)
    assert set(ids(train)) < set(ids(more_train))
    assert set(ids(heldout)) < set(ids(more_heldout))


def test_the_order_of_the_rows_changes_nothing(run: Run) -> None:
    rows = [*many_rows(60), *many_rows(60)[:20], orca(chosen=""), orca(chosen="Long." * 200)]
    heldout = many_rows(10, seed=1)
    assert len(rows) > 80
    first = run(rows, heldout, max_length=300, heldout_max=15)
    random.Random(1).shuffle(rows)
    assert run(rows, heldout[::-1], max_length=300, heldout_max=15) == first


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3, 0.5])
def test_the_held_out_share_of_the_prompts_is_about_the_one_asked_for(share: float) -> None:
    pairs = [Pair((("user", f"Question {i}?"),), GOOD, BAD) for i in range(4000)]
    got = sum(is_held_out(pair.prompt_hash, share) for pair in pairs) / len(pairs)
    assert got == pytest.approx(share, abs=4 * (share * (1 - share) / len(pairs)) ** 0.5)


def test_a_held_out_file_is_never_trained_on(run: Run) -> None:
    heldout = many_rows(20, seed=1)
    shared = [{**row, "chosen": "another answer"} for row in heldout[:7]]
    train, held, metrics = run([*shared, *many_rows(30)], heldout, heldout_share=0.0)
    assert set(ids(held)) == {parse_pair(row, "row").id for row in heldout}
    assert not prompts(train) & prompts(held)
    assert len(train) == len(many_rows(30))
    assert metrics["dropped"]["held_out_prompt"] == 7


def test_a_held_out_pair_that_is_too_long_still_keeps_its_prompt_from_training(run: Run) -> None:
    long = orca(question="Reserved?", chosen="Long." * 100)
    heldout = [long, orca(question="A?"), orca(question="B?")]
    train, held, metrics = run(
        [orca(question="Reserved?"), orca(question="C?")], heldout, max_length=300, heldout_share=0.0
    )
    assert (len(train), len(held)) == (1, 2)
    assert (metrics["dropped"]["too_long"], metrics["dropped"]["held_out_prompt"]) == (1, 1)


def test_a_cap_keeps_the_first_held_out_pairs_and_no_training_pair_more(run: Run) -> None:
    rows = many_rows(40)
    train, heldout, _ = run(rows)
    capped_train, capped, metrics = run(rows, heldout_max=5)
    assert (ids(capped_train), ids(capped)) == (ids(train), ids(heldout)[:5])
    assert metrics["dropped"]["over_heldout_max"] == len(heldout) - 5 > 0
    for cap in (None, len(heldout)):
        assert run(rows, heldout_max=cap)[2]["dropped"]["over_heldout_max"] == 0


# Tokens -------------------------------------------------------------------------------------------


def bos(tokenizer: Any) -> Any:
    """Adds a token of its own to any text, which a rendered template must not get."""
    from tokenizers.processors import TemplateProcessing

    start = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    assert tokenizer("a")["input_ids"][0] == start[1]
    return tokenizer


def merging(tokenizer: Any) -> Any:
    """Has one token for two newlines, so that the prompt's last token merges with an answer's first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if not token.startswith("<|")}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    bpe = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*names, "ĊĊ"])}, merges=[("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    merging = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    merging.chat_template = CHAT_TEMPLATE
    assert len(merging("\n\n")["input_ids"]) == 1
    return merging


@pytest.fixture(params=[lambda tokenizer: tokenizer, bos, merging], ids=["plain", "bos", "merging"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    return request.param(load_tokenizer(tiny_model))


PAIRS = [
    parse_pair(row, "row")
    for row in (
        orca(),
        orca("", "\n\n?", "\n\nTwo lines", "\nOne line"),
        ultrafeedback(("system", SYSTEM), ("user", "Hi"), ("assistant", "Hello\n"), ("user", QUESTION)),
        orca("", "é\u2028\N{GRINNING FACE}", "naïve <|im_ end|> text", "<unk >"),
        orca("", "Long? " * 900, "Long. " * 900, "\n" * 900),
    )
]


def test_the_tokens_are_those_of_the_chat_template_whole(tokenizer: Any) -> None:
    for pair in PAIRS:
        row = tokenize(pair, tokenizer)
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            messages = [*pair.messages, {"role": "assistant", "content": answer}]
            expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert row["prompt_ids"] + row[f"{name}_ids"] == expected
            assert row["prompt"] + row[name] == tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            pair.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert row["prompt_ids"] == prompt[: len(row["prompt_ids"])]
        assert len(prompt) - len(row["prompt_ids"]) <= 1
        assert row["id"] == pair.id


def test_a_token_across_the_border_of_prompt_and_answer_belongs_to_both_answers(tiny_model: Path) -> None:
    row = tokenize(PAIRS[1], merging(load_tokenizer(tiny_model)))
    whole = tokenize(PAIRS[1], load_tokenizer(tiny_model))
    assert len(row["prompt_ids"]) < len(whole["prompt_ids"])  # here the prompt ends before its last newline
    assert row["prompt"] == whole["prompt"]


def test_the_tokens_are_trls(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = [
        {"prompt": pair.messages}
        | {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
        for pair in PAIRS
    ]
    config = DPOConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    # For conversations the method reads nothing of the trainer, which would need a model.
    theirs = DPOTrainer._prepare_dataset(None, Dataset.from_list(rows), tokenizer, config, "train")
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    ours = [tokenize(pair, tokenizer) for pair in PAIRS]
    assert [{key: row[key] for key in keys} for row in ours] == [{key: row[key] for key in keys} for row in theirs]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
            r"renders prompt \+ answer so that it does not start with the prompt; this template cannot be trained on",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system\nturn!') }}{% endif %}"
            + CHAT_TEMPLATE,
            r"refuses the conversation \(No system turn!\); choose another model or remove such rows",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, message: str, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"pair {PAIRS[0].id}: the chat template {message}"):
        tokenize(PAIRS[0], tokenizer)


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_the_pairs_and_the_metrics(in_tmp: Path, tiny_model: Path) -> None:
    params = default_params()
    params["data"] |= {"max_length": 300, "max_prompt_length": 200, "heldout_share": 0.5, "heldout_max": None}
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params))
    (in_tmp / "models").mkdir()
    (in_tmp / "models/base").symlink_to(tiny_model)
    write_rows(in_tmp / "data/raw/train/pairs.json", [sharegpt_rows(24)])
    outputs = [in_tmp / name for name in ("data/pairs/train.jsonl", "data/pairs/heldout.jsonl", "metrics/prepare.json")]
    main()
    first = [path.read_bytes() for path in outputs]
    tokenizer = load_tokenizer(tiny_model)
    train, heldout, metrics = prepare(
        limits(max_length=300, max_prompt_length=200, heldout_share=0.5), tokenizer, in_tmp / "data/raw"
    )
    assert len(train) + len(heldout) == 24
    assert (read_jsonl(outputs[0]), read_jsonl(outputs[1]), read_json(outputs[2])) == (train, heldout, metrics)
    main()
    assert [path.read_bytes() for path in outputs] == first


@pytest.mark.parametrize(
    "row", [orca(), ultrafeedback(("user", QUESTION)), sharegpt(("human", QUESTION))], ids=["orca", "chat", "sharegpt"]
)
def test_any_change_of_a_row_is_a_pair_or_a_sentence(row: dict[str, Any], tokenizer: Any) -> None:
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changed(row))
    def check(value: Any) -> None:
        fault = ""
        try:
            pair = parse_pair(json.loads(json.dumps(value)), "pairs.jsonl, row 3")
        except UserError as error:
            fault = str(error)
        else:
            tokens = tokenize(pair, tokenizer)
            json.dumps(tokens, allow_nan=False).encode()
            assert all(role in ("system", "user", "assistant") for role, _ in pair.prompt)
        assert not fault or (fault.startswith("pairs.jsonl, row 3: ") and "\n" not in fault)

    check()
