"""What a format is: how its directories are recognised, and how one is opened as a run.

A new format is a subclass of `Format` in a file of its own, one line of `FORMATS` in
`dynamics/formats/__init__.py`, and one test. Its `open` returns a `CheckpointsRun` with one
`Checkpoint` per step (`shared/checkpoints.py`). Most formats store complete checkpoints: they
derive from `SeriesFormat` (`shared/full_checkpoints.py`) and only say how one checkpoint looks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dynamics.errors import DynamicsError, FormatError
from dynamics.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """What a user may say about a run beside its path. None means: not said.

    Attributes:
        base: the directory of the base model that adapters belong to.
        adapter: the name of one of several adapters in each checkpoint.
        lora_alpha: the alpha of LoRA, where checkpoints hold its factors and not its config.
        expert_blocks: whether an expert's columns of lora_B lie together, which PEFT's do not.
    """

    base: Path | None = None
    adapter: str | None = None
    lora_alpha: float | None = None
    expert_blocks: bool | None = None


# Option -> what it is called in messages.
_OPTION_NAMES = {
    "base": "base model",
    "adapter": "name of an adapter",
    "lora_alpha": "alpha of LoRA",
    "expert_blocks": "order of the factors of experts",
}


class Format(ABC):
    """One layout of files on a disk or behind a URL, from which a run can be read.

    Attributes:
        name: what `format=`, `--format` and results call it, for example "peft".
        description: the files that it is recognised by; `dynamics list formats` prints it.
        options: the fields of `OpenOptions` that it takes.
        single_files: whether a run of this format may be one file instead of a directory.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    single_files: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a run of this format lies at `path`. Reads a few small files at most.

        Args:
            path: an existing directory; an existing file only where `single_files` is set.
        """

    def resembles(self, path: Path) -> bool:
        """Whether an incomplete run of this format lies at `path`, if none recognises it.

        To open it gives a better reason than that nothing was recognised.
        """
        return False

    @abstractmethod
    def open(self, path: Path, options: OpenOptions) -> Run:
        """The run at `path`. No tensor is read yet.

        Args:
            path: existing, and accepted by `check_takes`.
            options: what the user said; only the fields in `self.options` are set.

        Raises:
            FormatError: nothing at `path` can be read as this format.
        """

    def check_takes(self, path: Path, options: OpenOptions) -> None:
        """Refuse a single file, or an option, that this format has no use for.

        Raises:
            FormatError: `path` is a file, and the format reads directories only.
            DynamicsError: an option is set that the format does not take.
        """
        if not self.single_files and not path.is_dir():
            raise FormatError(
                f"{path} is a file, but a run of format {self.name!r} is a directory; "
                "give the directory."
            )
        for option, value in vars(options).items():
            if value is not None and option not in self.options:
                raise self.takes_no(option, path)

    def takes_no(self, option: str, path: Path) -> DynamicsError:
        """What to raise where an option would have no effect on the run at a path."""
        return DynamicsError(
            f"{path} is of format {self.name!r}, which takes no {_OPTION_NAMES[option]}; "
            f"leave {option}= (--{option.replace('_', '-')}) out."
        )
