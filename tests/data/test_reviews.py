"""Reviews: what is read, what is refused, and that no review or prompt is of two parts."""

import random
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.errors import UserError
from prefscan.data.reviews import (
    Review,
    clean,
    near_duplicates,
    read_reviews,
    refuse_overlap,
    refuse_shared_prompts,
    review_prompts,
    split_reviews,
)
from review_data import review_rows, write_reviews


def test_html_line_breaks_become_spaces() -> None:
    assert clean("Good.<br /><br />Very  good<BR>a < b\n<i>yes</i> 1<2>0") == "Good. Very good a < b yes 1<2>0"


def test_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    rows: Any = [("1", "x", "A wonderful, wonderful film"), ("0", "y", 'Dull "plot",\nemoji 🎬')]
    path = write_reviews(tmp_path / "r.csv", rows, ("label", "source", "text"))
    assert [(r.text, r.positive) for r in read_reviews(path)] == [
        ("A wonderful, wonderful film", True),
        ('Dull "plot", emoji 🎬', False),
    ]


def test_a_review_of_a_megabyte_is_read(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "r.csv", [("word " * 200_000, "1"), ("dull", "0")])
    assert [len(review.words) for review in read_reviews(path)] == [200_000, 1]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a", "1")], ("text", "stars"), "has no column 'label'"),
        ([("a", "1")], ("a", "b"), "has no column 'text' or 'label'"),
        ([("a", "1"), ("b", "2")], ("text", "label"), "review 2: label '2' is neither 0 nor 1"),
        ([("a", "positive")], ("text", "label"), "review 1: label 'positive' is neither"),
        ([("a", "1"), ("!!", "0")], ("text", "label"), r"review 2: the text '!!' has no word"),
        ([("a", "1"), ("", "0")], ("text", "label"), r"review 2: the text '' has no word"),
        ([("a", "1"), ("b", "1")], ("text", "label"), "2 reviews of 1 class; a classifier needs both"),
        ([], ("text", "label"), "0 reviews of 0 class"),
    ],
)
def test_what_is_no_data_set_of_two_classes_is_refused(
    tmp_path: Path, rows: list[tuple[str, str]], header: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_reviews(write_reviews(tmp_path / "r.csv", rows, header))


def test_a_file_cut_within_quotes_and_one_in_latin_1_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('text,label\n"unfinished')
    with pytest.raises(UserError, match="is not CSV"):
        read_reviews(path)
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_reviews(path)


def test_near_duplicates_are_those_that_share_a_run_of_words() -> None:
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(10_000)}" for _ in range(count))

    run, other = text(20), text(20)
    texts = [
        f"{run} {text(30)}",
        f"{text(17)} {run.upper()}!",
        " ".join(run.split()[1:]) + " end",  # 19 words of the run
        f"{text(9)} {other} {text(9)} {run}",
        f"{other} {text(5)}",  # joined to the first by the one before
        "short text",
        "Short -- TEXT",
        "short text too",
        "🎬",
        "",
    ]
    groups = near_duplicates(texts)
    numbers = [groups.index(group) for group in groups]
    assert numbers == [0, 0, 2, 0, 0, 5, 5, 7, 8, 8]
    shuffled = list(range(len(texts)))
    rng.shuffle(shuffled)
    assert near_duplicates([texts[i] for i in shuffled]) == [groups[i] for i in shuffled]
    assert near_duplicates([]) == []


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> list[Review]:
    rows = review_rows(400)
    edited = [(f"Edited. {text} <br />The end", label) for text, label in rows[:60]]  # near-duplicates of long ones
    identical = [(text.upper(), label) for text, label in rows[60:90]]
    return read_reviews(write_reviews(tmp_path_factory.mktemp("r") / "r.csv", rows + edited + identical))


def test_parts_share_no_review_and_no_near_duplicate(reviews: list[Review]) -> None:
    split = split_reviews(reviews, 0.2, 0.3, least_words=60)
    parts = [split.fit, split.check, split.prompts]
    groups = [{review.group for review in part} for part in parts]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert all(len(review.text.split()) >= 60 for review in split.prompts)
    assert split.counts["identical"] == 30
    assert split.counts["near_duplicates"] == 40  # of the 60 edited reviews, 20 are snippets: no run of 20 words
    kept = sum(map(len, parts)) + split.counts["identical"] + split.counts["beside_prompts"]
    assert kept == len(reviews) == split.counts["reviews"]
    assert 0.1 < len(split.check) / len(reviews) < 0.3


def test_the_file_s_order_decides_nothing_and_the_seed_all(reviews: list[Review]) -> None:
    split = split_reviews(reviews, 0.2, 0.3, 60)
    assert split_reviews(reviews[::-1], 0.2, 0.3, 60) == split
    assert split_reviews(reviews, 0.2, 0.3, 60, seed=1).check != split.check


def test_a_part_without_reviews_is_refused(reviews: list[Review]) -> None:
    with pytest.raises(UserError, match="none is left for prompts"):
        split_reviews(reviews, 0.2, 0.3, least_words=1000)


def test_overlapping_parts_are_refused(reviews: list[Review]) -> None:
    split = split_reviews(reviews, 0.2, 0.3, 60)
    with pytest.raises(UserError, match="is of both fit and check"):
        refuse_overlap({"fit": split.fit, "check": [*split.check, split.fit[3]]})


def prompts_of(*texts: str, **options: Any) -> tuple[dict[str, list[dict[str, str]]], dict[str, int]]:
    padding = [f"Prompt number {i} which is one of a hundred or so" for i in range(100)]
    return review_prompts([Review(text, True, text) for text in (*texts, *padding)], **options)


def test_prompts_are_the_first_words_and_each_is_of_one_set() -> None:
    sets, counts = prompts_of(
        "This is one of the best films I saw",
        "THIS is one of the best films i forgot",
        "too short to be continued by a model",
        'He said "I do not know what this is" and left',
        'A "balanced" quotation is no reason to leave it out',
        "A “typographic one is a reason just the same, you see",
        '"I Am Curious: Yellow" is a film with emoji 🎬 indeed',
    )
    assert counts == {"too_short": 1, "open_quotation": 2, "duplicate": 1}
    found = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(found) == len({prompt.lower() for prompt in found}) == 103
    assert "THIS is one of the best films i" in found
    assert 'A "balanced" quotation is no reason to leave' in found
    assert {len(prompt.split()) for prompt in found} == {8}
    assert {name: len(rows) for name, rows in sets.items()} == {"train": 38, "development": 19, "eval": 46}


def test_a_set_without_prompts_and_shared_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt is left for development: 1 prompts in all"):
        review_prompts([Review("one two three four", True, "x")], prompt_words=2)
    with pytest.raises(UserError, match="the prompt 'a  b' is of both train and eval"):
        refuse_shared_prompts({"train": [{"prompt": "A b"}], "eval": [{"prompt": "c"}, {"prompt": "a  b"}]})
