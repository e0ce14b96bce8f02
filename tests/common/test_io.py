import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefscan.common.errors import UserError
from prefscan.common.io import (
    new_file,
    new_folder,
    read_json,
    read_jsonl,
    read_text,
    sha256,
    write_json,
    write_jsonl,
    write_text,
)
from tiny import write_rows

# What JSON and line splitting may trip over: line and paragraph separators of Unicode, form feed, quotes, emoji.
TEXT = 'β = "0.1"\u2028next\u2029\x0c\x85 \N{GRINNING FACE}\r\n'


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def test_sha256_is_the_standards() -> None:
    path = Path(os.devnull)
    assert sha256(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_new_file_is_there_when_its_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "made/on/the/way/rows.txt"
    with new_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@pytest.mark.parametrize("before", [None, "before"])
def test_a_failing_block_leaves_neither_a_partial_nor_a_changed_file(
    before: str | None, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "rows.txt"
    if before:
        path.write_text(before)

    def fail() -> None:
        with new_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("rows.txt", before)] if before else [])


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "base/old").mkdir(parents=True)
    (tmp_path / "base/old/model").write_text("old")
    (tmp_path / ".base.partial").mkdir()  # what a killed run leaves
    (tmp_path / ".base.partial/shard").write_text("half")
    with new_folder(tmp_path / "base") as folder:
        assert not list(folder.iterdir())
        (folder / "model").write_text("new")
        assert (tmp_path / "base/old/model").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["base", "base/model"]
    assert (tmp_path / "base/model").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@pytest.mark.parametrize("before", [True, False])
def test_a_failing_block_leaves_neither_a_partial_nor_a_changed_folder(
    before: bool, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "base"
    if before:
        path.mkdir()
        (path / "model").write_text("before")

    def fail() -> None:
        with new_folder(path) as folder:
            (folder / "nested").mkdir()
            (folder / "nested/model").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    left = [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*"))]
    assert left == (["base", "base/model"] if before else [])


@pytest.mark.parametrize("rows", [[], [{"text": TEXT}], [{"a": 1}, [2.5, None], "three"]])
def test_what_is_written_is_read_back(rows: list[Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_json(tmp_path / "rows.json", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == read_json(tmp_path / "rows.json") == rows
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == len(rows)


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "text", TEXT)
    assert (tmp_path / "text").read_bytes() == TEXT.encode()
    assert read_text(tmp_path / "text") == TEXT


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, [{"score": 1}, value])])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_not_written(write: Callable[[Path, Any], None], value: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path / "metrics.json", {"score": value})
    assert not list(tmp_path.iterdir())


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"a": 1}\r\n  \n\n[2]')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, [2]]


@pytest.mark.parametrize(
    ("last", "number"),
    [('{"prompt": "cut sh', 4), ('{"a": 1} {"b": 2}', 4), ("\n\nnull nil", 6), ("[" * 100_000, 4), ("9" * 5000, 4)],
)
def test_a_line_that_is_not_json_is_named_by_its_number(last: str, number: int, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"a": i} for i in range(3)])
    with path.open("a") as file:
        file.write(last)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line {number} is not JSON: ")
    assert str(caught.value).endswith("; the file may be cut short, fetch it again")


@pytest.mark.parametrize("text", ["", '[{"a": 1}, {"b', "[1] 2", "[" * 100_000, "9" * 5000])
def test_a_file_that_is_not_json_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} is not JSON: ")
    assert str(caught.value).endswith("; the file may be cut short, fetch it again")


@pytest.mark.parametrize("read", [read_text, read_json, read_jsonl])
@pytest.mark.parametrize(
    ("content", "byte", "offset"),
    [
        (b"\xff\xfe[\x00", "0xff", 0),
        ('["caf\u00e9"]'.encode("latin-1"), "0xe9", 5),
        ("[1]\n\u20ac".encode()[:-1], "0xe2", 4),
    ],
)
def test_a_file_that_is_not_utf8_is_named_with_the_offset(
    read: Callable[[Path], Any], content: bytes, byte: str, offset: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path} is not UTF-8: byte {byte} at offset {offset}; convert it first"


@pytest.mark.parametrize("read", [read_text, read_json, read_jsonl])
def test_a_missing_file_is_named_with_the_commands_that_bring_it(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl is missing; run `dvc repro` to make it, or `dvc pull`"):
        read(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("read", [read_text, read_json, read_jsonl])
def test_what_is_no_file_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").mkdir()
    with pytest.raises(UserError, match=r"pairs\.jsonl cannot be read: Is a directory; make it a file, and one"):
        read(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("before", [None, "before"])
def test_a_full_disk_leaves_no_partial_and_no_changed_file(before: str | None, small_disk: Path) -> None:
    path = small_disk / "rows.jsonl"
    if before:
        path.write_text(before)
    with pytest.raises(OSError, match=r"No space left|File too large"):
        write_jsonl(path, ["row" * 100] * 1000)
    assert [(file.name, file.read_text()) for file in small_disk.iterdir()] == (
        [("rows.jsonl", before)] if before else []
    )
