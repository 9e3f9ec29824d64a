"""Damage that hypothesis chooses: to the bytes of a file, and to the values of a JSON document."""

import copy
import json

from hypothesis import strategies as st

_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, 10**30]),
    st.integers(-(2**70), 2**70),
)
_STRINGS = st.one_of(
    st.sampled_from(["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\\b", "\0", "F32", "I64"]),
    st.text(max_size=12),
)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, st.floats(), _STRINGS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_STRINGS, inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw, seed: bytes):
    """`seed` after one to four changes: cut, overwritten, shortened, grown, repeated."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        change = draw(st.sampled_from(["cut", "byte", "number", "drop", "insert", "repeat"]))
        length = draw(st.integers(1, 64))
        if change == "cut":
            del data[at:]
        elif change == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif change == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            data[at : at + size] = (draw(_NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif change == "drop":
            del data[at : at + length]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        else:
            data[at:at] = data[at : at + length]
    return bytes(data)


@st.composite
def damaged_json(draw, seed):
    """A JSON document after one to three values in it were replaced, removed or added."""
    document = copy.deepcopy(seed)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return document
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            holder[key] = draw(_VALUES)
        elif change == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(_STRINGS)] = draw(_VALUES)
        else:
            holder.append(draw(_VALUES))
    return document


def encoded(document) -> bytes:
    """A document as a JSON file; what JSON cannot spell (lone surrogates) becomes '?'."""
    return json.dumps(document).encode("utf-8", errors="replace")


def _places(value):
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
