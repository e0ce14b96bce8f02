"""The files that are written from the code are what the code writes now."""

import contextlib
from pathlib import Path

import pytest
import yaml

from mtbench_data import ROOT
from prefscan.common.config import Params
from prefscan.docs.reference import comments, described, generated, leaves
from prefscan.training.losses import LOSSES


@pytest.fixture
def repository() -> object:
    with contextlib.chdir(ROOT):
        yield


@pytest.mark.usefixtures("repository")
def test_the_committed_files_are_the_written_ones() -> None:
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"run `prefscan docs`: {path}"


@pytest.mark.usefixtures("repository")
def test_every_parameter_has_a_meaning_in_conf() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    meaning = described()
    without = [
        key
        for section in Params.model_fields
        if section not in ("losses", "stages")
        for key in leaves(values[section], section)
        if key not in meaning
    ]
    assert without == []


@pytest.mark.usefixtures("repository")
def test_conf_holds_every_loss_with_its_defaults() -> None:
    written = yaml.safe_load(Path("conf/losses/papers.yaml").read_text())
    assert list(written) == list(LOSSES)
    for name, loss in LOSSES.items():
        assert loss.read_options(written[name]) == loss.options()
    assert yaml.safe_load(Path("conf/sweep/losses.yaml").read_text())["loss"].split(", ") == list(LOSSES)


def test_a_comment_belongs_to_the_key_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("a: 1  # first\nb:\n  c: x  # within\n  d: {e: 2}\nf: y # too near to be one\n")
    assert comments(path) == {"a": "first", "b.c": "within"}
