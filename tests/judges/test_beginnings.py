"""What a local judge keeps of prompts' beginnings: fewer tokens to read, and never another bit of a verdict."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtbench_data import TEMPLATES, local_judge, make_answers, make_questions, make_references
from prefscan.common.config import LocalJudge
from prefscan.judging import prefix_cache as beginnings
from prefscan.judging.judge import Prompt, Verdict, load_judge
from prefscan.judging.local import ExpectedScore
from prefscan.judging.mtbench import build_turns
from prefscan.models.loading import load_model, load_tokenizer
from tiny import make_tiny_model

INSTRUCTIONS, QUESTION = "Rate the answer, please. ", "[Question] What is 2 + 2? [Answer] "
CUTS = (len(INSTRUCTIONS), len(INSTRUCTIONS + QUESTION))
FIRST, SECOND = (Prompt("Judge.", INSTRUCTIONS + QUESTION + answer, cuts=CUTS) for answer in ("Four β.", "Five of it"))
OTHER = Prompt("Judge.", f"{INSTRUCTIONS}[Question] Why? [Answer] So.", cuts=(CUTS[0], CUTS[0] + 25))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with enough room on its disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beginnings, "SPARE", 0)
    return tmp_path / beginnings.BEGINNINGS


def judge_of(model: Path, **options: Any) -> Any:
    return load_judge(LocalJudge.model_validate(local_judge(model, **options)))


def read_of(judge: Any) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    passes: list[int] = []
    judge.model.model.embed_tokens.register_forward_hook(lambda module, args, output: passes.append(args[0].shape[1]))
    return passes


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def verdicts(judge: Any, *prompts: Prompt) -> dict[int, Verdict]:
    return dict(judge.verdicts(prompts))


def rest(judge: Any, prompt: Prompt) -> int:
    """Tokens of a prompt from its answer on, with the "1" that is read after it."""
    ids = judge.tokens(prompt)
    return len(ids) - judge.ends(prompt, ids)[-1] + 1


@pytest.mark.usefixtures("folder")
def test_the_next_stage_reads_the_answer_alone(tiny_model: Path) -> None:
    judge = judge_of(tiny_model)
    passes = read_of(judge)
    verdicts(judge, FIRST)
    instructions, question = judge.ends(FIRST, judge.tokens(FIRST))
    assert passes == [instructions, question - instructions, rest(judge, FIRST)]

    later = judge_of(tiny_model)
    passes = read_of(later)
    verdicts(later, SECOND, OTHER)
    (_, own) = judge.ends(OTHER, judge.tokens(OTHER))
    # In the order of their tokens, "What" before "Why"; of the other question the instructions are there.
    assert passes == [rest(later, SECOND), own - instructions, rest(later, OTHER)]


def test_a_verdict_has_the_same_bits_whatever_is_kept(tiny_model: Path, folder: Path) -> None:
    """With nothing, with all and with a part of it in files, and without files; alone and beside other prompts."""
    fresh = verdicts(judge_of(tiny_model), FIRST, SECOND, OTHER)
    files = kept(folder)
    assert len(files) == 3  # the instructions, and each question with them
    assert verdicts(judge_of(tiny_model), FIRST, SECOND, OTHER) == fresh
    for file in files:
        file.unlink()
        assert verdicts(judge_of(tiny_model), FIRST, SECOND, OTHER) == fresh
    plain = ExpectedScore(load_model(tiny_model, "fp32"), load_tokenizer(tiny_model))
    assert verdicts(plain, FIRST, SECOND, OTHER) == fresh
    assert verdicts(plain, FIRST) == verdicts(judge_of(tiny_model), FIRST)


@pytest.mark.usefixtures("folder")
def test_scores_are_those_without_cuts(tiny_model: Path) -> None:
    judge = judge_of(tiny_model)
    for prompt in (FIRST, SECOND, OTHER):
        whole = Prompt(prompt.system, prompt.user)
        assert verdicts(judge, prompt)[0].score == pytest.approx(verdicts(judge, whole)[0].score, abs=1e-5)


@pytest.mark.parametrize("damage", ["empty", "half", "one byte of its numbers"])
def test_a_damaged_file_is_made_again(tiny_model: Path, folder: Path, damage: str) -> None:
    fresh = verdicts(judge_of(tiny_model), FIRST)
    whole = {file: file.read_bytes() for file in kept(folder)}
    assert len(whole) == 2
    for file, content in whole.items():
        for other in whole:
            other.unlink(
                missing_ok=True
            )  # a longer beginning, or the one that it starts with, would be read in its place
        flipped = content[:-1] + bytes([content[-1] ^ 64])
        file.write_bytes({"empty": b"", "half": content[: len(content) // 2]}.get(damage, flipped))
        assert verdicts(judge_of(tiny_model), FIRST) == fresh
        assert {path: path.read_bytes() for path in kept(folder)} == whole


def test_a_full_disk_costs_no_verdict(tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", full)
        without = verdicts(judge_of(tiny_model), FIRST)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    for limit, value in (("SPARE", shutil.disk_usage(folder).total), ("MOST", 1000)):
        with monkeypatch.context() as tight:
            tight.setattr(beginnings, limit, value)
            assert verdicts(judge_of(tiny_model), FIRST) == without
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert verdicts(judge_of(tiny_model), FIRST) == without
    assert len(kept(folder)) == 2


def test_what_nothing_has_used_for_a_day_makes_room(
    tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts(judge_of(tiny_model), FIRST)
    size = sum(path.stat().st_size for path in kept(folder))
    monkeypatch.setattr(beginnings, "MOST", size + 100)  # room for no other question
    verdicts(judge_of(tiny_model), OTHER)
    assert len(kept(folder)) == 2
    (folder / "of another judge").mkdir()
    left = folder / "of another judge/left by a killed process"
    left.touch()
    old = time.time() - 25 * 3600
    for path in (left, *kept(folder)):
        os.utime(path, (old, old))
    verdicts(
        judge_of(tiny_model), OTHER
    )  # reads the instructions, which keeps them, and writes its own in place of the other
    assert not left.exists()
    assert len(kept(folder)) == 2
    passes = read_of(judge := judge_of(tiny_model))
    verdicts(judge, OTHER)
    assert passes == [rest(judge, OTHER)]


def test_another_judge_reads_its_own(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    verdicts(judge_of(tiny_model), FIRST)
    before = kept(folder)
    other = make_tiny_model(tmp_path / "other", seed=1)
    expected = verdicts(ExpectedScore(load_model(other, "fp32"), load_tokenizer(other)), FIRST)
    assert verdicts(judge_of(other), FIRST) == expected
    assert len(kept(folder)) == 4
    assert set(before) < set(kept(folder))
    verdicts(judge_of(other, batch_size=2), SECOND)
    assert len(kept(folder)) == 4  # larger batches keep nothing


@pytest.mark.usefixtures("folder")
def test_a_token_across_the_cut_belongs_to_no_beginning(tiny_model: Path) -> None:
    """White space before an answer may be of one token with its first letter, and with another's not."""
    judge = judge_of(tiny_model)
    judge.tokenizer.add_tokens([" F"])
    six = Prompt(FIRST.system, INSTRUCTIONS + QUESTION + "Six.", cuts=CUTS)
    ids, others = judge.tokens(FIRST), judge.tokens(six)
    assert judge.tokenizer.decode(ids).count(" F") == 1
    assert len(judge.tokenizer.encode(" F", add_special_tokens=False)) == 1
    assert judge.ends(FIRST, ids) == judge.ends(six, others)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mode", ["single", "pair"])
def test_prompts_to_one_question_begin_alike_up_to_the_answer(tiny_model: Path, mode: str) -> None:
    """MT-Bench's prompts to two models' answers, cut where FastChat's templates have their fields."""
    questions = make_questions(1)
    references = {row["question_id"]: row for row in make_references(questions, "stock")}
    by_id = {question["question_id"]: question for question in questions}

    def built(model: str) -> Iterator[Prompt]:
        answers = make_answers(questions, model)
        against = None if mode == "single" else {row["question_id"]: row for row in make_answers(questions, "base")}
        return (turn.prompt for turn in build_turns(by_id, answers, TEMPLATES, references, against))

    judge = load_judge(LocalJudge.model_validate(local_judge(tiny_model) | {"mode": mode}))
    for one, two in zip(built("policy"), built("Another"), strict=True):
        assert one.cuts == two.cuts
        assert one.user[: one.cuts[-1]] == two.user[: one.cuts[-1]]
        first, second = judge.tokens(one), judge.tokens(two)
        ends = judge.ends(one, first)
        assert ends == judge.ends(two, second)
        assert first[: ends[-1]] == second[: ends[-1]]
        assert one.user[one.cuts[-1] :].startswith(("policy says", "base says"))
    first_time = verdicts(judge, *built("policy"))
    passes = read_of(judge)
    assert verdicts(judge, *built("policy")) == first_time
    prompts = [(judge.tokens(prompt), prompt) for prompt in built("policy")]
    assert sum(passes) <= sum(len(ids) - judge.ends(prompt, ids)[-1] + 1 for ids, prompt in prompts)
