"""A model in a local Hugging Face cache: models--ORG--NAME/ with one snapshot per revision.

huggingface_hub keeps two kinds of entries. `refs/NAME` is a file with the commit of a branch or
tag. `snapshots/COMMIT/` holds links into `blobs/`. Suites of training checkpoints publish one
branch per step: Pythia's step1000, OLMo's step1000-tokens4B or stage1-step1000-tokens3B.
"""

import re
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.found import Found, Unopened, Unreadable
from dynamics.formats.shared.full_checkpoints import FullCheckpointsFormat
from dynamics.formats.shared.hugging_face_files import model_checkpoint
from dynamics.formats.storage.files import children, contained, plain_name, read_range, size_of
from dynamics.formats.storage.model_files import has_model

_STEP = re.compile(r"step[-_]?(\d{1,15})(?!\d)", re.IGNORECASE)
# A commit has 40 digits; a longer file than this is not a ref.
_LONGEST_REF = 200


class HubCacheFormat(FullCheckpointsFormat):
    """A model's folder in a Hugging Face cache; the step is the first `stepN` in a ref's name."""

    name = "hub_cache"
    description = "models--ORG--NAME/ of a Hugging Face cache, a ref per step"

    def recognises(self, path: Path) -> bool:
        """Whether `path` has snapshots/, and refs/ or blobs/ beside it."""
        beside = (path / "refs", path / "blobs")
        return (path / "snapshots").is_dir() and any(each.is_dir() for each in beside)

    def checkpoints(self, path: Path, root: Path) -> Found:
        """See `FullCheckpointsFormat.checkpoints`.

        Refs without a step (`main`) are left out where other refs have one. Where none has one,
        the only snapshot that a ref names, or else the only snapshot at all, is step 0.
        """
        refs = _refs(path / "refs", path / "refs")
        steps: dict[int, str] = {}
        for name in refs:
            match = _STEP.search(name)
            if match is None:
                continue
            step = int(match[1])
            if step in steps and _commit(refs[steps[step]], root) != _commit(refs[name], root):
                raise FormatError(
                    f"{path} has the refs {steps[step]} and {name}, both of step {step}; "
                    "open the snapshots of one of them alone, or remove the other from refs/."
                )
            steps.setdefault(step, name)
        if steps:
            return Found(
                {
                    step: _checkpoint_of(path, root, name, refs[name], step)
                    for step, name in steps.items()
                }
            )
        snapshots = [each for each in children(path / "snapshots") if has_model(each)]
        referred = {path / "snapshots" / _commit(ref, root) for ref in refs.values()}
        chosen = [each for each in snapshots if each in referred] or snapshots
        if len(chosen) != 1:
            raise FormatError(
                f"{path} has {len(chosen)} snapshots with models and no ref with a step "
                f"({', '.join(refs) or 'none'}); open one directory below snapshots/ alone."
            )
        return Found({0: model_checkpoint(chosen[0], root, 0)}, is_guess=True)


def _checkpoint_of(path: Path, root: Path, name: str, ref: Path, step: int) -> Unopened:
    try:
        snapshot = path / "snapshots" / _commit(ref, root)
    except FormatError as problem:
        return Unreadable(ref, problem)
    if not snapshot.is_dir():
        missing = FormatError(
            f"{ref} names the snapshot {snapshot.name}, which is not in {snapshot.parent}; "
            f"download the revision {name!r} again."
        )
        return Unreadable(ref, missing)
    return model_checkpoint(snapshot, root, step)


def _refs(directory: Path, top: Path) -> dict[str, Path]:
    """Name -> file of every ref; a branch with slashes in its name lies in sub-directories."""
    refs: dict[str, Path] = {}
    for each in children(directory) if directory.is_dir() else ():
        if each.is_symlink():
            continue  # huggingface_hub writes no links here; a linked directory may have no end
        if each.is_dir():
            refs |= _refs(each, top)
        elif each.is_file():
            refs[each.relative_to(top).as_posix()] = each
    return refs


def _commit(ref: Path, root: Path) -> str:
    size = size_of(contained(ref, root))
    if size > _LONGEST_REF:
        raise FormatError(f"{ref} has {size} bytes, too many for a commit; download it again.")
    try:
        text = read_range(ref, 0, size).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise FormatError(f"{ref} does not hold a commit; download it again.") from error
    return plain_name(text, ref)
