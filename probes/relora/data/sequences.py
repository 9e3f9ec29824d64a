"""Training sequences in the order in which a run sees them, held in memory or streamed."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from dynamics.errors import DynamicsError

COLUMN = "input_ids"
_STATES_KEPT = 4  # a loader may read ahead of the step that is being trained
_IDENTIFYING = 8  # sequences whose tokens tell whether a stream is the one that was begun


def example(tokens: torch.Tensor, sequence_length: int) -> dict[str, torch.Tensor]:
    """One sequence as the model takes it.

    Args:
        tokens: (sequence_length,) or (sequence_length + 1,) int64. With one token more than the
            model reads, as in the published data, its last position has a target too.
        sequence_length: T.
    """
    inputs = tokens[:sequence_length]
    # The labels are the inputs: the model shifts them by one itself, unless it is given both.
    whole = {"input_ids": inputs, "labels": inputs}
    return whole if len(tokens) == sequence_length else {**whole, "shift_labels": tokens[1:]}


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Sequences of equal length, in the order in which a run sees them.

    Args:
        blocks: (n, sequence_length) int64 token ids, or (n, sequence_length + 1), see `example`.
        sequence_length: T; the width of the blocks by default.
    """

    def __init__(self, blocks: torch.Tensor, sequence_length: int | None = None) -> None:
        self.blocks = blocks
        self.sequence_length = blocks.shape[1] if sequence_length is None else sequence_length

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return example(self.blocks[index], self.sequence_length)

    def digest(self) -> str:
        """SHA-256 of the tokens and their order: a resumed run must see the same."""
        return hashlib.sha256(self.blocks.contiguous().numpy().tobytes()).hexdigest()


class TokenStream(IterableDataset[dict[str, torch.Tensor]]):
    """Sequences read from a Hugging Face dataset as they are needed, again from the start for ever.

    Its position is the number of sequences read. A position with the dataset's own state is gone
    to without reading what lies before it in earlier shards; without, by reading past it.

    Args:
        open_source: opens the dataset, iterable with `state_dict` and `load_state_dict`, each
            example with (at least) `sequence_length` + 1 or exactly `sequence_length` token ids
            under `input_ids`.
        sequence_length: T.
        vocab_size: every token is below it.
        held_out: sequences at the start that are not for training.
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
            empty = state is None  # what a state leaves of a pass may well be nothing
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
                yield example(tokens, self.sequence_length)
            if empty:
                raise DynamicsError("The dataset has no sequence to train on; give a larger one.")

    def share(self, process: int, processes: int, run_length: int) -> None:
        """Yield only every `processes`-th run of `run_length` sequences, beginning with `process`.

        Each process reads them all, and the batches of all processes together are those of one.
        """
        self._process, self._processes, self._run_length = process, processes, run_length

    def position_state(self, position: int) -> dict[str, Any]:
        """What `start_at` takes to go on at this position, JSON-like.

        The dataset's state is that of the last run of this process up to there: whatever lies
        between the two belongs to other processes, and is read past.
        """
        reached = [each for each in self._states if each <= position]
        if not reached:
            return {"position": position}
        return {"position": position, **self._states[max(reached)]}

    def start_at(self, state: Mapping[str, Any]) -> None:
        """Begin at the position of `position_state`, or at {"position": n}, when next iterated."""
        self._start = state

    def held_out_blocks(self) -> TokenBlocks:
        """The held-out sequences."""
        rows = islice(iter(self._open_source()), self._held_out)
        tokens = [self._checked(row[COLUMN], index) for index, row in enumerate(rows)]
        empty = torch.empty((0, self.sequence_length), dtype=torch.int64)
        return TokenBlocks(torch.stack(tokens) if tokens else empty, self.sequence_length)

    def digest(self) -> str:
        """SHA-256 of the first few sequences: a resumed run must see the same."""
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
