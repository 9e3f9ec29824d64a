"""The components `ov_circuit` and `qk_circuit`: what each attention head does, as one matrix.

With weights as torch's Linear stores them, (out, in), and x a column of the residual stream, head h
writes W_O^h W_V^g x for each position it attends to, and attends from x to y by x^T W_Q^h^T W_K^g y
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"):

    OV_h = W_O^h @ W_V^g        W_O^h = W_O[:, h·head_dim : (h+1)·head_dim]
    QK_h = W_Q^h^T @ W_K^g      W_V^g = W_V[g·head_dim : (g+1)·head_dim], likewise W_Q^h, W_K^g

Both are (d_model, d_model) of rank head_dim at most. With grouped-query attention, query head h
uses key-value head g = h // (num_heads / num_kv_heads). Left out are the scaling 1/sqrt(head_dim),
biases, and the norms that some models put on queries and keys. So are rotary embeddings: with them
QK_h is what scores positions at distance zero.

The product is never formed. Sums of products stay products of stacked factors,

    difference   OV_now - OV_before = [W_O, -W_O'] @ [W_V; W_V']
    gradient     G_O W_V + W_O G_V  = [G_O,  W_O ] @ [W_V; G_V ]

of rank 2·head_dim at most. The gradient of a circuit is this first-order change of the product
when its two weights change by their gradients; it is not dL/dOV, which the weights' gradients do
not determine. The weights in it are those of the same record. A recording's gradient was taken one
optimizer step earlier, so that the exact derivative differs from this in terms of gradient times
that one step: in relative terms, by how much one step changes the weights.

`adapter` and `accumulated_adapter` are undefined: s·B·A is added to each factor, and no matrix is
added to their product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dynamics import schema
from dynamics.components.parameters import Measurable
from dynamics.errors import MissingError
from dynamics.runs.attention_config import Architecture, check_projections, read_architecture
from dynamics.runs.differences import reference_step, trained_steps, training_roundings
from dynamics.runs.fused import Part, kept_whole
from dynamics.runs.parameter_names import QKV, attention_path, stack_of
from dynamics.runs.run import Dense, Factored, Matrix, MatrixInfo, Run
from dynamics.schema import Status
from dynamics.spectra.noise import noise_norm_bound
from dynamics.spectra.rounding import rounding_variance, ulp

Read = Callable[[str, int, str], Matrix | None]
# (weight of a projection, architecture, query head) -> the slice of it in that head's circuit
Slice = Callable[..., np.ndarray]
# (step, kind) -> the factors (d_model, head_dim) and (head_dim, d_model), None if not recorded
Factors = Callable[[int, str], tuple[Dense, Dense] | None]


def ov_circuit(run: Run) -> list[tuple[MatrixInfo, Measurable]]:
    """OV_h = W_O^h @ W_V^g of every layer and query head, (d_model, d_model), each with its reader.

    Raises:
        MissingError: the run has no v_proj and o_proj, no weights, or no config.
        DynamicsError: its config contradicts the shapes of its weights.
    """
    return _circuits(run, "ov_circuit", ("o_proj", _columns), ("v_proj", _kv_rows))


def qk_circuit(run: Run) -> list[tuple[MatrixInfo, Measurable]]:
    """QK_h = W_Q^h^T @ W_K^g of every layer and query head, (d_model, d_model), with its reader.

    Raises:
        MissingError: the run has no q_proj and k_proj, no weights, or no config.
        DynamicsError: its config contradicts the shapes of its weights.
    """
    return _circuits(run, "qk_circuit", ("q_proj", _transposed_rows), ("k_proj", _kv_rows))


@dataclass(frozen=True)
class Attention:
    """The attention of one layer: the path of its module, its projections by module, its heads."""

    path: str
    projections: dict[str, MatrixInfo]
    architecture: Architecture

    @property
    def layer(self) -> int | None:
        """The index of the layer."""
        return next(iter(self.projections.values())).layer

    @property
    def stores_in_out(self) -> bool:
        """Whether its weights are stored (in, out), as GPT-2's Conv1D does.

        The output projection is square and does not tell; the fused matrix beside it does.
        """
        return any(isinstance(i, Part) and i.axis == 1 for i in self.projections.values())

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        info = self.projections[module]
        return (info.cols, info.rows) if self.stores_in_out else (info.rows, info.cols)

    def projection(self, read: Read, module: str, step: int, kind: str) -> Dense | None:
        """A projection as (out, in), None where the run has none at this step."""
        stored = read(self.projections[module].name, step, kind)
        if stored is None:
            return None
        assert isinstance(stored, Dense)
        return stored.part(lambda array: array.T) if self.stores_in_out else stored


def attention_layers(run: Run, modules: tuple[str, ...]) -> list[Attention]:
    """The attention modules of a run that have all these projections.

    Raises:
        MissingError: there is none, or the run has no weights or no config.
        DynamicsError: its config contradicts the shapes of its weights.
    """
    if schema.WEIGHT not in run.stored_kinds:
        raise MissingError(f"{run.path} holds no weights; circuits are made of them.")
    attentions: dict[str, dict[str, MatrixInfo]] = {}
    for name, info in run.matrices.items():
        attentions.setdefault(attention_path(name), {})[info.module] = info
    complete = {
        path: {module: projections[module] for module in modules}
        for path, projections in attentions.items()
        if set(modules) <= set(projections)
    }
    if not complete:
        wanted = " and ".join(modules)
        fused = [name for name, info in run.matrices.items() if info.module == QKV]
        if fused:
            reason = kept_whole(run).get(
                fused[0], "Open it with split_fused=True (without --keep-fused)."
            )
            raise MissingError(
                f"{run.path} fuses query, key and value in one matrix ({fused[0]}); "
                f"circuits need {wanted} apart. {reason}"
            )
        raise MissingError(f"No attention of {run.path} has {wanted} side by side.")
    layers = []
    for path, projections in complete.items():
        architecture = read_architecture(run.attrs, run.path, stack_of(path + "."))
        layer = Attention(path, projections, architecture)
        shapes = {layer.projections[module].name: layer.shape(module) for module in modules}
        check_projections(architecture, shapes, run.path)
        layers.append(layer)
    return layers


def coarsest(*dtypes: str) -> str:
    """The dtype with the largest rounding error: one floor holds for factors of mixed dtypes."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return max(dtypes, key=lambda dtype: float(ulp(np.ones(1), dtype)[0]))


def _circuits(
    run: Run, component: str, left: tuple[str, Slice], right: tuple[str, Slice]
) -> list[tuple[MatrixInfo, Measurable]]:
    circuits = []
    for each in attention_layers(run, (left[0], right[0])):
        width = each.architecture.hidden_size
        for head in range(each.architecture.num_heads):
            name = f"{each.path}.{component}.{head}"
            info = MatrixInfo(name, each.layer, component, width, width, head)
            factors = _factors(run.read, each, head, left, right)
            circuits.append((info, _reader(run, factors, each)))
    return circuits


def _factors(
    read: Read,
    attention: Attention,
    head: int,
    left: tuple[str, Slice],
    right: tuple[str, Slice],
) -> Factors:
    def factors(step: int, kind: str) -> tuple[Dense, Dense] | None:
        slices = []
        for module, slice_of in (left, right):
            weight = attention.projection(read, module, step, kind)
            if weight is None:
                return None
            slices.append(
                weight.part(partial(slice_of, architecture=attention.architecture, head=head))
            )
        return slices[0], slices[1]

    return factors


def _reader(run: Run, factors: Factors, attention: Attention) -> Measurable:
    def matrix(step: int, kind: str) -> Matrix | Status:
        if kind in schema.DIFFERENCES:
            before = _reference_step(run, attention, step, kind)
            if before is None:
                return Status.UNDEFINED
            parts = [factors(step, schema.WEIGHT), factors(before, schema.WEIGHT)]
            names = [info.name for info in attention.projections.values()]
            steps = [trained_steps(run, name, before, step) for name in names]
            combined: Callable[..., Factored] = partial(_difference, steps=steps)
        elif kind == schema.GRADIENT:
            parts = [factors(step, schema.WEIGHT), factors(step, schema.GRADIENT)]
            combined = _first_order_change
        elif kind in (schema.WEIGHT, schema.BASE):
            parts, combined = [factors(step, kind)], _product
        else:
            return Status.UNDEFINED
        return Status.NOT_RECORDED if None in parts else combined(*parts)

    return matrix


def _reference_step(run: Run, attention: Attention, step: int, kind: str) -> int | None:
    # Where one projection has an adapter and the other has none, the cycle is that of the first.
    steps = [reference_step(run, i.name, step, kind) for i in attention.projections.values()]
    return max((each for each in steps if each is not None), default=None)


def _product(pair: tuple[Dense, Dense]) -> Factored:
    left, right = pair
    noise = noise_of_factors([left], [right])
    return Factored(left.values, right.values, 1.0, coarsest(left.dtype, right.dtype), noise=noise)


def _difference(
    now: tuple[Dense, Dense], before: tuple[Dense, Dense], steps: list[int]
) -> Factored:
    # Of the stored numbers themselves, not of their differences: their rounding is the noise.
    # Where both are of one quantised base, its errors cancel.
    pairs = list(zip(now, before, strict=True))
    if all(one.errors is not None and one.errors.are_of(other.errors) for one, other in pairs):
        now, before = ((replace(o, errors=None), replace(v, errors=None)) for o, v in (now, before))
    left = np.hstack([now[0].values.astype(np.float64), -before[0].values.astype(np.float64)])
    right = np.vstack([each[1].values.astype(np.float64) for each in (now, before)])
    noise, storage = noise_of_factors([now[0], before[0]], [now[1], before[1]]), None
    if noise is None and any(steps):
        variances = [[rounding_variance(*weight.stored[0]) for weight in pair] for pair in pairs]
        storage = _norms(variances)
        for (of_now, _), weight, count in zip(variances, now, steps, strict=True):
            dtype, times = training_roundings(weight.dtype, count)
            of_now += times * rounding_variance(weight.values, dtype)
        noise = _norms(variances)
    dtype = coarsest(*(each.dtype for each in (*now, *before)))
    return Factored(left, right, 1.0, dtype, noise=noise, storage_noise=storage)


def _first_order_change(weights: tuple[Dense, Dense], gradients: tuple[Dense, Dense]) -> Factored:
    # [G_O, W_O] @ [W_V; G_V] = [c·G_O, W_O] @ [W_V/c; G_V]. With c of the order of weight over
    # gradient the factors' norms no longer exceed the terms', nor does the noise floor made of
    # them; as a power of two it leaves all significands, and so the relative rounding, alone.
    c = _balance(weights, gradients)
    (w_left, w_right), (g_left, g_right) = (
        [each.values.astype(np.float64) for each in pair] for pair in (weights, gradients)
    )
    left = np.hstack([np.ldexp(g_left, c), w_left])
    right = np.vstack([np.ldexp(w_right, -c), g_right])
    (w_o, w_v), (g_o, g_v) = weights, gradients
    noise = noise_of_factors([_scaled(g_o, c), w_o], [_scaled(w_v, -c), g_v])
    dtype = coarsest(*(each.dtype for each in (*weights, *gradients)))
    return Factored(left, right, 1.0, dtype, noise=noise)


def _scaled(factor: Dense, exponent: int) -> Dense:
    errors = factor.errors and factor.errors.scaled(2.0**exponent)
    return Dense(np.ldexp(factor.values.astype(np.float64), exponent), factor.dtype, errors)


def noise_of_factors(left: list[Dense], right: list[Dense]) -> tuple[float, float] | None:
    """Bounds on the norms of the errors of [left] side by side and of [right] above each other.

    None where nothing was quantised: then the dtype of the product decides them.
    """
    if all(each.errors is None for each in (*left, *right)):
        return None
    variances = [[rounding_variance(*each.stored[0]) for each in side] for side in (left, right)]
    return _norms(variances)


def _norms(variances: list[list[np.ndarray]]) -> tuple[float, float]:
    left, right = variances
    return noise_norm_bound(np.hstack(left)), noise_norm_bound(np.vstack(right))


def _balance(weights: tuple[Dense, Dense], gradients: tuple[Dense, Dense]) -> int:
    """The exponent of 2 nearest to the geometric mean of ‖W‖/‖G‖ over the two projections."""
    sizes = [
        (float(np.linalg.norm(weight.values)), float(np.linalg.norm(gradient.values)))
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    ratios = [np.log2(w / g) for w, g in sizes if 0 < w < np.inf and 0 < g < np.inf]
    return round(float(np.mean(ratios))) if ratios else 0


def _columns(weight: np.ndarray, architecture: Architecture, head: int) -> np.ndarray:
    return weight[:, head * architecture.head_dim : (head + 1) * architecture.head_dim]


def _transposed_rows(weight: np.ndarray, architecture: Architecture, head: int) -> np.ndarray:
    return weight[head * architecture.head_dim : (head + 1) * architecture.head_dim].T


def _kv_rows(weight: np.ndarray, architecture: Architecture, head: int) -> np.ndarray:
    first = architecture.kv_head(head) * architecture.head_dim
    return weight[first : first + architecture.head_dim]
