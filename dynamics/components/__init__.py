"""Components: what is measured of a model. Adding one is a file here and a line of `COMPONENTS`."""

from collections.abc import Callable

from dynamics.components import circuits, parameters, pico_circuits
from dynamics.components.parameters import Measurable
from dynamics.errors import MissingError, near
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


def check_components(names: list[str]) -> list[str]:
    """The names themselves, each once; MissingError lists the known components."""
    for name in names:
        if name not in COMPONENTS:
            raise MissingError(
                f"No component {name!r}{near(name, COMPONENTS)}; known: {', '.join(COMPONENTS)}."
            )
    return list(dict.fromkeys(names))
