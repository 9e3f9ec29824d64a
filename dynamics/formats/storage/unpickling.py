"""Pickles read without running them: tensors, containers and numbers; all else stays inert.

A pickle is a program that calls the functions it names. This reader calls nothing that a file
names. The names of torch's rebuilding functions lead to functions here, which note where the bytes
of a tensor lie. A few plain containers are made. Every other class or function becomes an `Inert`,
which keeps its name and arguments. So optimizer settings and hyperparameters of any class can be
skipped, and the message about a tensor that needs such a class can name the class.

The reader derives from pickle's reader in Python, not from the one in C: the memo of the Python one
is a dict, while the C one allocates an array as long as the largest index in the file.
"""

import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar

# Opcodes that no writer of checkpoints uses: instances of old classes, and buffers that are
# allocated before they are read.
_UNUSED = (pickle.INST, pickle.OBJ, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)

_MOST_ENTRIES = 10_000


class Inert:
    """An object whose class was not imported: the name of the class, and the arguments."""

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

    # REDUCE, APPENDS and SETITEMS call these for a subclass of list or dict.
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
    """Reads one pickle into containers, numbers, objects that `rebuild` makes, and Inerts.

    Args:
        data: the pickle.
        rebuild: (module, name) -> stand-in for the torch function or type of that name; None where
            an Inert shall stand for it.
        storage: persistent id -> the storage that a tensor's rebuilding function is called with.
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
        """The stand-in for a name; only plain containers stand for themselves."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return _default_dict
        if name in _PLAIN and module in ("builtins", "__builtin__"):
            return _PLAIN[name]
        stand_in = self._rebuild(module, name)
        return Inert(f"{module}.{name}") if stand_in is None else stand_in

    def get_extension(self, code: int) -> None:
        """Extension codes name classes in copyreg's registry of the running process: refused."""
        raise pickle.UnpicklingError(f"it uses the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return self._storage(pid)

    def load_newobj(self) -> None:
        """NEWOBJ would call cls.__new__; the Inert of the class is called instead."""
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: as NEWOBJ."""
        self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def load_build(self) -> None:
        """BUILD sets the state of an Inert only."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def load_reduce(self) -> None:
        """REDUCE calls only what `find_class` returned."""
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


# Containers that some pickles name; none of them runs anything of its arguments.
_PLAIN: dict[str, type] = {"set": set, "frozenset": frozenset, "list": list, "dict": dict}


def callable_from_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of this package as one that a pickle may call."""
    function.may_be_called = True  # type: ignore[attr-defined]
    return function


@callable_from_files
def _default_dict(*_: Any) -> dict:
    return defaultdict(lambda: None)


def json_like(value: Any) -> Any:
    """The part of an object that JSON can hold; other entries are left out.

    At most `_MOST_ENTRIES` entries are kept: a file may name one list many times, at many levels.
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
