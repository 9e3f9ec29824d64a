"""A model in a local Hugging Face cache: models--ORG--NAME/ with one snapshot per revision.

huggingface_hub keeps `refs/NAME`, a file with the commit that a branch or tag stands for, and
`snapshots/COMMIT/`, whose files are links into `blobs/`. Suites of training checkpoints publish one
branch per step: Pythia's step1000, OLMo's step1000-tokens4B or stage1-step1000-tokens3B.
"""

import re
from functools import partial
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.checkpoints import model_checkpoint
from dynamics.formats.shared.full_checkpoints import Checkpoint, WeightsRun
from dynamics.formats.storage.files import children, contained, plain_name, read_range, size_of
from dynamics.formats.storage.model_files import has_model

_STEP = re.compile(r"step[-_]?(\d{1,15})(?!\d)", re.IGNORECASE)
# A commit is 40 digits; whatever is longer than this is no ref.
_LONGEST_REF = 200


class HubCacheRun(WeightsRun):
    """A model's folder in a Hugging Face cache; the step is the first `stepN` of a ref's name."""

    format = "hub_cache"
    description = "models--ORG--NAME/ of a Hugging Face cache, a ref per step"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether `path` has snapshots/, and refs/ or blobs/ beside it."""
        beside = (path / "refs", path / "blobs")
        return (path / "snapshots").is_dir() and any(each.is_dir() for each in beside)

    @staticmethod
    def checkpoints(path: Path, root: Path) -> dict[int, Checkpoint]:
        """See `WeightsRun.checkpoints`.

        Refs without a step (`main`) are left out, unless no ref has one: the only snapshot that a
        ref stands for, or the only one at all, then is at step 0.
        """
        refs = _refs(path / "refs", path / "refs")
        steps: dict[int, str] = {}
        for name in refs:
            found = _STEP.search(name)
            if found is None:
                continue
            step = int(found[1])
            if step in steps and _commit(refs[steps[step]], root) != _commit(refs[name], root):
                raise FormatError(
                    f"{path} has the refs {steps[step]} and {name}, both of step {step}; "
                    "open the snapshots of one of them alone, or remove the other from refs/."
                )
            steps.setdefault(step, name)
        if steps:
            return {
                step: _of_ref(path, root, name, refs[name], step) for step, name in steps.items()
            }
        snapshots = [each for each in children(path / "snapshots") if has_model(each)]
        referred = {path / "snapshots" / _commit(ref, root) for ref in refs.values()}
        chosen = [each for each in snapshots if each in referred] or snapshots
        if len(chosen) != 1:
            raise FormatError(
                f"{path} has {len(chosen)} snapshots with models and no ref with a step "
                f"({', '.join(refs) or 'none'}); open one of its snapshots/ alone."
            )
        return {0: model_checkpoint(chosen[0], root, 0)}


def _of_ref(path: Path, root: Path, name: str, ref: Path, step: int) -> Checkpoint:
    try:
        snapshot = path / "snapshots" / _commit(ref, root)
    except FormatError as problem:
        return Checkpoint(ref, partial(_raise, problem))
    if not snapshot.is_dir():
        missing = FormatError(
            f"{ref} stands for the snapshot {snapshot.name}, which is not in {snapshot.parent}; "
            f"download the revision {name!r} anew."
        )
        return Checkpoint(ref, partial(_raise, missing))
    return model_checkpoint(snapshot, root, step)


def _refs(directory: Path, top: Path) -> dict[str, Path]:
    """Name -> file of every ref; a branch with slashes in its name lies in sub-directories."""
    found: dict[str, Path] = {}
    for each in children(directory) if directory.is_dir() else ():
        if each.is_symlink():
            continue  # huggingface_hub writes none, and a linked directory may not end
        if each.is_dir():
            found |= _refs(each, top)
        elif each.is_file():
            found[each.relative_to(top).as_posix()] = each
    return found


def _commit(ref: Path, root: Path) -> str:
    size = size_of(contained(ref, root))
    if size > _LONGEST_REF:
        raise FormatError(f"{ref} has {size} bytes, expected a commit.")
    try:
        text = read_range(ref, 0, size).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise FormatError(f"{ref} holds no commit.") from error
    return plain_name(text, ref)


def _raise(problem: FormatError) -> dict:
    raise problem
