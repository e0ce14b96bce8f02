"""Reviews that tests make: a few telling words among neutral ones, long and short, with labels."""

import csv
import random
from pathlib import Path

GOOD, BAD = ("wonderful", "moving", "brilliant", "funny"), ("dull", "awful", "boring", "clumsy")
NEUTRAL = tuple(f"word{i}" for i in range(40))


def review_rows(count: int = 240, seed: int = 0) -> list[tuple[str, str]]:
    """Text and label of so many reviews, every third of them a snippet of 12 words, the others of 80."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        good = number % 2 == 0
        length = 12 if number % 3 == 0 else 80
        words = [rng.choice(NEUTRAL) for _ in range(length)]
        for place in range(0, length, 6):  # one in five telling words says the opposite
            words[place] = rng.choice(GOOD if good == (rng.random() < 0.8) else BAD)
        rows.append((" ".join(words), str(int(good))))
    return rows


def write_reviews(
    path: Path, rows: list[tuple[str, str]] | None = None, header: tuple[str, ...] = ("text", "label")
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(review_rows() if rows is None else rows)])
    return path
