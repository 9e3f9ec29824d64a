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

from collections.abc import Callable, Mapping

import numpy as np

from dynamics import schema
from dynamics.components.attention import Attention, Slice, attention_layers
from dynamics.components.parameters import Measurable
from dynamics.runs.attention_config import Architecture
from dynamics.runs.differences import Difference, adapters_of, reference_step, trained_steps
from dynamics.runs.run import Dense, Factored, Matrix, MatrixInfo, Run
from dynamics.schema import Status
from dynamics.spectra.noise import noise_norm_bound, noise_variance
from dynamics.spectra.rounding import rounding_variance, ulp

# (architecture, query head) -> its part of a projection
SliceOfHead = Callable[[Architecture, int], Slice]


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


def coarsest(*dtypes: str) -> str:
    """The dtype with the largest rounding error: one floor holds for factors of mixed dtypes."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return max(dtypes, key=lambda dtype: float(ulp(np.ones(1), dtype)[0]))


def _circuits(
    run: Run, component: str, left: tuple[str, SliceOfHead], right: tuple[str, SliceOfHead]
) -> list[tuple[MatrixInfo, Measurable]]:
    circuits = []
    for each in attention_layers(run, (left[0], right[0])):
        width = each.architecture.hidden_size
        for head in range(each.architecture.num_heads):
            name = f"{each.path}.{component}.{head}"
            info = MatrixInfo(name, each.layer, component, width, width, head)
            slices = {module: of(each.architecture, head) for module, of in (left, right)}
            circuits.append((info, _reader(run, each, slices)))
    return circuits


def _reader(run: Run, attention: Attention, slices: Mapping[str, Slice]) -> Measurable:
    def factors(step: int, kind: str) -> list[Dense] | None:
        """(d_model, head_dim) and (head_dim, d_model), None if not recorded."""
        found = []
        for module, part in slices.items():
            weight = attention.projection(run.read, module, step, kind)
            if weight is None:
                return None
            found.append(weight.part(part.of))
        return found

    def changes(step: int, before: int) -> list[Difference] | None:
        now, then = factors(step, schema.WEIGHT), factors(before, schema.WEIGHT)
        if now is None or then is None:
            return None
        differences = []
        weights = zip(now, then, strict=True)
        for (module, part), weight in zip(slices.items(), weights, strict=True):
            name = attention.projections[module].name
            last, first = adapters_of(run, name, step, before)
            adapters = attention.adapter_part(part, last), attention.adapter_part(part, first)
            merges = run.merges_between(name, before, step)
            steps = trained_steps(run, name, before, step)
            differences.append(Difference(*weight, merges, None, adapters, steps))
        return differences

    def matrix(step: int, kind: str) -> Matrix | Status:
        if kind in schema.DIFFERENCES:
            before = _reference_step(run, attention, step, kind)
            if before is None:
                return Status.UNDEFINED
            found = changes(step, before)
            return Status.NOT_RECORDED if found is None else _difference(*found)
        if kind not in (schema.WEIGHT, schema.BASE, schema.GRADIENT):
            return Status.UNDEFINED
        weights = factors(step, schema.WEIGHT if kind == schema.GRADIENT else kind)
        if weights is None:
            return Status.NOT_RECORDED
        if kind != schema.GRADIENT:
            return _product(*weights)
        gradients = factors(step, schema.GRADIENT)
        if gradients is None:
            return Status.NOT_RECORDED
        return _first_order_change(weights, gradients)

    return matrix


def _reference_step(run: Run, attention: Attention, step: int, kind: str) -> int | None:
    # Where one projection has an adapter and the other has none, the cycle is that of the first.
    steps = [reference_step(run, i.name, step, kind) for i in attention.projections.values()]
    return max((each for each in steps if each is not None), default=None)


def _product(left: Dense, right: Dense) -> Factored:
    noise = noise_of_factors([left], [right])
    return Factored(left.values, right.values, 1.0, coarsest(left.dtype, right.dtype), noise=noise)


def _difference(left: Difference, right: Difference) -> Factored:
    # Of the stored numbers themselves, not of their differences: their rounding is the noise.
    changes = [left, right]
    cancelled = [each.without_common_errors() for each in changes]
    if all(one is not other for one, other in zip(changes, cancelled, strict=True)):
        left, right = changes = cancelled
    stacked = (
        np.hstack([left.now.values.astype(np.float64), -left.before.values.astype(np.float64)]),
        np.vstack([each.values.astype(np.float64) for each in (right.now, right.before)]),
    )
    dtype = coarsest(*(each.dtype for c in changes for each in (c.now, c.before)))
    quantised = any(each.errors is not None for c in changes for each in (c.now, c.before))
    adapted = any(each is not None for c in changes for each in c.adapters)
    if not (quantised or adapted or any(c.merges or c.trained_steps for c in changes)):
        return Factored(*stacked, 1.0, dtype)  # which alone decides the noise
    variances = [
        [noise_variance(*each.rounded_since), noise_variance(*each.before.stored)]
        for each in changes
    ]
    noise, storage = _norms(variances), None
    trained = [each.rounded_in_training for each in changes]
    if any(trained):
        storage = noise
        for (of_now, _), rounded in zip(variances, trained, strict=True):
            if rounded is not None:
                of_now += rounded[1] * rounding_variance(*rounded[0])
        noise = _norms(variances)
    return Factored(*stacked, 1.0, dtype, noise=noise, storage_noise=storage)


def _first_order_change(weights: list[Dense], gradients: list[Dense]) -> Factored:
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


def _balance(weights: list[Dense], gradients: list[Dense]) -> int:
    """The exponent of 2 nearest to the geometric mean of ‖W‖/‖G‖ over the two projections."""
    sizes = [
        (float(np.linalg.norm(weight.values)), float(np.linalg.norm(gradient.values)))
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    ratios = [np.log2(w / g) for w, g in sizes if 0 < w < np.inf and 0 < g < np.inf]
    return round(float(np.mean(ratios))) if ratios else 0


def _columns(architecture: Architecture, head: int) -> Slice:
    return Slice(slice(None), _of_head(architecture, head))


def _transposed_rows(architecture: Architecture, head: int) -> Slice:
    return Slice(_of_head(architecture, head), slice(None), transposed=True)


def _kv_rows(architecture: Architecture, head: int) -> Slice:
    return Slice(_of_head(architecture, architecture.kv_head(head)), slice(None))


def _of_head(architecture: Architecture, head: int) -> slice:
    return slice(head * architecture.head_dim, (head + 1) * architecture.head_dim)
