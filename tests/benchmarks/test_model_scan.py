"""Every causal language model that a tiny configuration can build is right under a layout, or refused."""

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model_scan import page, scan

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "packed", "padded"),
    [("llama", "right", "right"), ("gemma2", "refused", "right"), ("inkling_text", "refused", "refused")],
)
def test_a_model_is_right_or_refused(kind: str, packed: str, padded: str) -> None:
    found = scan(kind)
    assert [found.layouts[name].split(":")[0] for name in ("packed", "padded")] == [packed, padded]
    assert (found.faults, found.save) == ([], "yes")
    row = next(line for line in page([found]).splitlines() if line.startswith(f"| {kind} |"))
    assert row in PAGE.splitlines()  # the page is the scan's


def test_a_type_that_cannot_be_built_says_why() -> None:
    found = scan("no such model")
    assert (found.layouts, found.faults) == ({}, [])
    assert found.error.startswith("KeyError")


def test_the_page_has_every_type_once() -> None:
    rows = re.findall(r"^\| (\w[\w-]*) \| (?:right|refused)", PAGE, re.M)
    unbuilt = PAGE.replace("\n", " ").partition("as any other: ")[2].strip().removesuffix(".")
    assert sorted([*rows, *unbuilt.split(", ")]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
def test_every_model_is_right_or_refused_and_the_page_says_so() -> None:
    findings = [scan(kind) for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    assert {finding.kind: finding.faults for finding in findings if finding.faults} == {}
    assert page(findings) == PAGE
