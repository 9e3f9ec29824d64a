"""Text that every machine has, a tokenizer trained on it, and blocks in a fixed order."""

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamics.errors import DynamicsError
from probes.relora.config import TrainConfig
from probes.relora.data.sequences import TokenBlocks, TokenStream
from probes.relora.model import END_OF_TEXT_ID
from probes.relora.seeding import BLOCK_ORDER, HELD_OUT, stream_seed

END_OF_TEXT = "<|endoftext|>"
LARGEST_VALIDATION_FRACTION = 0.05
_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def standard_library_text(max_bytes: int = 2_500_000) -> list[str]:
    """The source files of the running Python's standard library, one string per file.

    In the order of their paths, without tests and installed packages, up to `max_bytes` in all
    (the last file is cut). The text is the same wherever the Python version is the same.

    Raises:
        DynamicsError: this Python has no library sources, or `max_bytes` is not positive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    left = max_bytes
    for path in sorted(root.rglob("*.py")):
        if left <= 0:
            break
        if _NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts):
            content = path.read_bytes()[:left]
            left -= len(content)
            texts.append(content.decode("utf-8", errors="replace"))
    texts = [text for text in texts if text]
    if not texts:
        raise DynamicsError(
            f"No Python source in {root} within {max_bytes} bytes; give a folder of .txt files."
        )
    return texts


def folder_text(path: str | os.PathLike[str]) -> list[str]:
    """Every *.txt below a folder, one string per file, in the order of their paths.

    Raises:
        DynamicsError: there is no such folder, or no text in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise DynamicsError(f"No folder {root}; give a folder that holds .txt files.")
    files = sorted(root.rglob("*.txt"))
    texts = [text for file in files if (text := file.read_text("utf-8", errors="replace"))]
    if not texts:
        found = f"{len(files)} .txt files, all empty" if files else "no .txt file"
        raise DynamicsError(f"No text in {root}: found {found}; give a folder of .txt files.")
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; token 0 is the end of a text. Equal texts give equal tokens.

    It may have fewer than `vocab_size` tokens where the text is short.

    Raises:
        DynamicsError: `vocab_size` leaves no room for the 256 bytes and the end of text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DynamicsError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {len(alphabet) + 1}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


@dataclass(frozen=True)
class TextData:
    """What a run trains and is validated on, in memory.

    Attributes:
        train: the sequences in training order.
        validation: held-out sequences; may be empty.
        tokenizer: what made the tokens, None where they came ready-made.
    """

    train: TokenBlocks
    validation: TokenBlocks
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class StreamedData:
    """The same with training sequences that are read as they are needed."""

    train: TokenStream
    validation: TokenBlocks
    tokenizer: Tokenizer | None = None


TrainingData = TextData | StreamedData


def prepare_data(texts: Sequence[str], config: TrainConfig) -> TextData:
    """Tokenizer, training blocks and held-out blocks of the texts.

    The texts are joined with end-of-text tokens and cut into blocks of `sequence_length`, the
    rest dropped. What is held out, `validation_sequences` but at most 5 %, is the same for every
    seed, so that validation losses compare; the order of the others depends on the seed alone.

    Raises:
        DynamicsError: the texts fill fewer than two blocks.
    """
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        tokens += encoding.ids
        tokens.append(END_OF_TEXT_ID)
    count = len(tokens) // config.sequence_length
    if count < 2:
        raise DynamicsError(
            f"The text has {len(tokens)} tokens, {count} blocks of sequence_length = "
            f"{config.sequence_length}; give more text or a shorter sequence_length."
        )
    blocks = torch.tensor(tokens[: count * config.sequence_length]).view(count, -1)  # (n, T)
    held_out = round(LARGEST_VALIDATION_FRACTION * count)
    held_out = min(config.validation_sequences, max(1, held_out))
    chosen = _permutation(count, stream_seed(0, HELD_OUT))
    rest = chosen[held_out:].sort().values
    order = _permutation(len(rest), stream_seed(config.seed, BLOCK_ORDER))
    return TextData(
        train=TokenBlocks(blocks[rest[order]]),
        validation=TokenBlocks(blocks[chosen[:held_out]]),
        tokenizer=tokenizer,
    )


def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
