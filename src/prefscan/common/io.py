"""Reading and writing the files that stages exchange; a written file or folder is whole or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefscan.common.errors import UserError

DIGITS = 3  # that git holds of a number: another processor changes the seventh, intervals are wider than the third
NOTHING = 1e-9  # below it a p-value is the noise of double precision
PARAMETER = "beta"
BAD_JSON = (ValueError, RecursionError)  # also a number of over 4,300 digits, and brackets nested too deep


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; becomes `path` when the block ends well and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; replaces `path` when the block ends well and disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def rounded(value: Any) -> Any:
    """Every float to DIGITS significant digits, in whatever holds it, a pandas table too; β is a parameter and stays.

    For files in git, so that a run on another processor leaves them as they are, but where a number lies within its
    rounding noise of the middle between two: of three digits one in
    some thousands does, of four one in some hundreds.
    """
    if isinstance(value, dict):
        return {name: each if name == PARAMETER else rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if hasattr(value, "to_csv"):
        return value.apply(lambda column: column if column.name == PARAMETER else column.map(rounded))
    if not isinstance(value, float):
        return value
    return 0.0 if abs(value) < NOTHING else float(f"{agreed(value):.{DIGITS}g}")


def agreed(value: float) -> float:
    """To the digits that processors agree on, before any rounding: a mean that lies exactly in the middle between two
    roundings, as one of eight scores may, would else go either way.
    """
    return float(f"{value:.6g}")


def write_table(path: Path, table: Any) -> None:
    """A pandas table as CSV for git."""
    write_text(path, rounded(table).to_csv(index=False))


def read_text(path: Path) -> str:
    """Without a byte order mark. Raises UserError for a missing or unreadable file, and for one that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run `dvc repro` to make it, or `dvc pull` to fetch it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; make it a file, and one that you may read") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; convert it first"
        ) from None


def read_json(path: Path) -> Any:
    """Raises UserError as `read_text` does, and for a file that is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except BAD_JSON as error:
        raise UserError(f"{path} is not JSON: {error}; the file may be cut short, fetch it again") from None


def read_jsonl(path: Path) -> list[Any]:
    """Raises UserError as `read_text` does, and for the first line that is not JSON."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except BAD_JSON as error:
                raise UserError(
                    f"{path}, line {number} is not JSON: {error}; the file may be cut short, fetch it again"
                ) from None
    return rows
