"""Components: what is measured of a model. Adding one is a file here and a line of `COMPONENTS`."""

from collections.abc import Callable, Iterator

from dynamics import schema
from dynamics.components import circuits, parameters, pico_circuits
from dynamics.components.parameters import Measurable
from dynamics.errors import MissingError, near
from dynamics.runs.parameter_names import attention_path
from dynamics.runs.run import MatrixInfo, Run

# name -> the matrices of a run, each with the function that reads it at a step and kind
COMPONENTS: dict[str, Callable[[Run], list[tuple[MatrixInfo, Measurable]]]] = {
    "parameters": parameters.parameters,
    "ov_circuit": circuits.ov_circuit,
    "qk_circuit": circuits.qk_circuit,
    "pico_ov_circuit": pico_circuits.pico_ov_circuit,
}

# Measured unless others are asked for. Every run has parameters; circuits take a config
# with the number of heads, and are as many matrices as layers times heads.
DEFAULT_COMPONENTS = ("parameters",)

_PROJECTIONS = {
    "ov_circuit": ("v_proj", "o_proj"),
    "qk_circuit": ("q_proj", "k_proj"),
    "pico_ov_circuit": ("v_proj", "o_proj"),
}
_OF_CIRCUITS = (schema.WEIGHT, schema.BASE, schema.UPDATE, schema.DISPLACEMENT)


def made_of(run: Run) -> Callable[[str, str, str], Iterator[str]]:
    """(component, matrix, kind) -> the matrices of the run that this one is made of, in this kind.

    It tells beforehand what will be read; none where nothing is, or the kind is not a weight's.
    """
    projections: dict[str, list[tuple[str, str]]] = {}
    for name, info in run.matrices.items():
        projections.setdefault(attention_path(name), []).append((info.module, name))

    def names(component: str, name: str, kind: str) -> Iterator[str]:
        if component not in _PROJECTIONS:
            yield name
        elif kind in _OF_CIRCUITS[: 2 if component.startswith("pico") else None]:
            for module, each in projections[name.partition(f".{component}")[0]]:
                if module in _PROJECTIONS[component]:
                    yield each

    return names


def check_components(names: list[str]) -> list[str]:
    """The names themselves, each once; MissingError lists the known components."""
    for name in names:
        if name not in COMPONENTS:
            raise MissingError(
                f"No component {name!r}{near(name, COMPONENTS)}; known: {', '.join(COMPONENTS)}."
            )
    return list(dict.fromkeys(names))
