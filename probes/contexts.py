"""Outside of the user's contexts: what is recorded does not depend on where it is computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.autograd import Variable
from torch.utils._python_dispatch import _disable_current_modes

# All that torch knows, whether they are there or not.
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "xla", "maia")


@contextmanager
def outside_of_contexts() -> Iterator[None]:
    """Compute as outside of autocast, inference mode, a default device, and dispatch modes.

    No gradient is computed either. The casts that autocast keeps are neither used nor added to, so
    the training finds them as they were. The default dtype belongs to the whole process, other
    threads included, so it stays: name dtypes. Random states stay too.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        ...     with outside_of_contexts():
        ...         product = weight @ torch.ones(2, 2)
        >>> product.dtype, product.device
        (torch.float32, device(type='cpu'))
    """
    casting = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.device("cpu"))
        # Not torch.autocast(enabled=False): leaving the outermost one empties the cache.
        for device in casting:
            stack.callback(torch.set_autocast_enabled, device, True)
            torch.set_autocast_enabled(device, False)
        yield


def in_backward() -> bool:
    """Whether a backward pass is running and has called what runs now."""
    return torch._C._current_graph_task_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Call something when the backward pass that runs now is over."""
    Variable._execution_engine.queue_callback(call)
