"""Pickles read without running them: tensors, containers and numbers; all else stays inert.

A pickle is a program that calls what it names. This reader calls nothing of what a file names:
names of torch's rebuilding functions lead to functions here that note where a tensor's bytes lie,
a few plain containers are made, and every other class or function becomes an `Inert` that keeps
its name and arguments, so that optimizer settings and hyperparameters of any class can be passed
over, and a tensor that cannot be had without such a class is refused by that class's name.

It derives from pickle's reader in Python, not from that in C: its memo is a dict, where the C one
allocates an array as long as the largest index that a file cares to name.
"""

import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar

# Opcodes that no writer of checkpoints uses: old instances, and buffers allocated before they
# are read.
_UNUSED = (pickle.INST, pickle.OBJ, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)

_MOST_ENTRIES = 10_000


class Inert:
    """An object of a class that was not imported: its name, and what it would be made of."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()):
        self.name = name
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **_: Any) -> "Inert":
        """An instance of the class, or the result of the function: inert too."""
        return Inert(self.name, args)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"an inert {self.name} cannot be pickled")

    # What REDUCE, APPENDS and SETITEMS of a subclass of list or dict would call.
    def append(self, item: Any) -> None:
        """Keep an item."""
        self.args = (*self.args, item)

    def extend(self, items: Any) -> None:
        """Keep items."""
        self.args = (*self.args, *items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state = {**(self.state if isinstance(self.state, dict) else {}), key: value}

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Inert({self.name!r})"


class TensorUnpickler(pickle._Unpickler):
    """Reads one pickle into containers, numbers, what `rebuild` makes, and Inerts.

    Args:
        data: the pickle.
        rebuild: (module, name) -> what stands for the torch function or type of that name, or
            None where it is to be inert.
        storage: persistent id -> what a tensor's rebuilding function gets as its storage.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        opcode: method
        for opcode, method in pickle._Unpickler.dispatch.items()
        if opcode not in {unused[0] for unused in _UNUSED}
    }

    def __init__(
        self,
        data: bytes | io.BufferedIOBase,
        rebuild: Callable[[str, str], Any],
        storage: Callable[[Any], Any],
    ):
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        super().__init__(file, encoding="utf-8", errors="replace")
        self._rebuild = rebuild
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name: never the thing itself, but for plain containers."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return _default_dict
        if name in _PLAIN and module in ("builtins", "__builtin__"):
            return _PLAIN[name]
        found = self._rebuild(module, name)
        return Inert(f"{module}.{name}") if found is None else found

    def get_extension(self, code: int) -> None:
        """Extension codes name classes of copyreg's registry, which is the user's process's."""
        raise pickle.UnpicklingError(f"it uses the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return self._storage(pid)

    def load_newobj(self) -> None:
        """NEWOBJ calls cls.__new__; an inert class is called instead."""
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX, likewise."""
        self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def load_build(self) -> None:
        """BUILD sets the state of an Inert, and of nothing else."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def load_reduce(self) -> None:
        """REDUCE calls what `find_class` gave, and nothing else."""
        args = self.stack.pop()
        function = self.stack[-1]
        ours = isinstance(function, Inert) or getattr(function, "may_be_called", False)
        if not ours and function not in (OrderedDict, *_PLAIN.values()):
            raise pickle.UnpicklingError(f"it calls {type(function).__name__}")
        self.stack[-1] = function(*args)

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce


# Containers that some pickles name; none of them can do anything with its arguments.
_PLAIN: dict[str, type] = {"set": set, "frozenset": frozenset, "list": list, "dict": dict}


def callable_from_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of ours as one that a pickle may call."""
    function.may_be_called = True  # type: ignore[attr-defined]
    return function


@callable_from_files
def _default_dict(*_: Any) -> dict:
    return defaultdict(lambda: None)


def json_like(value: Any) -> Any:
    """What JSON can hold of an object that was read: the rest of its entries is left out.

    At most `_MOST_ENTRIES` of them: a file may name one list many times, in lists of lists.
    """
    return _json_like(value, count(), 0)


def _json_like(value: Any, entries: Iterator[int], depth: int) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if depth >= 16 or not isinstance(value, Mapping | list | tuple):
        return None
    if not isinstance(value, Mapping):
        return [
            _json_like(each, entries, depth + 1) for each in value if next(entries) < _MOST_ENTRIES
        ]
    kept = {
        str(key): _json_like(each, entries, depth + 1)
        for key, each in value.items()
        if next(entries) < _MOST_ENTRIES
    }
    return {key: each for key, each in kept.items() if each is not None}


def _made(cls: Any, args: Any) -> Any:
    if isinstance(cls, Inert):
        return cls(*args)
    if cls is OrderedDict:
        return OrderedDict()
    raise pickle.UnpicklingError(f"it makes an object of {cls!r}")
