"""Where in a store each parameter and scalar lies: mostly, but not always, at its own path."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from dynamics.recordings import paths
from dynamics.recordings.paths import Place


class StoredPaths:
    """The paths of the arrays in one store, by the paths that `paths.Place` gives them.

    They differ where a recording of before has the raw name in its path, and where two names differ
    in nothing but case or in the composition of their letters: such paths are one on some file
    systems, so the second one is encoded in another way.

    Args:
        nodes: path in the store -> metadata of each array.
    """

    def __init__(self, nodes: Mapping[str, Any]):
        self.places: dict[str, Place] = {}
        self._stored: dict[str, str] = {}
        self._taken: dict[str, str] = {}
        for path, node in nodes.items():
            attributes = getattr(node, "attributes", None)
            name = attributes.get(paths.NAME) if isinstance(attributes, dict) else None
            place = paths.place(path, name)
            if place is not None:
                self.places[path] = place
                self._stored[place.path] = path
                self._taken[_folded(_head(path))] = _head(place.path)

    def find(self, path: str) -> str:
        """The path in the store; a path of the store, and one that is not in it, are themselves."""
        return path if path in self.places else self._stored.get(path, path)

    def choose(self, path: str) -> str:
        """The path in the store of an array that is there, or that shall be."""
        place = paths.place(path)
        if place is None or path in self._stored:
            return self._stored.get(path, path)
        group, _, component = _head(path).partition("/")
        head, turn = _head(path), 0
        while self._taken.setdefault(_folded(head), _head(path)) != _head(path):
            turn += 1
            head = f"{group}/{paths.other_encoding(component, turn)}"
        stored = head + path.removeprefix(_head(path))
        self._stored[path] = stored
        self.places[stored] = place._replace(name=paths.decoded(place.name))
        return stored

    def attributes(self, stored: str) -> dict[str, str]:
        """The attribute that says the name, where the path in the store does not spell it."""
        place = self.places.get(stored)
        return {} if place is None or place == paths.place(stored) else {paths.NAME: place.name}


def _head(path: str) -> str:
    """The group and the component of the name, without the factor of an adapter."""
    return path.rpartition("/")[0] if path.startswith(f"{paths.ADAPTER}/") else path


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
