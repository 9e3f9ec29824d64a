"""What a format sees in the directory of a run, and what else there could be a checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.found import CheckpointsFormat
from dynamics.formats.shared.look import CONTAINER, LATEST, few
from dynamics.formats.shared.series import is_one_checkpoint
from dynamics.formats.shared.steps import named_step
from dynamics.formats.storage.files import Entry, entries

# How the names of files end that may be checkpoints by themselves.
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".gguf", ".ckpt", ".pth.tar")
# What a model's own file is called, where its name tells no step.
_MODEL = ("model", "lit_model", "weights", "state_dict", "model_state_dict", "checkpoint", "ckpt")
# What the name of an entry says of it: a step; that it is the last or best one; a model.
NAMED, UNNAMED, OF_MODEL = "named", "unnamed", "model"


@dataclass
class Reading:
    """The checkpoints that a format sees: where they lie -> the step, where the name tells it."""

    format: CheckpointsFormat
    path: Path
    places: Mapping[Path, int | None]

    @property
    def is_lone(self) -> bool:
        """Whether it is one checkpoint, the directory itself."""
        return set(self.places) == {self.path}

    @property
    def above(self) -> set[str]:
        """Its places, and the directories between them and the directory of the run."""
        return _with_parents(self.places, self.path)

    @cached_property
    def number(self) -> float:
        """How many of its places hold a checkpoint, from a look at a few of them."""
        looked_at = few(sorted(self.places, key=str), self.path, 2)
        held = sum(is_told(self.format.holds_one, each) for each in looked_at)
        return len(self.places) * (held / len(looked_at) if held else 1.0)

    def is_new_beside(self, other: "Reading") -> bool:
        """Whether it sees other checkpoints than another reading, or more of them."""
        if self.is_lone or other.is_lone:
            return self.is_lone != other.is_lone
        return self.is_apart(other) or self.number > other.number

    def is_apart(self, other: "Reading") -> bool:
        """Whether no checkpoint of one is a checkpoint of the other, or a part of one."""
        one, two = set(map(_text, self.places)), set(map(_text, other.places))
        return not (one & other.above or two & self.above)

    @property
    def shown(self) -> str:
        """A few of its places, for messages."""
        names = [below(each, self.path) for each in list(self.places)[:2]]
        return ", ".join(names) + ", ..." * (len(self.places) > 2)


def may_be_others(reading: Reading) -> Iterator[Entry]:
    """What else could be a checkpoint in the directory of a run, by name."""
    for entry, _ in others_beside(reading):
        yield entry
    if reading.is_lone:
        for entry in entries(reading.path):
            if entry.listed_as_dir is not False and not entry.name.startswith("."):
                yield entry


def others_beside(reading: Reading) -> Iterator[tuple[Entry, tuple]]:
    """(Entry, its kind) of what may be a checkpoint by its name and is not of a reading.

    A kind begins with `NAMED`, `UNNAMED` or `OF_MODEL`; those of one kind differ in the step alone.
    """
    path, seen = reading.path, reading.above
    parents = {_text(each.parent): each.parent for each in reading.places}
    inside = {
        key: at
        for key, at in parents.items()
        if key.startswith(_text(path) + "/") and not is_one_checkpoint(at)
    }
    containers = [e.path for e in entries(path) if CONTAINER.fullmatch(e.name) and e.is_dir]
    for place in {_text(each): each for each in (path, *containers, *inside.values())}.values():
        for entry in entries(place):
            if entry.name.startswith(".") or f"{_text(place)}/{entry.name}" in seen:
                continue
            suffix = next((each for each in _SUFFIXES if entry.name.endswith(each)), "")
            if not suffix and entry.listed_as_dir is False:
                continue
            stem = entry.name.removesuffix(suffix)
            named = named_step(stem)
            if named is not None and named.level < 2:
                yield entry, (NAMED, _text(place), suffix, named.word, named.others)
            elif LATEST.fullmatch(stem):
                yield entry, (UNNAMED, entry.name)
            elif suffix and stem in _MODEL and place == path:
                yield entry, (OF_MODEL, entry.name)


def is_told(holds: Callable[[Path], bool], path: Path) -> bool:
    """What `holds` says of a path; False where it cannot look at it."""
    try:
        return holds(path)
    except (FormatError, OSError):
        return False


def _with_parents(places: Iterable[Path], top: Path) -> set[str]:
    found: set[str] = set()
    end = _text(top)
    for place in places:
        text = _text(place)
        while len(text) > len(end) and text not in found:
            found.add(text)
            text = text.rpartition("/")[0]
    return found


def _text(path: Path) -> str:
    return str(path).rstrip("/")


def below(path: Path, top: Path) -> str:
    """The rest of a path, below a directory that it lies in."""
    return _text(path).removeprefix(_text(top)).strip("/")
