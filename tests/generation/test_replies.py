"""Replies to many prompts: the same bits after a kill, random numbers by prompt and number, and the rows of them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.config import Sample
from prefscan.generation import replies as replies_module
from prefscan.generation.replies import Rows, prompt_rows, read_unfinished, reply_to_all, tokenise_prompts
from prefscan.generation.sampling import Reply, Sampled
from tiny import make_tiny_model

PROMPTS = [
    {"id": identity, "prompt": text}
    for identity, text in {
        "a": "Once",
        "b": "The film was made",
        "c": "It",
        "d": "Of all the films of that year",
        "e": "There was",
    }.items()
]
EACH = 3
BATCHES = 3  # of 5 · 3 replies, at most 6 at once


def sample(**changes: Any) -> Sample:
    given = {
        "prompts": "prompts.jsonl",
        "format": "plain",
        "train_prompts": 5,
        "train_replies": EACH,
        "eval_split": "eval",
        "eval_prompts": 5,
        "base_replies": EACH,
        "max_new_tokens": 12,
        "batch_size": 6,
        "dtype": "fp32",
        "seed": 0,
    }
    return Sample.model_validate(given | changes)


def without_seconds(rows: Rows) -> Rows:
    return [[replace(reply, seconds=0.0) for reply in own] for own in rows]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def whole(model: Any, tokenizer: Any, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Rows, Path]:
    """The replies of an uninterrupted stage, and the file that it has kept them in."""
    path = tmp_path / "whole.jsonl"
    settings = sample(**getattr(request, "param", {}))
    return reply_to_all(model, tokenizer, PROMPTS, EACH, settings, path), path


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that is sampled from here on."""
    sampled: list[int] = []
    original = replies_module.sample_replies

    def counted(*arguments: Any, **named: Any) -> Iterator[list[Sampled]]:
        for batch in original(*arguments, **named):
            sampled.append(len(batch))
            yield batch

    monkeypatch.setattr(replies_module, "sample_replies", counted)
    return sampled


@pytest.mark.parametrize("whole", [{"format": "plain"}, {"format": "chat"}], indirect=True, ids=["plain", "chat"])
@pytest.mark.parametrize("batches", range(BATCHES + 1))
@pytest.mark.parametrize("rest", ["nothing", "half a line", "a line without its end"])
def test_a_killed_stage_goes_on_with_the_same_bits(
    whole: tuple[Rows, Path],
    batches: int,
    rest: str,
    request: pytest.FixtureRequest,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, path = whole
    written = lines(path)
    assert len(written) == BATCHES
    following = written[batches] if batches < BATCHES else b"\n"
    cut = {"nothing": b"", "half a line": following[: len(following) // 2], "a line without its end": following[:-1]}
    unfinished = tmp_path / "unfinished.jsonl"
    unfinished.write_bytes(b"".join(written[:batches]) + cut[rest])
    sampled = count_batches(monkeypatch)
    settings = sample(**request.node.callspec.params["whole"])
    found = reply_to_all(model, tokenizer, PROMPTS, EACH, settings, unfinished)
    assert without_seconds(found) == without_seconds(expected)
    assert len(sampled) == BATCHES - batches
    kept = read_unfinished(unfinished)
    assert kept == {(i, number): reply for i, own in enumerate(found) for number, reply in enumerate(own)}
    assert lines(unfinished)[:batches] == written[:batches]
    assert len(lines(unfinished)) == BATCHES


def test_a_stage_killed_within_a_batch_leaves_whole_batches(
    whole: tuple[Rows, Path], model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    expected, _ = whole
    unfinished = tmp_path / "killed.jsonl"
    original = replies_module.sample_replies

    def killed(*arguments: Any, **named: Any) -> Iterator[list[Sampled]]:
        yield next(original(*arguments, **named))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(replies_module, "sample_replies", killed)
        with pytest.raises(Killed):
            reply_to_all(model, tokenizer, PROMPTS, EACH, sample(), unfinished)
    assert len(lines(unfinished)) == 1
    sampled = count_batches(monkeypatch)
    found = reply_to_all(model, tokenizer, PROMPTS, EACH, sample(), unfinished)
    assert without_seconds(found) == without_seconds(expected)
    assert len(sampled) == BATCHES - 1


def test_the_unfinished_files_end_is_cut_to_its_last_whole_line(whole: tuple[Rows, Path]) -> None:
    _, path = whole
    before = path.read_bytes()
    kept = read_unfinished(path)
    assert path.read_bytes() == before
    path.write_bytes(before + b'[[0, 0, {"text": "a')
    assert read_unfinished(path) == kept
    assert path.read_bytes() == before
    assert read_unfinished(path.with_name("none.jsonl")) == {}


def test_seeds_pair_models(tmp_path: Path, tokenizer: Any, whole: tuple[Rows, Path], monkeypatch: Any) -> None:
    """Every model draws by the same numbers: they are of the seed, the prompt's id and the reply's number alone."""
    from prefscan.models.loading import load_model

    seen: list[list[list[str]]] = []
    original = replies_module.sample_replies

    def noted(model: Any, tokenizer: Any, prompts: Any, seeds: Any, *rest: Any, **named: Any) -> Any:
        seen.append(seeds)
        return original(model, tokenizer, prompts, seeds, *rest, **named)

    monkeypatch.setattr(replies_module, "sample_replies", noted)
    twin = load_model(make_tiny_model(tmp_path / "twin"), "fp32").eval()  # of the same weights
    other = load_model(make_tiny_model(tmp_path / "other", seed=1), "fp32").eval()
    again = reply_to_all(twin, tokenizer, PROMPTS, EACH, sample(), tmp_path / "again.jsonl")
    changed = reply_to_all(other, tokenizer, PROMPTS, EACH, sample(), tmp_path / "changed.jsonl")
    assert without_seconds(again) == without_seconds(whole[0])
    assert without_seconds(changed) != without_seconds(whole[0])
    assert seen[0] == seen[1] == [[f"0/{prompt['id']}/{n}" for n in range(EACH)] for prompt in PROMPTS]
    # Fewer prompts and replies, in another order: each reply keeps its numbers.
    some = reply_to_all(twin, tokenizer, PROMPTS[3:0:-1], 2, sample(), tmp_path / "some.jsonl")
    expected = [[reply.tokens for reply in whole[0][i][:2]] for i in (3, 2, 1)]
    assert [[reply.tokens for reply in own] for own in some] == expected


def test_another_seed_gives_other_replies_and_each_number_its_own(
    whole: tuple[Rows, Path], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    other = reply_to_all(model, tokenizer, PROMPTS, EACH, sample(seed=1), tmp_path / "other.jsonl")
    for one, another in zip(whole[0], other, strict=True):
        assert len({tuple(reply.tokens) for reply in [*one, *another]}) == 2 * EACH


def test_plain_prompts_stand_as_they_are_and_chat_prompts_are_a_users_turn(tokenizer: Any) -> None:
    plain, chat = (tokenise_prompts(tokenizer, ["Once <|im_end|>", "It"], format) for format in ("plain", "chat"))
    assert tokenizer.decode(plain[1]) == "It"
    assert tokenizer.decode(chat[1]) == "<|im_start|>user\nIt<|im_end|>\n<|im_start|>assistant\n"
    end = tokenizer.eos_token_id
    assert [ids.count(end) for ids in chat] == [1, 1]  # what a user writes ends no turn


@pytest.mark.parametrize("whole", [{"format": "plain"}, {"format": "chat"}], indirect=True, ids=["plain", "chat"])
def test_a_reply_has_the_prompt_that_the_model_read(
    whole: tuple[Rows, Path], tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    format = request.node.callspec.params["whole"]["format"]
    tokens = tokenise_prompts(tokenizer, [prompt["prompt"] for prompt in PROMPTS], format)
    assert [[reply.prompt for reply in own] for own in whole[0]] == [[ids] * EACH for ids in tokens]


def test_rows_have_utility_score_and_the_kl_of_first_replies() -> None:
    def reply(*tokens: int) -> Reply:
        return Reply(f"says {tokens}", [1, 2], list(tokens), [-0.5] * len(tokens), len(tokens) > 4, 0.1)

    replies = [[reply(5, 6), reply(7)], [reply(1, 2, 1, 2, 1, 2), reply(8, 9)]]
    rewards = [[(1.0, 0.7), (2.0, 0.9)], [(3.0, 0.95), (-1.0, 0.3)]]
    first, second = prompt_rows(PROMPTS[:2], replies, rewards, [0.25])
    assert (first["id"], first["prompt"], first["prompt_ids"]) == ("a", "Once", [1, 2])
    assert first["replies"][0] == {
        "text": "says (5, 6)",
        "tokens": [5, 6],
        "logprob": -1.0,
        "length": 2,
        "truncated": False,
        "repetition": 0.0,
        "utility": 1.0,
        "score": 0.7,
        "kl": 0.25,
    }
    assert [one["kl"] for row in (first, second) for one in row["replies"]] == [0.25, None, None, None]
    assert [one["truncated"] for one in second["replies"]] == [True, False]
    assert second["replies"][0]["repetition"] == pytest.approx(1 / 3)  # of three 4-grams, the third is the first
    assert json.loads(json.dumps(second)) == second
