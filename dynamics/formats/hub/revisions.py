"""Which revisions of a model repository are the steps of a run: branches and tags, or commits."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from dynamics.errors import DynamicsError, FormatError, MissingError, near
from dynamics.formats.shared.steps import named_step, step_in_name
from dynamics.formats.storage.hub.path import HubPath
from dynamics.formats.storage.hub.repository import MAIN, WEIGHTS, Repository

_MAGIC = "*?["
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What stands before the number of a step: "stage1-step" of "stage1-step1000-tokens4B".
_COUNT = re.compile(
    r".*?(?:step|iter|iteration|update|checkpoint|ckpt|epoch)s?[-_=.]*(?=\d)", re.IGNORECASE
)


@dataclass(frozen=True)
class History:
    """The revisions that are the steps of a run.

    Attributes:
        paths: of each, by its step.
        passed_over: revision -> why it is no step.
    """

    paths: Mapping[int, HubPath]
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def places(self) -> dict[int, str]:
        """Where each step lies, by its commit: a branch may move."""
        return {
            step: str(HubPath(each.repository, each.commit, each.inner))
            for step, each in self.paths.items()
        }


def hub_name(path: Path) -> str | None:
    """The address of a model on the hub, where a path is a name "org/name" that is not here."""
    text = path.as_posix() if isinstance(path, Path) else ""
    if _NAME.fullmatch(text) is None or path.exists() or path.is_symlink() or path.parent.exists():
        return None
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return None
    return f"hf://{text}"


def history_of(
    path: HubPath, revisions: str | None = None, pattern: str | None = None
) -> History | HubPath:
    """The history in a repository; one path where one revision is asked for, or is all there is.

    Args:
        path: hf://org/name; with a revision that is a glob, as with `revisions`, those that match.
        revisions: a glob of the names of branches and tags: "stage1-*".
        pattern: a regular expression that is found in the names of the steps only. Its group
            `step`, or else its first group, is the step: "run-a_([0-9]+)k".

    Raises:
        DynamicsError: `pattern` is no regular expression, or has no group.
        FormatError: several revisions are of one step, or a count begins anew.
        MissingError: no branch or tag matches.
    """
    search = None if pattern is None else _search_of(pattern)
    glob = revisions
    if glob is None and path.revision is not None and (search or set(_MAGIC) & set(path.revision)):
        glob = path.revision
    if glob is None and search is None and (path.revision is not None or path.inner):
        return path
    repository = path.repository
    refs = repository.refs
    if glob is None and search is None:
        history = _of_refs(repository, refs, path.inner)
        return history or _of_commits(path) or path
    chosen = {name: each for name, each in refs.items() if fnmatchcase(name, glob or "*")}
    if not chosen and glob is not None:
        raise MissingError(
            f"hf://{repository.name} has no branch or tag {glob!r}{near(glob, list(refs))}; it has "
            f"{_abridged(list(refs))}."
        )
    if search is not None:
        steps = {name: step for name in chosen if (step := search(name)) is not None}
        if not steps:
            raise MissingError(
                f"hf://{repository.name}: --ref-pattern (ref_pattern=) {pattern!r} finds no step "
                f"in the names {_abridged(list(chosen))}."
            )
        return _of_steps(repository, chosen, steps, path.inner)
    history = _of_refs(repository, chosen, path.inner)
    if history is None and len(chosen) > 1:
        raise FormatError(
            f"hf://{repository.name}: none of the names {_abridged(list(chosen))} tells a step."
        )
    return history or HubPath(repository, next(iter(chosen)), path.inner)


def _of_refs(repository: Repository, refs: Mapping[str, str], inner: str) -> History | None:
    named = {name: step for name in refs if (step := named_step(name)) is not None}
    level = min((each.level for each in named.values()), default=9)
    named = {name: each for name, each in named.items() if each.level == level}
    if level > 1 or not named:
        return None
    stages: dict[str, list[tuple[int, str]]] = {}
    for name, step in named.items():
        stages.setdefault(_stage(name), []).append((step.step, name))
    _check_one_count(repository.name, stages)
    return _of_steps(repository, refs, {name: each.step for name, each in named.items()}, inner)


def _of_steps(
    repository: Repository, refs: Mapping[str, str], named: Mapping[str, int], inner: str
) -> History:
    """The history of the revisions whose steps are known; two of one step are one revision."""
    steps: dict[int, str] = {}
    for number, name in sorted((number, name) for name, number in named.items()):
        other = steps.setdefault(number, name)
        if refs[other] != refs[name]:
            raise FormatError(
                f"hf://{repository.name} has {other} and {name}, both of step {number}; choose "
                f"with --revisions GLOB (revisions=), such as {other!r}."
            )
    paths = {
        step: HubPath(repository, name, inner, label=f"step{step}" * (step_in_name(name) != step))
        for step, name in steps.items()
    }
    others = {name: "its name tells no step" for name in refs if name not in named}
    return History(paths, others)


def _search_of(pattern: str) -> Callable[[str], int | None]:
    """What reads the step in a name by a regular expression; None where there is none."""
    option = f"--ref-pattern (ref_pattern=) is {pattern!r}"
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise DynamicsError(f"{option}: that is no regular expression ({problem}).") from None
    if compiled.groups == 0:
        raise DynamicsError(f"{option}: it has no group; put the step in one: (?P<step>[0-9]+).")
    group = "step" if "step" in compiled.groupindex else 1

    def step(name: str) -> int | None:
        match = compiled.search(name)
        text = (match and match[group]) or ""
        named = named_step(f"step{text}") if text[:1].isdecimal() else None  # "10k" is 10000
        return None if named is None else named.step

    return step


def _stage(name: str) -> str:
    match = _COUNT.match(name)
    return match[0] if match else ""


def _check_one_count(repository: str, stages: Mapping[str, list[tuple[int, str]]]) -> None:
    """Refuse stages that begin to count anew."""
    spans = sorted((min(each)[0], max(each)[0], stage) for stage, each in stages.items())
    if all(one[1] < other[0] for one, other in pairwise(spans)):
        return
    shown = "; ".join(
        f"'{stage}*' ({len(stages[stage])} revisions, steps {first} to {last})"
        for first, last, stage in sorted(spans, key=lambda each: each[2])[:8]
    )
    raise FormatError(
        f"hf://{repository} has stages that each count their own steps; choose one with "
        f"--revisions (revisions=): {shown}{'; ...' * (len(spans) > 8)}."
    )


def _of_commits(path: HubPath) -> History | None:
    """The commits of main whose titles name steps; of several with one step, the last."""
    if _has_steps_inside(path):
        return None
    commits: dict[int, str] = {}
    for commit, title in path.repository.titles(MAIN):
        named = named_step(title)
        if named is not None and named.level == 0 and named.word.endswith(("step", "steps")):
            commits.setdefault(named.step, commit)
    if len(commits) < 2:
        return None
    return History(
        {
            step: HubPath(path.repository, commit, path.inner, label=f"step{step}")
            for step, commit in sorted(commits.items())
        }
    )


def _has_steps_inside(path: HubPath) -> bool:
    """Whether there are weights in folders, or in files, whose names carry steps."""
    files = [each for each in path.repository.tree(path.commit) if each.endswith(WEIGHTS)]
    parts = {part for each in files for part in each.split("/")}
    steps = {n.step for part in parts if (n := named_step(part)) is not None and n.level == 0}
    return len(steps) > 1


def one_of_many(path: HubPath) -> HubPath | None:
    """One of the folders of weights whose names carry steps; None where there are not several."""
    alike: dict[tuple[str, int], list[str]] = {}
    for file in path.repository.tree(path.commit):
        folder, _, name = file.rpartition("/")
        inside = not path.inner or file.startswith(f"{path.inner}/")
        if inside and file.endswith(WEIGHTS) and any(map(_is_step, folder.split("/"))):
            alike.setdefault((name, file.count("/")), []).append(folder)
    most = max(alike.values(), key=len, default=[])
    return HubPath(path.repository, path.revision, most[-1]) if len(most) > 1 else None


def _is_step(name: str) -> bool:
    named = named_step(name)
    return named is not None and named.level == 0


def prepare_folders(folder: HubPath) -> None:
    """Fetch of all folders of a commit what was fetched of the one that was opened."""
    folder.repository.prepare_alike([folder.commit], folders=True)


def prepare(history: History) -> None:
    """Ask for the files of all steps at once."""
    some = next(iter(history.paths.values()))
    some.repository.prepare(each.commit for each in history.paths.values())


def prepare_alike(history: History) -> None:
    """Fetch of all steps what was fetched of the one that was opened."""
    some = next(iter(history.paths.values()))
    some.repository.prepare_alike(each.commit for each in history.paths.values())


def cached_model(path: HubPath) -> Path | None:
    """The folder of a model in the local cache, where the hub must not be asked.

    None where it may be asked, or nothing was downloaded.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    if not constants.is_offline_mode() or path.inner:
        return None
    name = f"models--{path.repository.name.replace('/', '--')}"
    folder = Path(os.path.expanduser(constants.HF_HUB_CACHE)) / name
    if path.revision is None:
        return folder if folder.is_dir() else None
    ref = folder / "refs" / path.revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else path.revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() and ".." not in path.revision else None


def _abridged(names: list[str]) -> str:
    return ", ".join(names[:6]) + ", ..." * (len(names) > 6)
