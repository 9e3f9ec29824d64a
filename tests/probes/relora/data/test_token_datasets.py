"""Tokenised datasets: read in their order, resumed at their position, the published schema."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy

from dynamics.errors import DynamicsError
from probes.relora import TokenBlocks, TrainConfig, build_model, open_tokens, train_tokenizer
from tests.probes.relora.conftest import random_data, tiny_config

SHARD = 12
TOKENS = np.random.default_rng(0).integers(0, 256, (3 * SHARD, 17))


def table(tokens: np.ndarray) -> pa.Table:
    return pa.table({"input_ids": pa.array(tokens.tolist(), pa.list_(pa.int32()))})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A dataset repository of three parquet files, laid out as on the hub."""
    (tmp_path / "shards/data").mkdir(parents=True)
    for index in range(3):
        path = tmp_path / f"shards/data/train-{index:05}-of-00003.parquet"
        pq.write_table(table(TOKENS[index * SHARD :][:SHARD]), path, row_group_size=5)
    return tmp_path / "shards"


def streamed(dataset: Path, **changes: Any) -> TrainConfig:
    return tiny_config(dataset=str(dataset), validation_sequences=3, **changes)


def test_sequences_are_read_in_their_order_and_over_again(shards: Path) -> None:
    data = open_tokens(streamed(shards))
    assert data.validation.blocks.tolist() == TOKENS[:3].tolist()
    examples = iter(data.train)
    for expected in [*TOKENS[3:], *TOKENS[3:8]]:
        example = next(examples)
        assert example["input_ids"].tolist() == expected[:16].tolist()
        assert example["shift_labels"].tolist() == expected[1:].tolist()


def test_files_arrow_and_saved_datasets_give_the_same_sequences(
    shards: Path, tmp_path: Path
) -> None:
    pq.write_table(table(TOKENS), tmp_path / "all.parquet")
    with pa.ipc.new_stream(str(tmp_path / "all.arrow"), table(TOKENS).schema) as writer:
        writer.write_table(table(TOKENS))
    datasets.Dataset(table(TOKENS)).save_to_disk(tmp_path / "saved")
    digests = {
        open_tokens(streamed(path)).train.digest()
        for path in (shards, tmp_path / "all.parquet", tmp_path / "all.arrow", tmp_path / "saved")
    }
    assert len(digests) == 1


def test_the_last_position_of_the_published_schema_has_a_target(config: TrainConfig) -> None:
    model = build_model(config).double().eval()
    blocks = torch.from_numpy(TOKENS[:2])
    batch = [TokenBlocks(blocks, 16)[index] for index in (0, 1)]
    with torch.no_grad():
        loss = model(**{name: torch.stack([each[name] for each in batch]) for name in batch[0]})
        logits = model(blocks[:, :-1]).logits
    expected = cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    # The library computes losses in float32.
    assert loss.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_its_sequence_without_reading_the_shards_before(
    shards: Path, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    config = streamed(shards, save_every=14)
    whole = run_to_end(config, tmp_path / "whole", data=open_tokens(config))
    assert torch.cat(whole.batches).tolist() == TOKENS[3:35, :16].tolist()
    shutil.copytree(tmp_path / "whole", tmp_path / "interrupted")
    shutil.rmtree(tmp_path / "interrupted/checkpoint-16")
    position = json.loads((tmp_path / "interrupted/checkpoint-14/data_position.json").read_text())
    assert position["position"] == 28
    # 3 + 28 sequences lie in the third shard; whoever reads the second meets no parquet.
    (shards / "data/train-00001-of-00003.parquet").write_bytes(b"unread")
    resumed = run_to_end(config, tmp_path / "interrupted", data=open_tokens(config), resume=True)
    assert torch.cat(resumed.batches).tolist() == TOKENS[31:35, :16].tolist()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_its_own_state_a_position_is_gone_to_by_reading(shards: Path) -> None:
    stream = open_tokens(streamed(shards)).train
    stream.start_at({"position": 40})  # in the second pass of 33
    assert next(iter(stream))["input_ids"].tolist() == TOKENS[3 + 7, :16].tolist()


@pytest.mark.slow
def test_every_position_restores_the_sequence_after_it(shards: Path) -> None:
    stream = open_tokens(streamed(shards)).train
    examples, expected = iter(stream), [*TOKENS[3:], *TOKENS[3:]]
    for position in range(2, 60, 2):
        next(examples), next(examples)
        other = open_tokens(streamed(shards)).train
        other.start_at(json.loads(json.dumps(stream.position_state(position))))
        assert next(iter(other))["input_ids"].tolist() == expected[position][:16].tolist()


def test_what_cannot_be_trained_on_is_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DynamicsError, match="Sequence 0 of the dataset has 17 tokens and sequence"):
        open_tokens(streamed(shards, sequence_length=32))
    with pytest.raises(DynamicsError, match=r"has token \d+ and vocab_size is 100; set the vocab"):
        open_tokens(streamed(shards, vocab_size=100))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DynamicsError, match=r"has the columns text and no 'input_ids'"):
        open_tokens(streamed(tmp_path / "text.parquet"))
    with pytest.raises(DynamicsError, match="Cannot open the dataset"):
        open_tokens(streamed(tmp_path / "none.parquet"))
    all_held_out = replace(streamed(shards), validation_sequences=36)
    with pytest.raises(DynamicsError, match="no sequence to train on"):
        next(iter(open_tokens(all_held_out).train))


def test_a_tokenizer_beside_the_data_is_the_runs(shards: Path) -> None:
    assert open_tokens(streamed(shards)).tokenizer is None
    train_tokenizer(["a b c"], 300).save(str(shards / "tokenizer.json"))
    tokenizer = open_tokens(streamed(shards)).tokenizer
    assert tokenizer is not None
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    with pytest.raises(DynamicsError, match="go without it"):
        open_tokens(streamed(shards, tokenizer=str(shards / "data/train-00000-of-00003.parquet")))


@pytest.mark.slow
def test_data_in_memory_has_no_position_to_keep(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    run = run_to_end(replace(config, max_steps=4), tmp_path, data=random_data())
    assert not list(run.path.glob("checkpoint-*/data_position.json"))


@pytest.mark.slow
def test_the_shares_of_two_processes_are_the_sequences_of_one(shards: Path) -> None:
    expected = [row[:16].tolist() for row in [*TOKENS[3:], *TOKENS[3:]]]
    streams = [open_tokens(streamed(shards)).train for _ in range(2)]
    for process, stream in enumerate(streams):
        stream.share(process, 2, run_length=3)
    iterators = [iter(stream) for stream in streams]
    for start in range(0, 60, 6):  # one step of two processes with three sequences each
        for process, examples in enumerate(iterators):
            found = [next(examples)["input_ids"].tolist() for _ in range(3)]
            assert found == expected[start + 3 * process :][:3]
        # The first process has not read the second one's share, and resumes after it.
        state = streams[0].position_state(start + 6)
        resumed = open_tokens(streamed(shards)).train
        resumed.start_at(json.loads(json.dumps(state)))
        assert next(iter(resumed))["input_ids"].tolist() == expected[start + 6]
