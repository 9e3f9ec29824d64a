"""Fused matrices as their parts: GPT-2's `c_attn` holds query, key and value in one.

Which rows of a fused matrix belong to which part is a convention of the code that computes with
it. The numbers do not show it, and mostly the name does not either. It is therefore taken from the
model config: its `model_type`, and its heads where they matter. An arrangement is one row of
`ARRANGEMENTS`. A matrix that fits none stays whole, and `kept_whole` gives the reason.

The experts of a mixture that are stored as one three-dimensional tensor are not matrices; they are
not measured.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dynamics.errors import DynamicsError, MissingError
from dynamics.runs import parameter_names
from dynamics.runs.attention_config import Architecture, language_config, read_architecture
from dynamics.runs.run import Dense, Matrix, MatrixInfo, Run
from dynamics.runs.run_view import RunView

Q, K, V = "q_proj", "k_proj", "v_proj"
# Tensor-parallel blocks of the machine that CodeGen was trained on, which its layout kept.
_CODEGEN_BLOCKS = 4

# part -> which outputs of the fused matrix it is made of, in the order of its own
Parts = dict[str, np.ndarray]


def _equal_blocks(*parts: str) -> Callable[[int, Architecture | None], Parts]:
    def split(outputs: int, architecture: Architecture | None) -> Parts:
        width = outputs // len(parts)
        return {part: np.arange(i * width, (i + 1) * width) for i, part in enumerate(parts)}

    return split


def _blocks_by_heads(outputs: int, architecture: Architecture | None) -> Parts:
    """All query heads, all key heads, all value heads."""
    assert architecture is not None
    size, groups = architecture.head_dim, architecture.num_kv_heads
    widths = (architecture.num_heads * size, groups * size, groups * size)
    ends = np.cumsum(widths)
    return {
        part: np.arange(end - width, end)
        for part, end, width in zip((Q, K, V), ends, widths, strict=True)
    }


def _interleaved(outputs: int, architecture: Architecture | None) -> Parts:
    """(key-value head, its query heads + 2, head_dim): the query heads, then their key and value.

    Where every query head has its own key and value that is (num_heads, 3, head_dim), and where
    all share one it is all queries, the key, the value.
    """
    assert architecture is not None
    groups, size = architecture.num_kv_heads, architecture.head_dim
    each = architecture.num_heads // groups + 2
    index = np.arange(groups * each * size).reshape(groups, each, size)
    return {Q: index[:, :-2].ravel(), K: index[:, -2].ravel(), V: index[:, -1].ravel()}


def _codegen(outputs: int, architecture: Architecture | None) -> Parts:
    """Four blocks, each with a quarter of the heads: their queries, then values, then keys."""
    assert architecture is not None
    if architecture.num_heads % _CODEGEN_BLOCKS:
        return {}
    width = architecture.num_heads * architecture.head_dim // _CODEGEN_BLOCKS
    index = np.arange(_CODEGEN_BLOCKS * 3 * width).reshape(_CODEGEN_BLOCKS, 3, width)
    return {Q: index[:, 0].ravel(), K: index[:, 2].ravel(), V: index[:, 1].ravel()}


@dataclass(frozen=True)
class Arrangement:
    """How the parts lie in a fused matrix.

    Attributes:
        suffix: how the matrix's path ends.
        families: the `model_type` of the configs that it holds for; "" is a config without one.
        split: (outputs, architecture) -> the outputs of each part.
        ratio: outputs / inputs where that is the same for all models, so that the shape tells
            (in, out), as GPT-2's Conv1D stores it, from (out, in); None: it is (out, in).
    """

    suffix: str
    families: tuple[str, ...]
    split: Callable[[int, Architecture | None], Parts]
    ratio: int | None = None


# Beside each row: where it is defined, in transformers' models/<name>/modeling_<name>.py.
ARRANGEMENTS: tuple[Arrangement, ...] = (
    # gpt2, openai, imagegpt: `c_attn(x).split(split_size)`; nanoGPT's model.py, the same, whose
    # config has no model_type
    Arrangement("attn.c_attn", ("gpt2", "openai-gpt", "imagegpt", ""), _equal_blocks(Q, K, V), 3),
    Arrangement("crossattention.c_attn", ("gpt2",), _equal_blocks(K, V), 2),
    # gpt_bigcode: blocks where all heads share one key and value, else per head. Both are this.
    Arrangement("attn.c_attn", ("gpt_bigcode",), _interleaved),
    # gpt_neox, gpt_neox_japanese: `.view(..., 3 * head_size)`, then chunks
    Arrangement("attention.query_key_value", ("gpt_neox", "gpt_neox_japanese"), _interleaved),
    # bloom: `_reshape`; falcon: `_split_heads`
    Arrangement("self_attention.query_key_value", ("bloom", "falcon"), _interleaved),
    # persimmon: `_split_heads`
    Arrangement("self_attn.query_key_value", ("persimmon",), _interleaved),
    # phi3: slices at `query_pos`
    Arrangement("self_attn.qkv_proj", ("phi3",), _blocks_by_heads),
    # codegen: `mp_num`
    Arrangement("attn.qkv_proj", ("codegen",), _codegen),
    # mpt: `chunk(3)`; modernbert: `.view(..., 3, -1, head_dim)`
    Arrangement("attn.Wqkv", ("mpt", "modernbert"), _blocks_by_heads),
    # phi3, glm, glm4: `chunk(2)`, the first half through the activation
    Arrangement(
        "mlp.gate_up_proj",
        ("phi3", "glm", "glm4"),
        _equal_blocks("gate_proj", "up_proj"),
    ),
    # modernbert: `input, gate = Wi(x).chunk(2)`, where `input` goes through the activation
    Arrangement("mlp.Wi", ("modernbert",), _equal_blocks("gate_proj", "up_proj")),
)


@dataclass(frozen=True, kw_only=True)
class Part(MatrixInfo):
    """A part of a fused matrix.

    Attributes:
        fused: the clean name of the matrix that it is a part of.
        axis: the axis of the outputs: 0 as torch's Linear stores it, (out, in); 1 for the
            (in, out) of GPT-2's Conv1D.
        index: which outputs of the fused matrix are its own.
    """

    fused: str
    axis: int
    index: np.ndarray = field(compare=False, repr=False)

    def of(self, matrix: Matrix) -> Matrix:
        """This part of the fused matrix; of a product, which keeps its rank bound, of a factor."""
        if isinstance(matrix, Dense):
            return matrix.part(lambda array: array.take(self.index, axis=self.axis))
        if self.axis == 0:
            return replace(matrix, left=matrix.left[self.index])
        return replace(matrix, right=matrix.right[:, self.index])


class SplitRun(RunView):
    """A run whose fused matrices are read as their parts."""

    def __init__(self, run: Run, parts: Mapping[str, tuple[Part, ...]]):
        super().__init__(run)
        self._parts = parts
        self._matrices = {
            each.name: each
            for name, info in run.matrices.items()
            for each in parts.get(name, (info,))
        }

    @property
    def matrices(self) -> dict[str, MatrixInfo]:  # type: ignore[override]
        """The parts in the place of the fused matrices; see `Run.matrices`."""
        return self._matrices

    def group_of(self, name: str) -> tuple[str, ...]:
        """The parts of one fused matrix; see `Run.group_of`."""
        info = self._matrices.get(name)
        return tuple(p.name for p in self._parts[info.fused]) if isinstance(info, Part) else (name,)

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """A stored matrix, or a part of one; see `Run.read`."""
        info, stored = self._matrices.get(name), self.inner.read(self._stored(name), step, kind)
        return info.of(stored) if isinstance(info, Part) and stored is not None else stored

    def read_group(self, name: str, step: int, kind: str) -> dict[str, Matrix | None]:
        """All parts of one fused matrix, which is read once; see `Run.read_group`."""
        info = self._matrices.get(name)
        if not isinstance(info, Part):
            return {name: self.read(name, step, kind)}
        whole, parts = self.inner.read(info.fused, step, kind), self._parts[info.fused]
        return {part.name: None if whole is None else part.of(whole) for part in parts}

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """Where a matrix or a part comes from; see `Run.origin`."""
        origin, info = self.inner.origin(self._stored(name), step, kind), self._matrices.get(name)
        if origin is None or not isinstance(info, Part):
            return origin
        # Another config can take other outputs of the same stored matrix.
        return f"{origin}[{info.axis}:{zlib.crc32(info.index.tobytes()):08x}]"

    def merges_between(self, name: str, before: int, now: int) -> int:
        """How often an adapter was merged into the weight, or the one that it is a part of."""
        return self.inner.merges_between(self._stored(name), before, now)

    def trains(self, name: str) -> bool | None:
        """Whether the optimizer held the weight, or the one that it is a part of."""
        return self.inner.trains(self._stored(name))

    def sparse_entries(self, name: str) -> int | None:
        """Those of the weight, or of the one that it is a part of."""
        return self.inner.sparse_entries(self._stored(name))

    def _stored(self, name: str) -> str:
        info = self._matrices.get(name)
        return info.fused if isinstance(info, Part) else name


def split_fused(run: Run) -> Run:
    """The run with the parts of its fused matrices in their place, read from the whole.

    `transformer.h.0.attn.c_attn.weight` becomes `transformer.h.0.attn.c_attn.q_proj.weight` and so
    on, in the orientation in which it is stored. What cannot be split stays, see `kept_whole`; a
    run without anything to split is returned itself.
    """
    parts = {}
    for name, info in run.matrices.items():
        split = _parts(run, info)
        if not isinstance(split, str):
            parts[name] = split
    return SplitRun(run, parts) if parts else run


def kept_whole(run: Run) -> dict[str, str]:
    """Name -> the reason, a sentence, for each fused matrix of a run that cannot be split.

    Empty where every fused matrix can be split, or has been.
    """
    split = {
        name: _parts(run, info)
        for name, info in run.matrices.items()
        if info.module in parameter_names.FUSED
    }
    return {name: reason for name, reason in split.items() if isinstance(reason, str)}


def _parts(run: Run, info: MatrixInfo) -> tuple[Part, ...] | str:
    """The parts of a fused matrix, or why there are none."""
    path = info.name.removesuffix(".weight")
    known = [row for row in ARRANGEMENTS if path.endswith("." + row.suffix)]
    if not known:
        return f"No arrangement of {info.name} is known."
    if run.spectrum_kinds:
        return (
            f"{run.path} holds the singular values of {info.name} as a whole (it was recorded with "
            "spectra_only=True), and those of its parts do not follow from them."
        )
    try:
        axis, index = _arranged(run, info, known)
    except DynamicsError as error:
        return str(error)
    ending = info.name[len(path) :]
    parts = []
    for part, outputs in index.items():
        rows, cols = (outputs.size, info.cols) if axis == 0 else (info.rows, outputs.size)
        name = f"{path}.{part}{ending}"
        parts.append(
            Part(name, info.layer, part, rows, cols, fused=info.name, axis=axis, index=outputs)
        )
    return tuple(parts)


def _arranged(run: Run, info: MatrixInfo, known: list[Arrangement]) -> tuple[int, Parts]:
    """(axis of the outputs, the outputs of each part).

    Raises:
        DynamicsError: the config is missing, or contradicts the shape, or is of another family.
    """
    config = run.attrs.get("config")
    config = language_config(config) if isinstance(config, Mapping) else {}
    family = str(config.get("model_type") or "")
    if not family and _is_in_out(known[0], info):
        # Only GPT-2 and its copies store (in, out), and they agree.
        return 1, known[0].split(info.cols, None)
    if not config:
        raise MissingError(
            f"{run.path} has no model config, which says how the parts of {info.name} lie; "
            "put the model's config.json beside its weights."
        )
    rows = [row for row in known if family in row.families]
    if not rows:
        families = ", ".join(each for row in known for each in row.families if each)
        raise DynamicsError(
            f"How the parts of {info.name} lie in a model of type {family!r} is not known; "
            f"known: {families}."
        )
    architecture = read_architecture(run.attrs, run.path)
    in_out = _is_in_out(rows[0], info)
    inputs, outputs = (info.rows, info.cols) if in_out else (info.cols, info.rows)
    index = rows[0].split(outputs, architecture)
    expected = sum(each.size for each in index.values()), architecture.hidden_size
    if (outputs, inputs) != expected or outputs != (rows[0].ratio or outputs / inputs) * inputs:
        raise DynamicsError(
            f"{run.path} has {info.name} in shape ({info.rows}, {info.cols}), which its model "
            f"config contradicts ({architecture.num_heads} heads, {architecture.num_kv_heads} "
            f"key-value heads, head_dim {architecture.head_dim}, "
            f"hidden_size {architecture.hidden_size})."
        )
    return int(in_out), index


def _is_in_out(row: Arrangement, info: MatrixInfo) -> bool:
    return row.ratio is not None and info.cols == row.ratio * info.rows
