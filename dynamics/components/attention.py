"""The attention modules of a run: their projections, their heads, and the part of each head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynamics import schema
from dynamics.errors import MissingError
from dynamics.runs.attention_config import Architecture, check_projections, read_architecture
from dynamics.runs.fused import Part, kept_whole
from dynamics.runs.parameter_names import QKV, attention_path, stack_of
from dynamics.runs.run import Dense, Factored, Matrix, MatrixInfo, Run

Read = Callable[[str, int, str], Matrix | None]


class Slice(NamedTuple):
    """The part of a projection that is in the circuit of one head."""

    rows: slice
    columns: slice
    transposed: bool = False

    def of(self, array: np.ndarray) -> np.ndarray:
        """This part of the numbers of a projection."""
        part = array[self.rows, self.columns]
        return part.T if self.transposed else part


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

    def adapter_part(self, part: Slice, adapter: Factored | None) -> Factored | None:
        """This part of the s·B·A of a projection."""
        if adapter is None:
            return None
        left, right = adapter.left, adapter.right
        if self.stores_in_out:
            left, right = right.T, left.T
        left, right = left[part.rows], right[:, part.columns]
        factors = (right.T, left.T) if part.transposed else (left, right)
        return Factored(*factors, adapter.scale, adapter.dtype)


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
