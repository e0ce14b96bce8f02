"""Generated input that is nearly right: a valid value with something in it replaced, removed or added."""

from typing import Any

from hypothesis import strategies as st

# Text as JSON can hold it, halves of surrogate pairs, control characters and markup included.
TEXT = st.one_of(
    st.text(st.characters(codec=None, categories=None), max_size=8),
    st.sampled_from(
        ["", "[[7]]", "{", "{0.x}", "../x", "\x00", "\ud800", "<script>", "user", "gpt", "human", "system"]
    ),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)
JSON = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a value, from the whole to its leaves."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with `new` at the place; the string `REMOVED` takes the place away."""
    if not path:
        return None if new == REMOVED else new
    first, *rest = path
    if not rest and new == REMOVED:
        if isinstance(value, dict):
            return {key: child for key, child in value.items() if key != first}
        return [child for number, child in enumerate(value) if number != first]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[first] = replaced(value[first], tuple(rest), new)
    return copy


REMOVED = "a place that is taken away"


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value with up to three changes."""
    value = valid
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(value)))
        value = replaced(value, place, draw(st.one_of(st.just(REMOVED), JSON)))
    return value
