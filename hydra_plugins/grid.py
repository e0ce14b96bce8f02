"""Lets conf/ compose the grid by `${axis:…}` and refuses numbers that are not decimal; DVC imports it as it composes.

The parser is this repository's own, also where another clone is installed, as in queued experiments.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
try:
    from prefscan.repo.composing import teach_omegaconf
finally:
    sys.path.pop(0)

teach_omegaconf()
