"""What the benchmarks find in a working directory."""

from pathlib import Path
from typing import Any

import pytest

from tiny import write_rows


@pytest.fixture
def prepared(in_tmp: Path, tiny_model: Path, pairs: list[dict[str, Any]]) -> Path:
    """A working directory with the tiny model as base and its training pairs, as fetch and prepare leave them."""
    (in_tmp / "models").mkdir()
    (in_tmp / "models/base").symlink_to(tiny_model)
    write_rows(in_tmp / "data/pairs/train.jsonl", pairs)
    return in_tmp
