"""Training sequences in the order in which a run sees them, in memory or streamed."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from dynamics.errors import DynamicsError

COLUMN = "input_ids"
_STATES_KEPT = 4  # a loader may read ahead of the step that trains
_IDENTIFYING = 8  # sequences whose tokens identify a stream


def model_inputs(tokens: torch.Tensor, sequence_length: int) -> dict[str, torch.Tensor]:
    """The inputs and labels of one sequence.

    Args:
        tokens: (sequence_length,) or (sequence_length + 1,) int64. The published data has one
            token more than the model reads, so that the last position has a target too.
        sequence_length: T.
    """
    inputs = tokens[:sequence_length]
    # The labels are the inputs: the model shifts them itself, unless it gets shift_labels.
    batch = {"input_ids": inputs, "labels": inputs}
    return batch if len(tokens) == sequence_length else {**batch, "shift_labels": tokens[1:]}


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Sequences of equal length, in the order in which a run sees them.

    Args:
        blocks: (n, sequence_length) or (n, sequence_length + 1) int64 token ids; with the
            additional token, the last position has a target too.
        sequence_length: T; the width of the blocks by default.

    Example:
        >>> from probes.relora import TokenBlocks
        >>> blocks = TokenBlocks(torch.arange(12).view(3, 4))
        >>> len(blocks), blocks.sequence_length, blocks[1]["input_ids"].tolist()
        (3, 4, [4, 5, 6, 7])
    """

    def __init__(self, blocks: torch.Tensor, sequence_length: int | None = None) -> None:
        self.blocks = blocks
        self.sequence_length = blocks.shape[1] if sequence_length is None else sequence_length

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return model_inputs(self.blocks[index], self.sequence_length)

    def digest(self) -> str:
        """SHA-256 of the tokens in their order; a resumed run must see the same ones."""
        return hashlib.sha256(self.blocks.contiguous().numpy().tobytes()).hexdigest()


class TokenStream(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences that are read from a Hugging Face dataset when needed; it repeats without end.

    The position is the number of sequences read. If a stored position contains the state of the
    dataset, the stream goes there without reading earlier shards. Otherwise it reads and skips all
    sequences before the position.

    Args:
        open_source: opens the dataset. The dataset is iterable and has `skip`, `state_dict` and
            `load_state_dict`. Each row has under `input_ids` exactly `sequence_length` token ids,
            or at least `sequence_length` + 1.
        sequence_length: T.
        vocab_size: every token must be below it.
        held_out: how many sequences at the start are not for training.

    Example:
        >>> from datasets import Dataset
        >>> from probes.relora import TokenStream
        >>> rows = [[i, i + 1, i + 2] for i in range(4)]
        >>> stream = TokenStream(
        ...     lambda: Dataset.from_dict({"input_ids": rows}).to_iterable_dataset(),
        ...     sequence_length=3, vocab_size=6, held_out=1,
        ... )
        >>> sequences = iter(stream)
        >>> [next(sequences)["input_ids"].tolist() for _ in range(4)]
        [[1, 2, 3], [2, 3, 4], [3, 4, 5], [1, 2, 3]]
    """

    def __init__(
        self,
        open_source: Callable[[], Any],
        *,
        sequence_length: int,
        vocab_size: int,
        held_out: int,
    ) -> None:
        self.sequence_length = sequence_length
        self._vocab_size = vocab_size
        self._open_source = open_source
        self._held_out = held_out
        self._start: Mapping[str, Any] = {"position": 0}
        self._states: dict[int, dict[str, Any]] = {}
        self.share(0, 1, 1)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        state = self._start.get("source")
        position = self._start["source_position"] if state else 0
        while True:
            source = self._open_source().skip(self._held_out)
            empty = state is None  # a stored state may be the end of a pass: nothing is left of it
            if state:
                source.load_state_dict(state)
                state = None
            for row in source:
                empty = False
                position += 1
                if position <= self._start["position"] or not self._is_own(position):
                    continue
                tokens = self._checked(row[COLUMN], position)
                if position % self._run_length == 0:
                    self._keep(position, source.state_dict())
                yield model_inputs(tokens, self.sequence_length)
            if empty:
                raise DynamicsError("The dataset has no sequence to train on; give a larger one.")

    def share(self, process: int, processes: int, run_length: int) -> None:
        """Yield only every `processes`-th group of `run_length` sequences, from group `process` on.

        Each process reads all sequences. Together, the processes train on the same batches as one
        process would.
        """
        self._process, self._processes, self._run_length = process, processes, run_length

    def position_state(self, position: int) -> dict[str, Any]:
        """The state that `start_at` needs to continue at this position, JSON-like.

        The state of the dataset is the one after the last group of this process before the
        position. Sequences between the two belong to other processes and are skipped.
        """
        reached = [each for each in self._states if each <= position]
        if not reached:
            return {"position": position}
        return {"position": position, **self._states[max(reached)]}

    def start_at(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration at a state of `position_state`, or at {"position": n}."""
        self._start = state

    def held_out_blocks(self) -> TokenBlocks:
        """The held-out sequences."""
        rows = islice(iter(self._open_source()), self._held_out)
        tokens = [self._checked(row[COLUMN], index) for index, row in enumerate(rows)]
        empty = torch.empty((0, self.sequence_length), dtype=torch.int64)
        return TokenBlocks(torch.stack(tokens) if tokens else empty, self.sequence_length)

    def digest(self) -> str:
        """SHA-256 of the first few sequences; a resumed run must see the same ones."""
        seen = hashlib.sha256()
        for row in islice(iter(self._open_source()), _IDENTIFYING):
            seen.update(self._checked(row[COLUMN], 0).numpy().tobytes())
        return seen.hexdigest()

    def _is_own(self, position: int) -> bool:
        return (position - 1) // self._run_length % self._processes == self._process

    def _keep(self, position: int, state: dict[str, Any]) -> None:
        self._states[position] = {"source_position": position, "source": copy.deepcopy(state)}
        for old in sorted(self._states)[:-_STATES_KEPT]:
            del self._states[old]

    def _checked(self, ids: Any, position: int) -> torch.Tensor:
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        if len(tokens) < self.sequence_length:
            raise DynamicsError(
                f"Sequence {position} of the dataset has {len(tokens)} tokens and sequence_length "
                f"is {self.sequence_length}; set sequence_length to at most that."
            )
        tokens = tokens[: self.sequence_length + 1]
        if int(tokens.max()) >= self._vocab_size:
            raise DynamicsError(
                f"Sequence {position} of the dataset has token {int(tokens.max())} and vocab_size "
                f"is {self._vocab_size}; set the vocab_size of its tokenizer."
            )
        return tokens
