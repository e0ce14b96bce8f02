"""What a local judge keeps of prompts' beginnings: fewer tokens to read, and never another bit of a verdict."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtbench_data import TEMPLATES, local_judge, make_answers, make_questions, make_references
from prefscan.judges import Prompt, Verdict, beginnings, load_judge
from prefscan.judges.local import ExpectedScore
from prefscan.models import load_model, load_tokenizer
from prefscan.mtbench import build_turns
from prefscan.params import LocalJudge
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
    files = sorted(folder.rglob("*.safetensors"))
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


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0not a header", None])
def test_a_damaged_file_is_made_again(tiny_model: Path, folder: Path, damage: bytes | None) -> None:
    fresh = verdicts(judge_of(tiny_model), FIRST)
    for file in folder.rglob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        assert verdicts(judge_of(tiny_model), FIRST) == fresh
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    verdicts(judge_of(tiny_model), FIRST)
    assert all(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_a_full_disk_costs_no_verdict(tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(beginnings, "save_file", full)
        without = verdicts(judge_of(tiny_model), FIRST)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(beginnings, "SPARE", shutil.disk_usage(folder).total)
    assert verdicts(judge_of(tiny_model), FIRST) == without
    assert not [path for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(beginnings, "SPARE", 0)
    assert verdicts(judge_of(tiny_model), FIRST) == without
    assert len(list(folder.rglob("*.safetensors"))) == 2


def test_another_judge_reads_its_own(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    verdicts(judge_of(tiny_model), FIRST)
    before = set(folder.iterdir())
    other = make_tiny_model(tmp_path / "other", seed=1)
    expected = verdicts(ExpectedScore(load_model(other, "fp32"), load_tokenizer(other)), FIRST)
    assert verdicts(judge_of(other), FIRST) == expected
    assert len(list(folder.iterdir())) == 1
    assert before.isdisjoint(folder.iterdir())
    verdicts(judge_of(other, batch_size=2), SECOND)
    assert len(list(folder.rglob("*.safetensors"))) == 2  # larger batches keep nothing


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

    judge = judge_of(tiny_model)
    for one, two in zip(built("policy"), built("Another"), strict=True):
        assert one.cuts == two.cuts
        assert one.user[: one.cuts[-1]] == two.user[: one.cuts[-1]]
        first, second = judge.tokens(one), judge.tokens(two)
        ends = judge.ends(one, first)
        assert ends == judge.ends(two, second)
        assert first[: ends[-1]] == second[: ends[-1]]
        assert one.user[one.cuts[-1] :].startswith(("policy says", "base says"))
