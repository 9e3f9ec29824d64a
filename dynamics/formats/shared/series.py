"""From a directory to steps × checkpoint: which of its entries are the checkpoints of one run.

A format says how one checkpoint looks. Where several of them lie is the same for all formats: in
entries whose names carry a step, of the directory itself or of its `checkpoints/`; or one level
deeper, as in `step_100/hf/`. Only names are looked at, and a few entries: a directory may have ten
thousand of them, or lie behind a network.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.look import CONTAINER, LATEST, Look, Series, few
from dynamics.formats.shared.steps import BARE, NamedStep, named_step
from dynamics.formats.storage.files import Entry, entries

# What lies beside a model in a checkpoint, and what a model's own sub-directory is called.
_NO_MODEL = re.compile(r".*(?:optim|scheduler|sampler|rng|dataloader|tokenizer).*", re.IGNORECASE)
_OWN_PART = re.compile(r"(?:hf|huggingface|model|policy|pytorch_model_fsdp)\w*|.*model.*", re.I)


@dataclass(frozen=True)
class _Member:
    named: NamedStep
    entry: Entry
    inside: str = ""  # the name of what lies in it and is the checkpoint

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.entry.path / self.inside if self.inside else self.entry.path

    @property
    def family(self) -> tuple[int, int, str, tuple[str, ...]]:
        """Members of a family differ in the step alone. The first two numbers are its tier."""
        return (self.named.level, len(self.named.others), self.named.word, self.named.others)


@dataclass(frozen=True)
class _Reading:
    tier: tuple[int, int]
    members: list[_Member]
    place: Path
    passed_over: dict[str, str]


def find_series(path: Path, look: Look) -> Series | None:
    """The checkpoints at or below a path; None where there is none.

    Args:
        path: a directory, or a file.
        look: how one checkpoint looks.

    Raises:
        FormatError: two readings of the directory fit equally; the message shows both.
    """
    if not path.is_dir():
        return _single(path, look) if look.holds(path) else None
    if is_one_checkpoint(path) and _holds(path, look.holds):
        return _single(path, look)
    listed = entries(path)
    places = [path] + [
        each.path
        for each in listed
        if CONTAINER.fullmatch(each.name) and named_step(each.name) is None and each.is_dir
    ]
    readings = [found for place in places if (found := _reading(place, look)) is not None]
    if not readings:
        return _single(path, look) if _holds(path, look.holds) else _by_own_steps(listed, look)
    best = min(each.tier for each in readings)
    readings = [each for each in readings if each.tier == best]
    is_sure, has_own = best[0] < 2, _holds(path, look.beside or look.holds)
    if has_own and not is_sure:  # "2_Dense/" beside a model is a part of it
        parts = {each.entry.name: "its name hardly tells a step" for each in readings[0].members}
        return replace(_single(path, look), passed_over=parts)
    if len(readings) > 1:
        one, other = (_shown(each.members, path) for each in readings[:2])
        raise FormatError(
            f"{path} can be read as {one}, or as {other}; give the directory of one of them."
        )
    series = replace(_numbered(readings[0], look), is_sure=is_sure)
    if has_own:
        _add_unnamed(series, path, f"the model in {path.name or path}/ itself", look)
    unnamed = [each for each in entries(readings[0].place) if _names_none(each, look)]
    for entry in few(sorted(unnamed, key=lambda each: not LATEST.fullmatch(each.name)), path):
        _judge_unnamed(series, entry, look)
    return series


def is_one_checkpoint(path: Path) -> bool:
    """Whether the name of a directory is that of a checkpoint: what lies in it is a part of it."""
    named = named_step(path.absolute().name)
    return named is not None and named.level == 0 and named.word != BARE


def _holds(path: Path, holds: Callable[[Path], bool]) -> bool:
    try:
        return holds(path)
    except FormatError:
        return False


def _single(path: Path, look: Look) -> Series:
    named = named_step(look.label(Entry(path.absolute().name, path.parent, path.is_dir())))
    if named is not None and (named.level == 0 or not path.is_dir()):
        return Series({named.step: path})
    try:
        own = look.own_step(path)
    except FormatError:
        own = None  # reading the checkpoint tells what is wrong
    return Series({own or 0: path}, is_guess=own is None)


def _by_own_steps(listed: list[Entry], look: Look) -> Series | None:
    """best/, last/ and the like alone, whose own files tell their steps."""
    series = Series({})
    latest = [each for each in listed if LATEST.fullmatch(look.label(each))]
    for entry in few(latest, latest[0].place) if latest else ():
        _judge_unnamed(series, entry, look)
    return series if series.steps else None


def _reading(place: Path, look: Look) -> _Reading | None:
    """What the entries of one directory are as a series, or what lies in them."""
    families: dict[tuple, list[_Member]] = {}
    for entry in entries(place):
        if entry.name.startswith(".") or not _may_be_one(entry, look):
            continue
        named = named_step(look.label(entry))
        if named is not None:
            member = _Member(named, entry)
            families.setdefault(member.family, []).append(member)
    ordered = sorted(families.items(), key=lambda item: (item[0][:2], -len(item[1])))[:8]
    found = {
        family: members
        for family, members in ordered
        if any(look.holds_at(each.entry) for each in few(members, place))
    }
    passed_over: dict[str, str] = {}
    if not found:
        for family, members in ordered[:4]:
            inside, others = _one_level_deeper(members, look)
            if inside:
                found[family] = inside
                passed_over |= others
    if not found:
        return None
    tier = min(found)[:2]
    chosen = {family: each for family, each in found.items() if family[:2] == tier}
    for (one, first), (other, second) in combinations(chosen.items(), 2):
        if one[3] != other[3] and {e.named.step for e in first} & {e.named.step for e in second}:
            raise FormatError(
                f"{place} can be read as {_shown(first, place)}, or as {_shown(second, place)}; "
                "give the paths of one of them."
            )
    for family, members in found.items():
        if family not in chosen:
            words = "is less plain" if family[0] == tier[0] else "says less of a step"
            plainer = next(iter(chosen.values()))[0].entry.name
            reason = f"its name {words} than {plainer}"
            passed_over |= {each.entry.name: reason for each in members}
    together = [each for family in chosen.values() for each in family]
    return _Reading(tier, together, place, passed_over)


def _one_level_deeper(members: list[_Member], look: Look) -> tuple[list[_Member], dict[str, str]]:
    """(What each entry holds in a sub-directory of one name, what it holds beside that)."""
    names: dict[str, None] = {}
    for member in few(members, members[0].entry.place, 2):
        if not member.entry.is_dir:
            continue
        try:
            inside = [each for each in entries(member.path) if each.is_dir or look.suffixes]
        except FormatError:
            continue
        inside = [each for each in inside if not _NO_MODEL.fullmatch(each.name)]
        held = [each for each in few(inside, member.path) if look.holds_at(each)]
        if held and member.named.level and all(_counts(each, look) for each in held):
            return _steps_inside(members, look), {}
        names |= {each.name: None for each in held}
    own = [each for each in names if _OWN_PART.fullmatch(each)]
    if len(names) > 1 and len(own) != 1:
        one, other = (f"{members[0].entry.name}/{each}" for each in list(names)[:2])
        raise FormatError(
            f"{members[0].entry.place} can be read as {one}, ..., or as {other}, ...; give the "
            f"paths of one of them, such as '{members[0].entry.place}/*/{next(iter(names))}'."
        )
    if not names:
        return [], {}
    chosen = own[0] if own else next(iter(names))
    others = {f"*/{each}": f"*/{chosen} is the model" for each in names if each != chosen}
    return [_Member(each.named, each.entry, chosen) for each in members], others


def _counts(entry: Entry, look: Look) -> bool:
    named = named_step(look.label(entry))
    return named is not None and named.level < 2


def _steps_inside(members: list[_Member], look: Look) -> list[_Member]:
    """The steps in directories of epochs or of other things: epoch_0/step_10, d20/model_100.pt."""
    found = []
    for member in members:
        if not member.entry.is_dir:
            continue
        for entry in entries(member.path):
            named = named_step(look.label(entry))
            if named is not None and named.level < 2 and _may_be_one(entry, look):
                found.append(_Member(named, entry))
    return found


def _numbered(reading: _Reading, look: Look) -> Series:
    """The members by their steps. Of two with one step, the one that is a checkpoint counts."""
    by_step: dict[int, list[_Member]] = {}
    for member in reading.members:
        by_step.setdefault(member.named.step, []).append(member)
    series = Series({}, passed_over=dict(reading.passed_over))
    for step, members in sorted(by_step.items()):
        claim = [each for each in members if not each.named.repeats] or members
        if len(claim) > 1:
            claim = [each for each in claim if _holds(each.path, look.holds)] or claim
        first = claim[0]
        series.steps[step] = first.path
        if len(claim) > 1:
            paths = sorted(each.path for each in claim)
            one, other = (_below(each, reading.place) for each in paths[:2])
            series.clashing.extend(paths)
            series.clashes[step] = (
                f"{reading.place} holds {one} and {other}, both of step {step}; remove one of the "
                "two."
            )
        for each in members:
            if each not in claim:
                series.passed_over[each.entry.name] = f"{first.entry.name} is of step {step} too"
    return series


def _judge_unnamed(series: Series, entry: Entry, look: Look) -> None:
    """What to do with an entry whose name tells no step."""
    if entry.is_link and not entry.path.exists():
        if entry.name.endswith(look.suffixes or ("/",)) or LATEST.fullmatch(entry.name):
            series.passed_over[entry.name] = "it is a link that leads nowhere"
        return
    if not look.holds_at(entry):
        return
    if entry.is_link:
        target = entry.path.resolve()
        if target in [each.resolve() for each in series.steps.values()]:
            series.passed_over[entry.name] = f"it is a link to {target.name}"
            return
    if LATEST.fullmatch(look.label(entry)):
        _add_unnamed(series, entry.path, entry.name, look)
    else:
        series.passed_over[entry.name] = "its name tells no step"


def _add_unnamed(series: Series, path: Path, name: str, look: Look) -> None:
    """Add a checkpoint at the step that its own files tell, or pass over it."""
    try:
        step = look.own_step(path)
    except FormatError as problem:
        series.passed_over[name] = str(problem)
        return
    if step is None:
        series.passed_over[name] = "neither its name nor its files tell a step"
    elif step in series.steps:
        series.passed_over[name] = f"{series.steps[step].name} is of step {step} too"
    else:
        series.steps[step] = path


def _may_be_one(entry: Entry, look: Look) -> bool:
    if entry.name.endswith(".ckpt") and entry.listed_as_dir is not False:
        return False  # a directory of Lightning's, whose format knows it
    if look.suffixes and entry.name.endswith(look.suffixes):
        return True
    return entry.listed_as_dir is not False or (entry.is_link and not entry.path.exists())


def _names_none(entry: Entry, look: Look) -> bool:
    hidden = entry.name.startswith(".")
    return not hidden and _may_be_one(entry, look) and named_step(look.label(entry)) is None


def _below(path: Path, top: Path) -> str:
    return str(path).removeprefix(str(top)).strip("/")


def _shown(members: list[_Member], path: Path) -> str:
    names = [_below(each.path, path) for each in members[:2]]
    return ", ".join(names) + ", ..." * (len(members) > 2)
