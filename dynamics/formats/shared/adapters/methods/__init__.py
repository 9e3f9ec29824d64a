"""Methods of PEFT whose weight is not base + s·B·A, and the formula of each.

A method is a function from a `Place` to a `Recipe`, and a line of `METHODS`. What it cannot serve
it refuses with `NotComputed`. The sources are the `get_delta_weight` and `merge` of PEFT's layers.
"""

from collections.abc import Callable

from dynamics.formats.shared.adapters.methods.place import NotComputed, Place, Recipe
from dynamics.formats.shared.adapters.methods.products import c3a, loha, lokr, vera
from dynamics.formats.shared.adapters.methods.rotations import boft, hra, oft
from dynamics.formats.shared.adapters.methods.scalings import ia3

__all__ = ["METHODS", "NotComputed", "Place", "Recipe"]

# How the names of the parts begin -> the method.
METHODS: dict[str, Callable[[Place], Recipe]] = {
    "hada": loha,
    "lokr": lokr,
    "vera": vera,
    "c3a": c3a,
    "oft": oft,
    "boft": boft,
    "hra": hra,
    "ia3": ia3,
}
