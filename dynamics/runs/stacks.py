"""Tensors as matrices: experts of a mixture one by one, convolutions as out × (in·k).

A mixture of experts keeps the weights of all experts of a layer in one tensor (E, out, in) while it
trains. Most families are saved expert by expert, under other names. Both are read as the same
matrices, with the same names: those that `save_pretrained` of transformers writes. Where it writes
the whole tensor, an expert is named like those of the other families,
"...experts.3.gate_proj.weight". Matrices stay in the orientation in which they are stored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from dynamics.runs.account import VECTORS
from dynamics.runs.attention_config import language_config

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"

# Families that store experts as (E, in, out), by the model_type of their config. The source is
# transformers' models/<name>/modeling_<name>.py, as for all that follows.
_IN_OUT = ("aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter")
# The family whose gate and up outputs alternate; elsewhere the gate is the first half.
_ALTERNATING = ("gpt_oss",)
# What families call the matrices of an expert when they are saved one by one.
_W123 = {GATE: "w1", DOWN: "w2", UP: "w3"}
_MIXTRALS = ("mixtral", "phimoe", "minimax", "minimax_m2")
_SAVED_NAMES = dict.fromkeys((*_MIXTRALS, "lfm2_moe", "deepseek_v4"), _W123)
# model_type -> (what stands in a live name, what stands in that of its files). The source is
# transformers' conversion_mapping.py.
_SPARSE = (re.compile(r"(?<=\d)\.mlp\."), ".block_sparse_moe.")
_RENAMED: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), (_SPARSE,)),
    "phimoe": (_SPARSE, (re.compile(r"\.router\.weight$"), ".gate.weight")),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        ((re.compile(r"\.router\.weight$"), ".router.layer.weight"),),
    ),
    "gpt_neox": ((re.compile(r"^lm_head\."), "embed_out."),),
}
# Tensors (E, out, in) that are named for what they do to all experts: GraniteMoE, JetMoE.
_LINEAR = {"input_linear": GATE_UP, "output_linear": DOWN}

_MIXTURE = re.compile(r"experts$|(?:^|_)moe(?:_|$)")  # a component of the tensor's path
_NO_MAP = re.compile(r"(?:^|[._])(?:bias|A_log)$")

Array = TypeVar("Array")


@dataclass(frozen=True)
class Part:
    """A matrix that is read from a tensor.

    Attributes:
        name: the clean name of the matrix.
        rows: m, of (m, n).
        cols: n.
        index: which numbers of the tensor it is, as an index of NumPy or torch.
        attrs: how it was cut out, JSON-like; empty for a tensor that is a matrix.
    """

    name: str
    rows: int
    cols: int
    index: tuple[int | slice, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def of(self, tensor: Array) -> Array:
        """The matrix in a tensor of NumPy or torch, (rows, cols), a view where possible."""
        part = tensor[self.index]  # type: ignore[index]
        return part.reshape(self.rows, self.cols)


def parts_of(
    name: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any] | None = None,
    *,
    convolution: bool | None = None,
) -> tuple[Part, ...] | str:
    """The matrices that a tensor is read as; or what it is instead, in a few words.

    Args:
        name: the clean name of the tensor.
        shape: of the tensor.
        config: the model's config, as JSON-like values; its `model_type` tells how experts lie.
        convolution: whether a convolution computes with it; None where only its name can tell.

    >>> [part.name for part in parts_of("up_proj.weight", (4, 2))]
    ['up_proj.weight']
    >>> [part.name for part in parts_of("mlp.experts.down_proj", (2, 8, 4))]
    ['mlp.experts.0.down_proj.weight', 'mlp.experts.1.down_proj.weight']
    >>> parts_of("conv1.weight", (8, 3, 5, 5))[0].cols
    75
    >>> parts_of("norm.weight", (8,))
    'vectors (norms, biases)'
    """
    if 0 in shape:
        return "empty tensors"
    if sum(size > 1 for size in shape) < 2 and len(shape) != 2:
        return f"{VECTORS} (norms, biases)"
    if _NO_MAP.search(name):
        return f"{VECTORS} of experts or states (biases, A_log)"
    if len(shape) == 2:
        return (Part(name, *shape),)
    if convolution or (convolution is None and _looks_like_convolution(name, shape)):
        return (_flattened(name, shape),)
    if len(shape) == 3 and (stack := _stack_of(name)) is not None:
        return _experts(name, *stack, shape, language_config(config or {}))
    sizes = [size for size in shape if size > 1]
    if len(sizes) == 2:  # a table, such as the (1, positions, width) of vision models
        rows, cols = sizes
        return (Part(name, rows, cols, attrs={"view": f"{rows} x {cols}"}),)
    return f"tensors of {len(shape)} dimensions that are neither experts nor convolutions"


def name_in_files(name: str, config: Mapping[str, Any]) -> str:
    """The name in files of a parameter, where its family has another one; else the name itself.

    Args:
        name: the clean name of a live model.
        config: of the model, as JSON-like values.

    >>> name_in_files("model.layers.0.mlp.gate.weight", {"model_type": "mixtral"})
    'model.layers.0.block_sparse_moe.gate.weight'
    >>> name_in_files("model.layers.0.mlp.gate.weight", {"model_type": "qwen3_moe"})
    'model.layers.0.mlp.gate.weight'
    """
    for live, saved in _RENAMED.get(str(language_config(config).get("model_type") or ""), ()):
        name = live.sub(saved, name)
    return name


def stores_in_out(config: Mapping[str, Any]) -> bool:
    """Whether a family stores its experts in one tensor as (E, in, out), not (E, out, in).

    >>> stores_in_out({"model_type": "gpt_oss"}), stores_in_out({"model_type": "mixtral"})
    (True, False)
    """
    return str(language_config(config).get("model_type") or "") in _IN_OUT


def _flattened(name: str, shape: tuple[int, ...]) -> Part:
    view = f"{shape[0]} x ({' * '.join(map(str, shape[1:]))})"
    return Part(name, shape[0], int(np.prod(shape[1:])), attrs={"view": view})


def _looks_like_convolution(name: str, shape: tuple[int, ...]) -> bool:
    if not name.endswith("weight") or _stack_of(name) is not None:
        return False
    return len(shape) > 3 or "conv" in name.lower()


def _stack_of(name: str) -> tuple[str, str] | None:
    """(path of the experts, what the tensor is to each of them); None for others."""
    *path, leaf = name.removesuffix(".weight").split(".")
    places = [i for i, part in enumerate(path) if _MIXTURE.search(part)]
    if not places:
        return None
    # Where the mixture itself holds the tensors of its experts, they get the usual path.
    inside = places[-1] + 1
    experts = path[:inside] + ([] if path[inside - 1].endswith("experts") else ["experts"])
    return ".".join(experts), ".".join([*path[inside:], _LINEAR.get(leaf, leaf)])


def _experts(
    name: str, path: str, module: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[Part, ...]:
    family = str(config.get("model_type") or "")
    split: dict[str, tuple[slice, ...]] = {module: ()}
    if module == GATE_UP:
        split = _gate_and_up(shape, family, config)
    path = name_in_files(path, config)
    parts = []
    for expert in range(shape[0]):
        for part, index in split.items():
            leaf = _SAVED_NAMES.get(family, {}).get(part, part)
            whole: tuple[int | slice, ...] = (expert, *index)
            rows, cols = np.broadcast_to(0, shape)[whole].shape
            attrs = {"expert": expert, "tensor": name}
            parts.append(
                Part(f"{path}.{expert}.{leaf}.weight", rows, cols, index=whole, attrs=attrs)
            )
    return tuple(parts)


def _gate_and_up(
    shape: tuple[int, ...], family: str, config: Mapping[str, Any]
) -> dict[str, tuple[slice, ...]]:
    """Which outputs of an expert's `gate_up_proj` are the gate's; whole where nothing can tell."""
    in_out = family in _IN_OUT
    inputs, outputs = shape[1:] if in_out else shape[:0:-1]
    if not family or outputs % 2 or config.get("hidden_size", inputs) != inputs:
        return {GATE_UP: ()}
    if family in _ALTERNATING:
        halves = slice(0, None, 2), slice(1, None, 2)
    else:
        halves = slice(0, outputs // 2), slice(outputs // 2, None)
    every = (slice(None),) if in_out else ()
    return {GATE: (*every, halves[0]), UP: (*every, halves[1])}
