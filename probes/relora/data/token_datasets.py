"""Tokenised datasets as training data: from the Hugging Face hub, or from local files."""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import TrainerCallback

from dynamics.errors import DynamicsError, one_line, require_extra
from probes.relora.config import TrainConfig
from probes.relora.data.sequences import COLUMN, TokenStream
from probes.relora.data.text import StreamedData

POSITION_NAME = "data_position.json"
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


def open_tokens(config: TrainConfig) -> StreamedData:
    """Open the dataset of a config as a stream, in its own order, the same for every seed.

    `config.dataset` is one of:
        the name of a dataset on the Hugging Face hub;
        a folder that is laid out like one (parquet or Arrow files, split "train");
        a folder that `save_to_disk` wrote;
        one .parquet or .arrow file.

    Each row has token ids under `input_ids`: sequence_length + 1 of them (the published schema) or
    more, of which the rest is left out; or sequence_length of them, and then the last position has
    no target.

    The tokenizer is `config.tokenizer`, if the config names one; else tokenizer.json in the folder
    of the dataset, if there is one; else None.

    Args:
        config: gives `dataset`, `tokenizer`, `sequence_length`, `vocab_size` and
            `validation_sequences`, which are the first ones of the dataset.

    Raises:
        DynamicsError: no such dataset or tokenizer, no column `input_ids`, or too few tokens.

    Example:
        >>> from dataclasses import replace
        >>> from datasets import Dataset
        >>> from probes.relora import micro, open_tokens
        >>> Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 5}).to_parquet("tokens.parquet") > 0
        True
        >>> config = replace(
        ...     micro(), dataset="tokens.parquet", sequence_length=3, validation_sequences=2
        ... )
        >>> data = open_tokens(config)
        >>> len(data.validation), next(iter(data.train))["shift_labels"].tolist()
        (2, [2, 3, 4])
    """
    assert config.dataset is not None
    dataset = config.dataset
    stream = TokenStream(
        lambda: _open(dataset),
        sequence_length=config.sequence_length,
        vocab_size=config.vocab_size,
        held_out=config.validation_sequences,
    )
    return StreamedData(
        train=stream, validation=stream.held_out_blocks(), tokenizer=_tokenizer_of(config)
    )


class StreamPosition(TrainerCallback):
    """Writes the position of the stream into each checkpoint, as data_position.json."""

    def __init__(self, stream: TokenStream, sequences_per_step: int) -> None:
        self._stream = stream
        self._sequences_per_step = sequences_per_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file in one move, so that it is never half written."""
        if not state.is_world_process_zero:
            return
        position = self._stream.position_state(state.global_step * self._sequences_per_step)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / POSITION_NAME
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(position))
        os.replace(unfinished, path)


def position_in(checkpoint: Path, sequences: int) -> dict[str, Any]:
    """The state for `TokenStream.start_at`, from a checkpoint after so many sequences.

    If a run was killed before this file was written, the stream skips the sequences one by one.
    """
    path = checkpoint / POSITION_NAME
    return json.loads(path.read_text()) if path.is_file() else {"position": sequences}


def _open(dataset: str) -> Any:
    try:
        import datasets  # takes a second, and only these runs need it
    except ImportError as error:
        raise require_extra("relora", error) from error

    path = Path(dataset)
    try:
        if (path / "state.json").is_file():
            source = datasets.load_from_disk(dataset).to_iterable_dataset()
        elif path.suffix in _BUILDERS:
            source = datasets.load_dataset(
                _BUILDERS[path.suffix], data_files=dataset, split="train", streaming=True
            )
        else:
            source = datasets.load_dataset(dataset, split="train", streaming=True)
    # The file system, the client of the hub and the readers of formats raise these.
    except (OSError, ValueError, RuntimeError) as error:
        raise DynamicsError(
            f"Cannot open the dataset {dataset!r}: {one_line(error)}; give the name of one on the "
            "Hugging Face hub, or a folder or file of parquet or Arrow."
        ) from error
    columns = source.column_names
    if columns is not None and COLUMN not in columns:
        raise DynamicsError(
            f"The dataset {dataset!r} has the columns {', '.join(columns)} and no {COLUMN!r}; "
            "tokenise it first, or give its text with --text."
        )
    return source.with_format("numpy")


def _tokenizer_of(config: TrainConfig) -> Tokenizer | None:
    assert config.dataset is not None
    beside = Path(config.dataset) / "tokenizer.json"
    name = config.tokenizer or (str(beside) if beside.is_file() else None)
    if name is None:
        return None
    try:
        if Path(name).is_file():
            return Tokenizer.from_file(name)
        return Tokenizer.from_pretrained(name)
    # The library raises Exception itself.
    except Exception as error:
        raise DynamicsError(
            f"Cannot load the tokenizer {name!r}: {one_line(error)}; give the path of a "
            "tokenizer.json, or go without it (--set tokenizer=none)."
        ) from error
