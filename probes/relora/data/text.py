"""Texts, a tokenizer that is trained on them, and blocks of tokens in a fixed order."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
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
    """The source files of Python's standard library, one string per file: text on every machine.

    Files come in the order of their paths, without tests and installed packages. The text is the
    same wherever the Python version is the same.

    Args:
        max_bytes: size of all files together; the last file is cut.

    Raises:
        DynamicsError: this Python has no library sources, or `max_bytes` is not positive.

    Example:
        >>> from probes.relora import standard_library_text
        >>> texts = standard_library_text(max_bytes=10_000)
        >>> sum(len(text.encode()) for text in texts)
        10000
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    left = max_bytes
    for path in sorted(_library_files(root)):
        if left <= 0:
            break
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
    """Every *.txt file below a folder, one string per file, in the order of their paths.

    Files that are empty are left out.

    Raises:
        DynamicsError: there is no such folder, or no text in it.

    Example:
        >>> from pathlib import Path
        >>> from probes.relora import folder_text
        >>> Path("texts").mkdir()
        >>> Path("texts/one.txt").write_text("One text."), Path("texts/two.txt").write_text("Two.")
        (9, 4)
        >>> folder_text("texts")
        ['One text.', 'Two.']
    """
    root = Path(path)
    if not root.is_dir():
        raise DynamicsError(f"No folder {root}; give a folder that holds .txt files.")
    files = sorted(root.rglob("*.txt"))
    texts = [text for file in files if (text := file.read_text("utf-8", errors="replace"))]
    if not texts:
        content = f"{len(files)} .txt files, all empty" if files else "no .txt file"
        raise DynamicsError(f"No text in {root}: found {content}; give a folder of .txt files.")
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer. Equal texts give equal tokenizers.

    Token 0 marks the end of a text. On a short text the tokenizer may get fewer than `vocab_size`
    tokens.

    Args:
        texts: what to train on.
        vocab_size: at most so many tokens.

    Raises:
        DynamicsError: `vocab_size` is too small for the 256 bytes and the end of text.

    Example:
        >>> from probes.relora import train_tokenizer
        >>> tokenizer = train_tokenizer(["low lower lowest"] * 9, vocab_size=260)
        >>> tokenizer.get_vocab_size(), tokenizer.encode("lowest").tokens
        (260, ['low', 'e', 's', 't'])
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
    """The training and validation data of a run, in memory.

    Attributes:
        train: the sequences in training order.
        validation: held-out sequences; may be empty.
        tokenizer: the tokenizer that made the tokens; None if the tokens came without one.

    Example:
        >>> from probes.relora import TextData, TokenBlocks
        >>> blocks = torch.arange(32).view(8, 4)
        >>> data = TextData(train=TokenBlocks(blocks[:6]), validation=TokenBlocks(blocks[6:]))
        >>> len(data.train), len(data.validation)
        (6, 2)
    """

    train: TokenBlocks
    validation: TokenBlocks
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class StreamedData:
    """Like `TextData`, but the training sequences are read from a dataset when needed."""

    train: TokenStream
    validation: TokenBlocks
    tokenizer: Tokenizer | None = None


TrainingData = TextData | StreamedData


def prepare_data(texts: Sequence[str], config: TrainConfig) -> TextData:
    """Train a tokenizer on texts, and cut them into training blocks and held-out blocks.

    The texts are joined, with an end-of-text token after each, and cut into blocks of
    `sequence_length` tokens; the rest is dropped. `validation_sequences` blocks, but at most 5 %,
    are held out. These are the same for every seed, so that validation losses can be compared. The
    order of the other blocks depends on the seed only.

    Args:
        texts: one string per text.
        config: gives `vocab_size`, `sequence_length`, `validation_sequences` and `seed`.

    Raises:
        DynamicsError: the texts fill fewer than two blocks.

    Example:
        >>> from dataclasses import replace
        >>> from probes.relora import micro, prepare_data
        >>> config = replace(micro(), vocab_size=300, sequence_length=16)
        >>> data = prepare_data(["One small text. " * 20] * 100, config)
        >>> data.train.blocks.shape[1], data.train.sequence_length
        (16, 16)
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


def _library_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [each for each in folders if each not in _NOT_THE_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
