import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamics.errors import DynamicsError
from probes.relora import (
    TrainConfig,
    folder_text,
    prepare_data,
    standard_library_text,
    train_tokenizer,
)

TEXTS = ["def area(r):\n    return 3.14 * r * r\n" * 40, "π ≈ 3.14\n" * 60, "x = area(2)\n" * 80]


def test_the_standard_library_is_read_in_order_up_to_the_limit() -> None:
    texts = standard_library_text(200_000)
    assert sum(len(text.encode()) for text in texts) == pytest.approx(200_000, rel=0.01)
    first = min(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert texts[0] == first.read_text("utf-8")
    assert texts == standard_library_text(200_000)


def test_no_library_text_is_an_error() -> None:
    with pytest.raises(DynamicsError, match=r"within 0 bytes; give a folder of \.txt files"):
        standard_library_text(0)


def test_a_folder_gives_its_text_files_sorted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("second", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"first \xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("not this")
    assert folder_text(tmp_path) == ["first �", "second"]


def test_folders_without_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DynamicsError) as missing:
        folder_text(tmp_path / "none")
    assert (
        str(missing.value) == f"No folder {tmp_path / 'none'}; give a folder that holds .txt files."
    )
    with pytest.raises(DynamicsError) as empty:
        folder_text(tmp_path)
    assert (
        str(empty.value)
        == f"No text in {tmp_path}: found no .txt file; give a folder of .txt files."
    )
    (tmp_path / "a.txt").touch()
    with pytest.raises(DynamicsError, match=r"found 1 \.txt files, all empty"):
        folder_text(tmp_path)


def test_the_tokenizer_is_deterministic_and_loses_nothing() -> None:
    first, again = (train_tokenizer(TEXTS, 300) for _ in range(2))
    assert first.to_str() == again.to_str()
    assert 257 < first.get_vocab_size() <= 300
    assert first.id_to_token(0) == "<|endoftext|>"
    for text in TEXTS:
        assert first.decode(first.encode(text).ids) == text


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(DynamicsError) as refused:
        train_tokenizer(TEXTS, 256)
    assert str(refused.value) == "vocab_size is 256; byte-level BPE needs at least 257."


def test_blocks_are_the_text_cut_shuffled_and_split(config: TrainConfig) -> None:
    config = replace(config, vocab_size=300)
    data = prepare_data(TEXTS, config)
    assert data.tokenizer is not None
    tokens = [t for text in TEXTS for t in [*data.tokenizer.encode(text).ids, 0]]
    cut = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    blocks = torch.cat([data.train.blocks, data.validation.blocks])
    assert sorted(blocks.tolist()) == sorted(cut.tolist())
    assert not torch.equal(blocks, cut)
    assert len(data.validation) == round(0.05 * len(cut)) > 0
    item = data.train[1]
    assert torch.equal(item["input_ids"], data.train.blocks[1])
    assert torch.equal(item["labels"], item["input_ids"])


def test_the_order_depends_on_the_seed_alone(config: TrainConfig) -> None:
    config = replace(config, vocab_size=300)
    data = prepare_data(TEXTS, config)
    torch.manual_seed(99)
    twin = prepare_data(TEXTS, replace(config, method="full_rank"))
    other = prepare_data(TEXTS, replace(config, seed=4))
    assert twin.train.digest() == data.train.digest()
    assert torch.equal(twin.validation.blocks, data.validation.blocks)
    assert other.train.digest() != data.train.digest()
    assert sorted(other.train.blocks.tolist()) == sorted(data.train.blocks.tolist())


def test_every_seed_holds_out_the_same_and_no_more_than_asked_for(config: TrainConfig) -> None:
    config = replace(config, vocab_size=300)
    held_out = prepare_data(TEXTS, config).validation.blocks
    assert torch.equal(prepare_data(TEXTS, replace(config, seed=4)).validation.blocks, held_out)
    one = prepare_data(TEXTS, replace(config, validation_sequences=1)).validation.blocks
    assert torch.equal(one, held_out[:1])
    assert len(prepare_data(TEXTS, replace(config, validation_sequences=0)).validation) == 0


def test_too_little_text_is_refused(config: TrainConfig) -> None:
    with pytest.raises(DynamicsError, match="0 blocks of sequence_length = 16; give more text"):
        prepare_data(["short"], replace(config, vocab_size=300))
