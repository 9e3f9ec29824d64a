"""The component `pico_ov_circuit`: what pico-analyze calls the OV circuit, to match its numbers.

pico-analyze multiplies the two projections of each head in the other order and puts the heads side
by side (`OVComponent.compute_ov_weights` in src/components/ov_circuit.py, as in the fork
github.com/Yu-val-weiss/pico-analyze, commit ecd268c, that measured the ReLoRA paper, arXiv
2509.12960):

    [W_V^g(0) @ W_O^0, ..., W_V^g(H-1) @ W_O^(H-1)]    (head_dim, num_heads·head_dim)

with the slices of `dynamics.components.circuits`. This is not the matrix that a head computes
with, W_O^h @ W_V^g. The two orders have the same non-zero eigenvalues and other singular values:
for head_dim 1 the one is the outer product o v^T, with the singular value |o||v|, the other the
number v^T o. W_V W_O would be how a head's value reads what the same head has just written. Side by
side, the heads moreover share head_dim singular values, where apart they have head_dim each.

pico-analyze measures each (head_dim, head_dim) block too; published are the numbers of the whole.
Its gradients follow another convention, W_O G_V + G_O W_V per head, (d_model, num_heads·d_model)
side by side: a head of that is the `gradient` of `ov_circuit`. Here, as in what was published,
only `weight` and `base` are defined.
"""

import numpy as np

from dynamics import schema
from dynamics.components.attention import Attention, Read, attention_layers
from dynamics.components.circuits import coarsest
from dynamics.components.parameters import Measurable
from dynamics.runs.attention_config import Architecture
from dynamics.runs.run import Dense, Factored, Matrix, MatrixInfo, Run
from dynamics.schema import Status
from dynamics.spectra.noise import noise_norm_bound
from dynamics.spectra.rounding import rounding_variance


def pico_ov_circuit(run: Run) -> list[tuple[MatrixInfo, Measurable]]:
    """[W_V^g @ W_O^h for every head h] of every layer, (head_dim, num_heads·head_dim).

    Raises:
        MissingError: the run has no v_proj and o_proj, no weights, or no config.
        DynamicsError: its config contradicts the shapes of its weights.
    """
    name, circuits = "pico_ov_circuit", []
    for each in attention_layers(run, ("v_proj", "o_proj")):
        rows = each.architecture.head_dim
        cols = each.architecture.num_heads * rows
        info = MatrixInfo(f"{each.path}.{name}", each.layer, name, rows, cols)
        circuits.append((info, _reader(run.read, each)))
    return circuits


def _reader(read: Read, attention: Attention) -> Measurable:
    def matrix(step: int, kind: str) -> Matrix | Status:
        if kind not in (schema.WEIGHT, schema.BASE):
            return Status.UNDEFINED
        v, o = (attention.projection(read, each, step, kind) for each in ("v_proj", "o_proj"))
        if v is None or o is None:
            return Status.NOT_RECORDED
        return side_by_side(v, o, attention.architecture)

    return matrix


def side_by_side(v: Dense, o: Dense, architecture: Architecture) -> Factored:
    """The matrix of one layer, as the product of stored numbers that its noise comes from.

    [W_V^0, ..., W_V^(G-1)], (head_dim, G·d_model), times a matrix whose block (g, h) is W_O^h
    where head h uses key-value head g, and zero elsewhere, (G·d_model, num_heads·head_dim).
    """
    groups, width, size = (
        architecture.num_kv_heads,
        architecture.hidden_size,
        architecture.head_dim,
    )

    def placed(v: np.ndarray, o: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = v.reshape(groups, size, width).transpose(1, 0, 2).reshape(size, groups * width)
        right = np.zeros((groups * width, architecture.num_heads * size), dtype=o.dtype)
        for head in range(architecture.num_heads):
            first = architecture.kv_head(head) * width
            columns = slice(head * size, (head + 1) * size)
            right[first : first + width, columns] = o[:, columns]
        return left, right

    noise = None
    if v.errors is not None or o.errors is not None:
        variances = placed(*(rounding_variance(*each.stored[0]) for each in (v, o)))
        noise = noise_norm_bound(variances[0]), noise_norm_bound(variances[1])
    return Factored(*placed(v.values, o.values), 1.0, coarsest(v.dtype, o.dtype), noise=noise)
