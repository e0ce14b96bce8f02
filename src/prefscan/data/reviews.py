"""Reviews with human labels: read, cleaned, split into three parts without overlap, and their first words as prompts.

One part fits the sentiment reward, one checks it, and the first words of the third are the prompts. A review's part
depends on a hash of its words alone, so that the order of the file changes nothing. Reviews that share a long run of
words count as one: the same review often stands in such a file several times, with small edits.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from prefscan.common.config import SentimentReward
from prefscan.common.errors import UserError
from prefscan.common.io import read_text
from prefscan.data.sources import REVIEWS_FILE

COLUMNS = ("text", "label")
LABELS = {"0": False, "1": True}  # negative, positive
TAG = re.compile(r"</?(?:br|hr|p|i|b|em)\s*/?>", re.IGNORECASE)  # what movie reviews hold of HTML
WORD = re.compile(r"\w[\w']*")
RUN = 20  # words: at 8, "this is one of the worst movies I have" already joins reviews that have nothing in common
PROMPT_SETS = ("train", "development", "eval")


@dataclass(frozen=True)
class Review:
    """A review as read, without tags and with single spaces; near-duplicates share their `group`."""

    text: str
    positive: bool
    group: str

    @property
    def words(self) -> tuple[str, ...]:
        """Its words in lower case, which tell identical reviews whatever their punctuation."""
        return words(self.text)


@dataclass(frozen=True)
class ReviewSplit:
    """Reviews that fit the reward, that check it, and that become prompts; `counts` says what was found and left."""

    fit: list[Review]
    check: list[Review]
    prompts: list[Review]
    counts: dict[str, int]


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def clean(text: str) -> str:
    """The text without HTML's line breaks and emphasis, each run of white space as one space."""
    return " ".join(TAG.sub(" ", text).split())


def read_reviews(path: Path) -> list[Review]:
    """The reviews of a CSV file with the columns `text` and `label` (0 negative, 1 positive).

    Raises UserError for a file that is no such CSV, for a review without words, an unknown label, and one class alone.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 kB a field
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    texts, labels = [], []
    try:
        found = reader.fieldnames or ()
        missing = [column for column in COLUMNS if column not in found]
        if missing:
            raise UserError(
                f"{path} has no column {' or '.join(map(repr, missing))} (it has {', '.join(found)}); "
                "reviews need text and label: rename the columns, or name another file in reward.source"
            )
        for number, row in enumerate(reader, start=1):
            place = f"{path}, review {number}"
            if row["label"] not in LABELS:
                raise UserError(f"{place}: label {row['label']!r:.40} is neither 0 nor 1; correct or remove the row")
            texts.append(clean(row["text"] or ""))
            labels.append(LABELS[row["label"]])
            if not words(texts[-1]):
                raise UserError(f"{place}: the text {row['text']!r:.40} has no word; correct or remove the row")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num} is not CSV: {error}; the file may be cut short, fetch it again"
        ) from None
    if len(set(labels)) < 2:
        raise UserError(
            f"{path}: {len(labels)} reviews of {len(set(labels))} class; a classifier needs both, label 0 and label 1: "
            "name another file in reward.source"
        )
    return [
        Review(text, positive, group)
        for text, positive, group in zip(texts, labels, near_duplicates(texts), strict=True)
    ]


def near_duplicates(texts: Sequence[str], run: int = RUN) -> list[str]:
    """For each text the name of its group; texts that share `run` words in a row, or all words, are of one group.

    The name is a SHA-256: the smallest of those of the group's words. Windows of words are compared by a polynomial
    hash of 64 bits (Karp and Rabin 1987); two that meet by chance would join two reviews, which does no harm.
    """
    if not texts:
        return []
    tokens = [words(text) for text in texts]
    digests = [hashlib.sha256(" ".join(row).encode("utf-8", "replace")).hexdigest() for row in tokens]
    numbers: dict[str, int] = {}
    for row in tokens:
        for word in row:
            if word not in numbers:
                hashed = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8)
                numbers[word] = int.from_bytes(hashed.digest(), "little")
    lengths = np.array([len(row) for row in tokens])
    flat = np.fromiter((numbers[word] for row in tokens for word in row), np.uint64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(texts)), lengths)
    windows = max(0, len(flat) - run + 1)
    hashes = np.zeros(windows, np.uint64)
    for place in range(run if windows else 0):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + flat[place : place + windows]  # modulo 2^64
    whole = owner[:windows] == owner[run - 1 :]  # the window lies within one text
    hashes, of = hashes[whole], owner[:windows][whole]
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    edges = [(of[order][:-1][same], of[order][1:][same])]
    first: dict[str, int] = {}
    edges.append((np.arange(len(texts)), np.array([first.setdefault(digest, i) for i, digest in enumerate(digests)])))
    left, right = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(texts), len(texts)))
    _, components = connected_components(graph, directed=False)
    names: dict[int, str] = {}  # by component
    for component, digest in zip(components.tolist(), digests, strict=True):
        names[component] = min(digest, names.get(component, digest))
    return [names[component] for component in components.tolist()]


def place_by_hash(key: str, seed: int) -> float:
    """A number of [0, 1) that depends on the key and the seed alone."""
    return int(hashlib.sha256(f"{seed}:{key}".encode("utf-8", "replace")).hexdigest()[:8], 16) / 2**32


def split_reviews(
    reviews: Iterable[Review], check_share: float, prompts_share: float, least_words: int, seed: int = 0
) -> ReviewSplit:
    """Three parts without a common review or near-duplicate, each in an order that the file does not decide.

    Reviews of under `least_words` words give no prompts: those of the prompts' share fit the reward instead. Of
    identical reviews one is kept. Raises UserError when a part is empty.
    """
    parts: dict[str, dict[tuple[str, ...], Review]] = {"fit": {}, "check": {}, "prompts": {}}
    counts = {"reviews": 0, "identical": 0}
    groups = set()
    for review in reviews:
        counts["reviews"] += 1
        groups.add(review.group)
        at = place_by_hash(review.group, seed)
        if at < check_share:
            part = parts["check"]
        elif at < check_share + prompts_share and len(review.text.split()) >= least_words:
            part = parts["prompts"]
        else:
            part = parts["fit"]
        if known := part.get(review.words):
            counts["identical"] += 1
            review = min(review, known, key=lambda identical: (identical.text, identical.positive))
        part[review.words] = review
    counts["near_duplicates"] = counts["reviews"] - counts["identical"] - len(groups)
    fit, check, prompts = (
        sorted(part.values(), key=lambda review: (place_by_hash(" ".join(review.words), seed), review.text))
        for part in parts.values()
    )
    for name, part_reviews in (("fit", fit), ("check", check), ("prompts", prompts)):
        counts[name] = len(part_reviews)
        if not part_reviews:
            raise UserError(
                f"of {counts['reviews']} reviews none is left for {name}; raise reward.check_share or "
                f"reward.prompts_share, or name a file with more reviews of {least_words} words or more"
            )
    # A group may hold a short and a long review: with the prompts' share they would part.
    taken = {review.group for review in prompts}
    apart = [review for review in fit if review.group not in taken]
    counts["fit"], counts["beside_prompts"] = len(apart), len(fit) - len(apart)
    refuse_overlap({"fit": apart, "check": check, "prompts": prompts})
    return ReviewSplit(apart, check, prompts, counts)


def reviews_of(settings: SentimentReward, raw: Path) -> ReviewSplit:
    """The reviews as fetched, in the three parts that the settings ask for."""
    least_words = 2 * settings.excerpt_words  # a shorter review is a snippet
    reviews = read_reviews(raw / REVIEWS_FILE)
    return split_reviews(reviews, settings.check_share, settings.prompts_share, least_words, settings.split_seed)


def refuse_overlap(parts: Mapping[str, Sequence[Review]]) -> None:
    """Raises UserError when two parts share a review or near-duplicates."""
    where: dict[str, str] = {}
    for name, reviews in parts.items():
        for review in reviews:
            other = where.setdefault(review.group, name)
            if other != name:
                raise UserError(
                    f"the review {review.text!r:.60} is of both {other} and {name}; a reward must not be checked on, "
                    "or prompted by, what it was fitted to: split the reviews with split_reviews"
                )


def review_prompts(
    reviews: Iterable[Review],
    prompt_words: int = 8,
    development_share: float = 0.2,
    eval_share: float = 0.4,
    seed: int = 0,
) -> tuple[dict[str, list[dict[str, str]]], dict[str, int]]:
    """The first words of reviews as prompts, in sets without a common prompt, and counts of what gave none.

    Rows are `{"id", "prompt"}`, in an order by hash: the first n of a set are a random sample of it. Prompts that
    differ in case alone count as one. A prompt that would stop inside quotation marks is left out: how many opened
    decides whether the reply closes one. Raises UserError when a set is empty.
    """
    counts = {"too_short": 0, "open_quotation": 0, "duplicate": 0}
    prompts: dict[str, str] = {}
    for review in reviews:
        parts = review.text.split()
        prompt = " ".join(parts[:prompt_words])
        if len(parts) <= prompt_words:
            counts["too_short"] += 1
        elif prompt.count('"') % 2 or prompt.count("“") != prompt.count("”"):
            counts["open_quotation"] += 1
        else:
            counts["duplicate"] += prompt.lower() in prompts
            prompts[prompt.lower()] = min(prompt, prompts.get(prompt.lower(), prompt))
    sets: dict[str, list[dict[str, str]]] = {name: [] for name in PROMPT_SETS}
    for key in sorted(prompts, key=lambda key: hashlib.sha256(f"order:{seed}:{key}".encode()).digest()):
        at = place_by_hash(key, seed)
        name = "development" if at < development_share else "eval" if at < development_share + eval_share else "train"
        sets[name].append({"id": hashlib.sha256(prompts[key].encode()).hexdigest()[:16], "prompt": prompts[key]})
    for name, rows in sets.items():
        if not rows:
            raise UserError(
                f"no prompt is left for {name}: {len(prompts)} prompts in all, {counts}; give more reviews, or raise "
                f"the share of {name}"
            )
    refuse_shared_prompts(sets)
    return sets, counts


def refuse_shared_prompts(sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raises UserError when a prompt is of two sets, whatever its case and white space."""
    where: dict[str, str] = {}
    for name, rows in sets.items():
        for row in rows:
            key = " ".join(str(row["prompt"]).lower().split())
            other = where.setdefault(key, name)
            if other != name:
                raise UserError(
                    f"the prompt {row['prompt']!r:.60} is of both {other} and {name}; a model must not be evaluated on "
                    "prompts that it was trained on: remove it from one of the two"
                )
