"""DeepSpeed checkpoints: global_stepN/ with model states, and with ZeRO the float32 masters."""

from functools import partial
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.full_checkpoints import FullCheckpoint, SeriesFormat
from dynamics.formats.shared.hugging_face_files import logged_scalars
from dynamics.formats.shared.look import Look
from dynamics.formats.shared.model_config import model_attrs
from dynamics.formats.shared.steps import named_step, step_inside
from dynamics.formats.storage.deepspeed_tensors import (
    deepspeed_tensors,
    has_model_states,
    model_states,
)
from dynamics.formats.storage.files import entries, is_directory, read_range, size_of


class DeepSpeedFormat(SeriesFormat):
    """A directory of global_stepN/, one of them, or a Trainer's checkpoint-N/ that hold one."""

    name = "deepspeed"
    description = (
        "a directory with mp_rank_00_model_states.pt or ZeRO partitions for each step (DeepSpeed: "
        "global_stepN/)"
    )

    def holds(self, path: Path) -> bool:
        """Whether there are model states in a directory, or in the one that its `latest` names."""
        return _states_at(path) is not None

    def look(self) -> Look:
        """See `SeriesFormat.look`. Beside several, the one that `latest` names is one of them."""
        return Look(self.holds, own_step=self.own_step, beside=has_model_states)

    def checkpoint(self, path: Path, root: Path, step: int) -> FullCheckpoint:
        """See `SeriesFormat.checkpoint`."""
        at = _states_at(path) or path
        tensors = partial(deepspeed_tensors, at, root)
        if at == root:  # what lies beside the opened directory is not part of the run
            return FullCheckpoint(at, tensors)
        above = at.parent
        return FullCheckpoint(
            at,
            tensors,
            partial(model_attrs, above, root),
            partial(logged_scalars, above, root, step),
        )

    def own_step(self, path: Path) -> int | None:
        """The step in the tag, or the `global_steps` that the engine counted."""
        at = _states_at(path)
        if at is None:
            return None
        named = named_step(at.name)
        if named is not None and named.level == 0:
            return named.step
        file, states = model_states(at, at)
        step = step_inside(states.get("global_steps"))
        if step is None:
            raise FormatError(
                f"{file} has no number global_steps; name its directory global_stepN."
            )
        return step


def _states_at(path: Path) -> Path | None:
    """The directory with model states: the path, or the one in it that `latest` names."""
    if not is_directory(path):
        return None
    if has_model_states(path):
        return path
    listed = {each.name: each for each in entries(path)}
    if "latest" in listed and not listed["latest"].is_dir:
        named = path / "latest"
        tag = read_range(named, 0, min(size_of(named), 256)).decode("utf-8", "replace").strip()
        if tag and not set(tag) & set("/\\\0") and tag not in (".", ".."):
            return path / tag if has_model_states(path / tag) else None
    inside = [each.path for each in listed.values() if each.name.startswith("global_step")]
    inside = [each for each in inside if has_model_states(each)]
    return inside[0] if len(inside) == 1 else None
