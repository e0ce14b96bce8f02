"""Checkable instructions: known outcomes of hand-written replies, IFEval's metrics, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefscan.common.config import CheckableReward
from prefscan.common.errors import UserError
from prefscan.common.intervals import share_interval
from prefscan.data.sources import fetch_reward
from prefscan.rewards.checkable import (
    DOWNLOADS,
    InstructionChecks,
    Outcome,
    ifeval_metrics,
    read_prompts,
    registry,
    variants,
)
from prefscan.rewards.reward import load_reward
from tiny import write_rows

REPOSITORY = Path(__file__).parents[2]
PLAIN = "This is a plain reply in English about the weather of today and of tomorrow"

# Instruction, arguments, a reply that follows it, and one that does not.
KNOWN: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["rain", "sun"]}, "Sun after RAIN.", "Rain alone."),
    ("keywords:frequency", {"keyword": "rain", "frequency": 2, "relation": "at least"}, "rain, Rain", "rain"),
    ("keywords:frequency", {"keyword": "rain", "frequency": 2, "relation": "less than"}, "rain", "rain rain"),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "A rainy day", "No Rain today"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zz", "z"),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön und morgen auch.", PLAIN),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "three words here"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's two-fold", "two words"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weather"},
        "One.\n\nWeather, again.",
        "Weather.\n\nOne.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. rain", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one*"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Rain>>\nIt rains.", "Rain"),
    ("combination:two_responses", {}, "One ****** Two", "One ****** One"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Done.", "Done. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. THE END.", "The end. So it was."),
    ("change_case:english_capital", {}, PLAIN.upper(), PLAIN),
    ("change_case:english_lowercase", {}, PLAIN.lower(), PLAIN),
    ("punctuation:no_comma", {}, "Rain; wind.", "Rain, wind."),
    ("startend:quotation", {}, '"Rain."', 'He said "rain".'),
]


def row(*instructions: tuple[str, dict[str, Any]], prompt: str = "Do it.") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "instruction_id_list": [instruction for instruction, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
    }


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), KNOWN)
def test_known_replies_have_their_outcomes(
    tmp_path: Path, instruction: str, arguments: dict[str, Any], good: str, bad: str
) -> None:
    rows, left_out = read_prompts(write_rows(tmp_path / "p.jsonl", [row((instruction, arguments))]))
    reward = InstructionChecks(rows)
    assert reward.utilities(["Do it."] * 3, [good, bad, ""]) == [1.0, 0.0, 0.0]
    assert not left_out


def test_every_instruction_of_ifeval_is_known_here() -> None:
    assert {instruction for instruction, *_ in KNOWN} | set(DOWNLOADS) == set(registry())


def test_the_share_of_followed_instructions_is_the_reward() -> None:
    reward = InstructionChecks([row(*((instruction, arguments) for instruction, arguments, *_ in KNOWN[-1:-5:-1]))])
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Do it."}]
    replies = [f'"{PLAIN.lower()}"', PLAIN, "", f"{PLAIN.upper()}, 🎬"]
    # quotation, no comma, lower case, capitals
    assert reward.utilities([chat] * 4, replies) == [0.75, 0.25, 0.0, 0.25]
    assert reward.scores(["Do it."] * 4, replies) == [0.75, 0.25, 0.0, 0.25]


def test_loose_takes_any_of_the_eight_variants() -> None:
    reward = InstructionChecks([row(("punctuation:no_comma", {}), ("startend:quotation", {}))])
    reply = 'Sure, here it is:\n*"Rain."*\nBye'
    assert len(variants(reply)) == 8
    assert reward.outcomes("Do it.", reply) == [
        Outcome("punctuation:no_comma", strict=False, loose=True),  # without the first line
        Outcome("startend:quotation", strict=False, loose=True),  # without both lines and the asterisks
    ]
    assert reward.outcomes("Do it.", "One,\nTwo,\nThree,")[0] == Outcome("punctuation:no_comma", False, False)


def test_ifeval_s_four_metrics() -> None:
    def outcomes(*pairs: tuple[bool, bool]) -> list[Outcome]:
        return [Outcome("x", *pair) for pair in pairs]

    metrics = ifeval_metrics(
        [outcomes((True, True), (False, True)), outcomes((True, True)), outcomes((False, False), (True, True))]
    )
    assert {name: metric["value"] for name, metric in metrics.items()} == {
        "prompt_level_strict": 0.3333,
        "prompt_level_loose": 0.6667,
        "instruction_level_strict": 0.6,
        "instruction_level_loose": 0.8,
    }
    assert metrics["prompt_level_strict"]["low"] == pytest.approx(share_interval(1, 3)[1], abs=1e-4)


@pytest.mark.parametrize(
    ("instruction", "arguments", "message"),
    [
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "at least"},
            "length_constraints:number_sentences cannot be checked: its checker needs the sentence splitter punkt",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "at least"},
            "change_case:capital_word_frequency .* needs the word splitter punkt_tab, which nltk downloads",
        ),
        ("length_constraints:unheard_of", {}, "IFEval has no such instruction"),
        (
            "length_constraints:number_words",
            {"num_words": 3},
            "kwargs lack a usable value, and the checker would draw one at random",
        ),
        ("length_constraints:number_words", {"num_words": None, "relation": "at least"}, "kwargs lack a usable value"),
        (
            "length_constraints:number_words",
            {"num_words": -1, "relation": "at least"},
            "kwargs lack a usable value",
        ),
        (
            "keywords:letter_frequency",
            {"letter": "#", "let_frequency": 4, "let_relation": "at least"},
            "kwargs lack a usable value",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "about"},
            "ValueError: The supported relation",
        ),
        ("punctuation:no_comma", {"commas": 1}, "TypeError"),
        ("keywords:existence", {"keywords": ["C++ [", "x"]}, "unterminated character set"),
        ("keywords:existence", {"keywords": []}, "kwargs lack a usable value"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "x"},
            "kwargs lack a usable value",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_or_left_out_and_counted(
    tmp_path: Path, instruction: str, arguments: dict[str, Any], message: str
) -> None:
    good = row(("punctuation:no_comma", {}), prompt="Good.")
    path = write_rows(tmp_path / "p.jsonl", [good, row(("startend:quotation", {}), (instruction, arguments))])
    with pytest.raises(UserError, match=rf"p\.jsonl, row 2: instruction .*{message}"):
        read_prompts(path)
    rows, left_out = read_prompts(path, "leave_out")
    assert ([r["prompt"] for r in rows], sum(left_out.values())) == (["Good."], 1)


@pytest.mark.parametrize(
    "raw",
    [
        "text",
        {"prompt": "a", "kwargs": []},
        row(("punctuation:no_comma", {}), prompt=" "),
        {"prompt": "a", "instruction_id_list": [], "kwargs": []},
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        {"prompt": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ],
)
def test_malformed_rows_are_refused_whatever_is_left_out(tmp_path: Path, raw: Any) -> None:
    with pytest.raises(UserError, match=r"p\.jsonl, row 1: expected "):
        read_prompts(write_rows(tmp_path / "p.jsonl", [raw]), "leave_out")


def test_files_without_prompts_and_prompts_that_occur_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompt is left .the file is empty"):
        read_prompts(write_rows(tmp_path / "p.jsonl", []))
    twice = [row(("punctuation:no_comma", {})), row(("startend:quotation", {}))]
    with pytest.raises(UserError, match=r"row 2: the prompt 'Do it.' occurs twice"):
        read_prompts(write_rows(tmp_path / "p.jsonl", twice))
    with pytest.raises(UserError, match=r"reward checkable: the prompt 'Another' has no instructions"):
        InstructionChecks(twice[:1]).utilities(["Another"], ["x"])


def test_hostile_replies_follow_or_do_not_but_never_fail() -> None:
    usable = [(instruction, arguments) for instruction, arguments, *_ in KNOWN]
    reward = InstructionChecks([row(*usable)])
    hostile = ["[" * 3000, "1" * 5000, "🎬" * 1000, "\x00", "*" * 5000, "word " * 2000, "\n" * 5000, '"' * 3]
    assert all(0 <= utility < 1 for utility in reward.utilities(["Do it."] * len(hostile), hostile))


def test_languages_are_told_the_same_way_in_each_process() -> None:
    one = row(("language:response_language", {"language": "en"}), prompt="p")
    script = (
        "from prefscan.rewards.checkable import InstructionChecks\n"
        f"row = {one!r}\n"
        "texts = ['no', 'ok la', 'an der', 'so it', 'da me', 'the man', 'a test', 'i am in it'] * 5\n"
        "print(InstructionChecks([row]).utilities(['p'] * 40, texts))"
    )
    environment = {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1]
    values = yaml.safe_load(said[0])
    assert values[:8] * 5 == values
    assert 0 < sum(values) < 40


def test_saved_and_loaded_it_scores_the_same(tmp_path: Path) -> None:
    usable = [(instruction, arguments) for instruction, arguments, *_ in KNOWN]
    reward = InstructionChecks([row(*usable)])
    reward.save(tmp_path)
    settings = CheckableReward.model_validate(
        {
            "kind": "checkable",
            "name": "c",
            "source": {"kind": "file", "file": "x"},
            "unusable": "refuse",
        }
    )
    replies = [text for _, _, good, bad in KNOWN for text in (good, bad)]
    loaded = load_reward(settings, tmp_path)
    assert loaded.utilities(["Do it."] * len(replies), replies) == reward.utilities(["Do it."] * len(replies), replies)


@pytest.mark.slow
def test_ifeval_s_own_prompts_are_read(tmp_path: Path) -> None:
    settings = CheckableReward.model_validate(yaml.safe_load((REPOSITORY / "conf/reward/ifeval.yaml").read_text()))
    fetch_reward(settings, tmp_path)
    rows, left_out = read_prompts(tmp_path / "prompts.jsonl", settings.unusable)
    assert len(rows) + sum(left_out.values()) == 541
    assert left_out == {"download": 64, "arguments": 2}  # two prompts count a "#" and a "!", which is no letter
