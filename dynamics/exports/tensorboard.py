"""TensorBoard: a directory of event files, one run in each folder."""

from pathlib import Path

from dynamics.errors import OutputExistsError, require_extra
from dynamics.exports.series import RunSeries

_EVENTS = "events.out.tfevents.*"


def to_tensorboard(runs: list[RunSeries], output: Path, *, overwrite: bool = False) -> str:
    """Write the runs into event files (float32); returns where they are.

    Args:
        runs: what `run_series` returned.
        output: the log directory; one run lies in it, several in folders of their names.
        overwrite: whether event files that are there are deleted first.

    Raises:
        OutputExistsError: there are event files, or it is a file.
        DynamicsError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise require_extra("tensorboard", error) from error
    folders = [output if len(runs) == 1 else output / each.name.replace("/", "_") for each in runs]
    if output.is_file():
        raise OutputExistsError(f"{output} is a file; choose another output (-o).")
    earlier = [file for folder in folders for file in folder.glob(_EVENTS)]
    if earlier and not overwrite:
        raise OutputExistsError(
            f"{earlier[0].parent} has event files already; choose another output (-o) or add "
            "--overwrite."
        )
    for file in earlier:
        file.unlink()
    for run, folder in zip(runs, folders, strict=True):
        with SummaryWriter(str(folder)) as writer:
            writer.add_text("settings", "\n\n".join(f"{k}: {v}" for k, v in run.settings.items()))
            for step, numbers in run.steps.items():
                for key, number in numbers.items():
                    writer.add_scalar(key, number, step)
    return f"Saved to {output}; see it with: tensorboard --logdir {output}"
