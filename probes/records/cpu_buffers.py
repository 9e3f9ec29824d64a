"""Copies of tensors in CPU memory, in buffers that later records use again."""

import threading
from collections import defaultdict
from collections.abc import Iterable

import torch


class CpuBuffers:
    """Copies tensors, so that training cannot change them any more, and reuses the memory.

    The operating system maps and zeroes fresh memory page by page when it is first written. That
    costs several times the copy itself, so buffers are kept: as many as records were on their way
    to the store at the same time.

    A tensor on a GPU is copied into pinned memory, in the order of its stream, while the training
    thread goes on. Wait for the events of `pop_events` before you read the copies.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype, bool], list[torch.Tensor]]
        self._free = defaultdict(list)
        self._in_use: set[int] = set()  # data_ptr of buffers
        self._lock = threading.Lock()  # two threads: training takes, the writer gives back
        self._copied: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def __len__(self) -> int:
        """Buffers that are free to be used again."""
        return sum(map(len, self._free.values()))

    def copy(self, tensor: torch.Tensor, *, owned: bool = False) -> torch.Tensor:
        """The values of a tensor as they are now, on the CPU, contiguous.

        Args:
            tensor: of any strided layout, not sharded.
            owned: nobody else will change this tensor, so one on the CPU is returned uncopied.
        """
        tensor = tensor.detach()
        if owned and tensor.device.type == "cpu":
            return tensor
        on_gpu = tensor.is_cuda
        buffer = self._buffer(tensor.shape, tensor.dtype, pinned=on_gpu)
        buffer.copy_(tensor, non_blocking=on_gpu)  # neither of them requires a gradient
        if on_gpu:
            stream = torch.cuda.current_stream(tensor.device)
            self._copied.setdefault(stream, torch.cuda.Event()).record(stream)
        return buffer

    def pop_events(self) -> list[torch.cuda.Event]:
        """Events; once they have happened, the copies made since the last call are complete."""
        copied, self._copied = self._copied, {}
        return list(copied.values())

    def release(self, copies: Iterable[torch.Tensor]) -> None:
        """Take back buffers that nobody reads any more; other tensors are ignored."""
        with self._lock:
            for each in copies:
                if each.data_ptr() in self._in_use:
                    self._in_use.remove(each.data_ptr())
                    self._free[each.shape, each.dtype, each.is_pinned()].append(each)

    def _buffer(self, shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        with self._lock:
            free = self._free[shape, dtype, pinned]
            if free:
                buffer = free.pop()
            else:  # on the CPU, whatever torch.set_default_device says
                buffer = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
            self._in_use.add(buffer.data_ptr())
        return buffer
