"""The one parser of numbers that people write: in conf/, in overrides and in params.yaml.

YAML 1.1 reads 8:16 as 496 and 0100 as 64, and DVC, which reads YAML 1.2, does not: here both are refused. Equal numbers
have one form, since DVC names cells after them.
"""

import math
import re
from typing import Any

import yaml

DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
WORD = re.compile(r"[A-Za-z_]\w*")
NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)  # the schema refuses them by their keys
WHOLE = 2**53  # beyond it not every whole number is a float


def canonical(value: Any) -> Any:
    """1.0 as 1, the same for every equal number; what is no number as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < WHOLE:
        return int(value)
    return value


def number(token: str) -> int | float:
    """A decimal number as it is written, 1.0 a float; raises ValueError for any other text, and beyond all floats."""
    if not DECIMAL.fullmatch(token):
        raise ValueError(f"{token!r} is no decimal number; write it like 16, 0.1 or 1e-3")
    value = int(token) if re.fullmatch(r"[-+]?\d+", token) else float(token)
    if math.isinf(value):
        raise ValueError(f"{token!r} is beyond every float; write a smaller number")
    return value


def axis(*values: Any) -> list[Any]:
    """One axis of the grid: the recipe's value, then those of the sweep's text between commas, each once.

    Raises ValueError for what is neither a decimal number nor a word, such as a loss or `epoch`.
    """
    found: list[Any] = []
    for value in values:
        tokens = value.split(",") if isinstance(value, str) else [value]
        for token in tokens:
            if isinstance(token, str) and not (token := token.strip()):
                if len(tokens) > 1:
                    raise ValueError(f"{value!r} has nothing between two commas; take one out")
                continue
            if isinstance(token, str) and not WORD.fullmatch(token):
                token = number(token)
            if isinstance(token, bool) or not isinstance(token, (int, float, str)):
                raise ValueError(f"{token!r} is neither number nor word; write text with commas, like '0.1, 0.5'")
            if (token := canonical(token)) not in found:
                found.append(token)
    return found


def construct_number(loader: Any, node: yaml.ScalarNode) -> int | float:
    if NOT_FINITE.fullmatch(node.value):
        return float(node.value.replace(".", ""))
    try:
        return number(node.value)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


class Loader(yaml.CSafeLoader):
    """YAML whose numbers are decimal: 1e-3 is one too, and 8:16 and 0100 raise YAMLError."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)
for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct_number)


def read_yaml(text: str) -> Any:
    """Raises YAMLError for what is no YAML, and for a number that is not decimal."""
    return yaml.load(text, Loader)  # noqa: S506 - a safe loader's subclass
