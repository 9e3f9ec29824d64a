"""Copies of tensors in CPU memory, in buffers that one record after another uses."""

import threading
from collections import defaultdict
from collections.abc import Iterable

import torch


class Snapshots:
    """Takes copies that training cannot change any more, and takes their memory back.

    Memory that is fresh from the operating system is mapped and zeroed page by page when it is
    first written, which costs several times the copy itself. Buffers are therefore kept: as many
    as records were under way at once.

    A tensor on a GPU is copied into pinned memory, in the order of its stream, while the training
    thread goes on: wait for the events of `mark` before reading the copies.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype, bool], list[torch.Tensor]]
        self._free = defaultdict(list)
        self._given: set[int] = set()  # data_ptr of buffers that are in use
        self._lock = threading.Lock()  # the training thread takes, the writer's gives back
        self._copied: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def __len__(self) -> int:
        """Buffers that wait to be used again."""
        return sum(map(len, self._free.values()))

    def copy(self, tensor: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """The values of a tensor as they are now, on the CPU, contiguous.

        Args:
            tensor: of any strided layout, whole.
            owned: nobody else will change it: on the CPU it is returned as it is.
        """
        tensor = tensor.detach()
        if owned and tensor.device.type == "cpu":
            return tensor
        on_gpu = tensor.is_cuda
        buffer = self._buffer(tensor.shape, tensor.dtype, pinned=on_gpu)
        buffer.copy_(tensor, non_blocking=on_gpu)  # neither requires a gradient
        if on_gpu:
            stream = torch.cuda.current_stream(tensor.device)
            self._copied.setdefault(stream, torch.cuda.Event()).record(stream)
        return buffer

    def mark(self) -> list[torch.cuda.Event]:
        """The events after which the copies made since the last mark are there."""
        copied, self._copied = self._copied, {}
        return list(copied.values())

    def release(self, copies: Iterable[torch.Tensor]) -> None:
        """Take back buffers that nobody reads any more; other tensors are passed over."""
        with self._lock:
            for each in copies:
                if each.data_ptr() in self._given:
                    self._given.remove(each.data_ptr())
                    self._free[each.shape, each.dtype, each.is_pinned()].append(each)

    def _buffer(self, shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        with self._lock:
            free = self._free[shape, dtype, pinned]
            buffer = free.pop() if free else torch.empty(shape, dtype=dtype, pin_memory=pinned)
            self._given.add(buffer.data_ptr())
        return buffer
