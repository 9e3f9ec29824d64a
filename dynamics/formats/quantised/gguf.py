"""Tensors of GGUF files, dequantised by the gguf package, under the names of Hugging Face's files.

How far two neighbouring codes of a block lie apart is asked of the package as well: it dequantises
the block with all codes 0 and with all codes 1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from dynamics.errors import require_extra
from dynamics.formats.quantised.tensor import Arrays, QuantisedTensor
from dynamics.formats.storage.gguf_files import BLOCKS, gguf_file
from dynamics.formats.storage.tensors import StoredTensor, Tensor
from dynamics.runs.code_errors import CodeErrors, interval_errors

_PLAIN = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
# Type -> (bytes of a block that hold codes, the byte of two or more codes 1, numbers that share a
# scale). Other bits of these codes are 0 then, and lie in the same bytes or in those of `_HIGH`.
_LINEAR = {
    "Q4_0": (slice(2, 18), 0x11, 32),
    "Q4_1": (slice(4, 20), 0x11, 32),
    "Q5_0": (slice(6, 22), 0x11, 32),
    "Q5_1": (slice(8, 24), 0x11, 32),
    "Q8_0": (slice(2, 34), 0x01, 32),
    "Q2_K": (slice(16, 80), 0x55, 16),
    "Q3_K": (slice(32, 96), 0x55, 16),
    "Q4_K": (slice(16, 144), 0x11, 32),
    "Q5_K": (slice(48, 176), 0x11, 32),
    "Q6_K": (slice(0, 128), 0x11, 16),
    "TQ2_0": (slice(0, 64), 0x55, 256),
    "IQ4_NL": (slice(2, 18), 0x11, 32),
    "IQ4_XS": (slice(8, 136), 0x11, 32),
    "MXFP4": (slice(1, 17), 0x11, 32),
    "NVFP4": (slice(4, 36), 0x11, 16),
}
_HIGH = {
    "Q5_0": slice(2, 6),
    "Q5_1": slice(4, 8),
    "Q3_K": slice(0, 32),
    "Q5_K": slice(16, 48),
    "Q6_K": slice(128, 192),
}
# Types whose sixteen codes stand for values at unequal distances.
_BOOKS = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")
_BYTES = 2**18  # worked on at a time

_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def gguf_tensors(path: Path, root: Path) -> dict[str, Tensor]:
    """Name -> tensor of a GGUF file; those of unknown types have a dtype like "GGUF type 99".

    Raises:
        FormatError: the file is missing, truncated or damaged.
        DynamicsError: it holds quantised tensors, and the gguf package is not installed.
    """
    described, _ = gguf_file(path, root)
    tensors: dict[str, Tensor] = {}
    for stored_name, each in described.items():
        name = hugging_face_name(stored_name)
        if each.data is not None and each.type in _PLAIN:
            tensors[name] = replace(each.data, dtype=_PLAIN[each.type], shape=each.shape)
        elif each.data is not None:
            where = f"{path}: {stored_name}"
            decode = partial(_decode, where, each.type, *_dequantizer(each.type))
            stored = {"codes": each.data}
            tensors[name] = QuantisedTensor(
                where, each.shape, "float32", stored, f"gguf {each.type}", decode
            )
        else:
            tensors[name] = StoredTensor(path, 0, f"GGUF {each.type}", each.shape)
    return tensors


def hugging_face_name(name: str) -> str:
    """The name that Hugging Face's Llama and its relatives give to a tensor of GGUF.

    >>> hugging_face_name("blk.3.ffn_up.weight"), hugging_face_name("output.weight")
    ('model.layers.3.mlp.up_proj.weight', 'lm_head.weight')
    """
    if match := _BLOCK.fullmatch(name):
        layer, module, leaf = match.groups()
        return f"model.layers.{layer}.{_BLOCK_NAMES.get(module, module)}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{_TOP_NAMES.get(module, module)}.{leaf}" if module else name


class Dequantizer(Protocol):
    """`dequantize` of the gguf package, for one type."""

    def __call__(self, data: np.ndarray) -> np.ndarray:
        """(..., bytes of a row) uint8 -> (..., numbers of a row) float32."""


def _dequantizer(type: str) -> tuple[Dequantizer, np.ndarray | None]:
    """(What dequantises a type, the values of its codes where these have unequal distances)."""
    try:
        from gguf import quants
        from gguf.constants import GGMLQuantizationType
    except ImportError as missing:
        raise require_extra("gguf", missing) from missing
    dequantize = partial(quants.dequantize, qtype=GGMLQuantizationType[type])
    if type not in _BOOKS:
        return dequantize, None
    book = (quants.MXFP4 if type.endswith("FP4") else quants.IQ4_NL).kvalues
    return dequantize, np.array(book, dtype=np.float64)


def _decode(
    name: str, type: str, dequantize: Dequantizer, book: np.ndarray | None, arrays: Arrays
) -> "_Numbers":
    data = arrays["codes"]
    numbers, size = BLOCKS[type]
    shape = (*data.shape[:-1], data.shape[-1] // size * numbers)
    return _Numbers(name, type, dequantize, book, data, np.broadcast_to(np.uint8(0), shape))


@dataclass(frozen=True, eq=False)
class _Numbers:
    """The bytes of a tensor, as `Codes` offers them.

    Attributes:
        name: of the tensor, for messages.
        type: of ggml.
        dequantize: makes numbers of bytes.
        book: the values of codes with unequal distances, in the order of the codes.
        data: uint8 (..., bytes of a row).
        codes: has the shape of the part of the numbers that is meant.
        index: which part it is.
    """

    name: str
    type: str
    dequantize: Dequantizer
    book: np.ndarray | None
    data: np.ndarray
    codes: np.ndarray
    index: tuple[int | slice, ...] = ()

    def values(self) -> np.ndarray:
        """See `Codes.values`."""
        return self._by_rows(self.dequantize)[self.index]

    def errors(self) -> CodeErrors:
        """See `Codes.errors`."""
        scale = self._by_rows(self._scales).astype(np.float64)
        numbers, size = BLOCKS[self.type]
        cols = self.data.shape[-1] // size * numbers
        groups = (
            *map(np.arange, self.data.shape[:-1]),
            np.arange(cols) // (cols // scale.shape[-1]),
        )
        if self.book is None:
            return CodeErrors(scale, groups, *interval_errors(None))[self.index]
        book = np.unique(self.book)
        codes = self._by_rows(self._places)
        return CodeErrors(scale, groups, *interval_errors(book), codes)[self.index]

    def part(self, index: tuple[int | slice, ...]) -> "_Numbers":
        """See `Codes.part`."""
        return replace(self, codes=self.codes[index], index=index)

    def _by_rows(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        rows = self.data.reshape(-1, self.data.shape[-1])
        height = max(1, _BYTES // max(rows.shape[1], 1))
        with np.errstate(all="ignore"):  # non-finite numbers are told later
            made = [function(rows[at : at + height]) for at in range(0, len(rows), height)]
        return np.concatenate(made).reshape(*self.data.shape[:-1], -1)

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        """The distance of two codes in each group, or what the values of a book are scaled with."""
        if self.type not in _LINEAR:
            return self._estimated(self.dequantize(rows).reshape(len(rows), -1, 32))
        codes, one, group = _LINEAR[self.type]
        blocks = rows.reshape(len(rows), -1, BLOCKS[self.type][1]).copy()
        if self.type in _HIGH:
            blocks[..., _HIGH[self.type]] = 0
        levels = []
        for byte in (0, one):
            blocks[..., codes] = byte
            made = self.dequantize(blocks.reshape(rows.shape))
            levels.append(made.reshape(len(rows), -1, group)[..., 0].astype(np.float64))
        distance = levels[1] - levels[0]
        return distance if self.book is None else distance / (self.book[1] - self.book[0])

    def _estimated(self, groups: np.ndarray) -> np.ndarray:
        size = np.abs(groups).astype(np.float64)
        if self.type.startswith("TQ"):  # -1, 0 and 1
            return size.max(-1)
        if self.type.startswith("IQ1"):  # -1, 0 and 1, and an eighth more or less
            return size.max(-1) / 1.125
        return 2 * size.min(-1)  # odd multiples of half a distance

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """The place of each number's code in the sorted book."""
        assert self.book is not None
        values, scale = self.dequantize(rows), self._scales(rows)
        scale = np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
        book = np.unique(self.book)
        return np.searchsorted((book[1:] + book[:-1]) / 2, values / scale).astype(np.uint8)
