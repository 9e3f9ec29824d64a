"""The layers of the code: the one list, which a test checks and docs/architecture.md shows.

python -m tests.layers    # prints the picture; copy it into docs/architecture.md
"""

# From the top down. A package imports from itself and from the floors below it, and from nothing
# else: packages on one floor do not know each other.
LAYERS: list[dict[str, str]] = [
    {"probes.relora": "the reference experiment: trains, evaluates, sweeps"},
    {"probes.frameworks": "callbacks of training frameworks"},
    {"probes.recorder": "when a record is made"},
    {"probes.records": "what a record holds, and how it gets to the store"},
    {
        "probes.gradients": "which gradients a step consumes",
        "probes.checks": "what a merge or a reset did, live",
        "probes.live": "what a tracker shows while it trains",
    },
    {
        "probes.model": "what is read of a live model",
        "probes.schedule": "which steps are recorded",
    },
    {"probes.optimizers": "when a step is over"},
    {"probes.contexts": "nothing of the user's surroundings counts"},
    {"dynamics.cli": "the command line"},
    {
        "dynamics.directions": "where do matrices point?",
        "dynamics.exports": "how do results reach other tools?",
    },
    {"dynamics.plots": "what does it look like?"},
    {
        "dynamics.analysis": "who does the work?",
        "dynamics.auditing": "is something broken?",
    },
    {
        "dynamics.components": "what is measured of a model?",
        "dynamics.metrics": "which numbers make up a spectrum?",
        "dynamics.formats": "what can be read?",
    },
    {"dynamics.formats.shared": "what several formats have in common"},
    {"dynamics.formats.quantised": "which numbers do codes stand for?"},
    {
        "dynamics.formats.format": "what is a format?",
        "dynamics.formats.storage": "how are tensors stored in files?",
        "dynamics.recordings": "the Zarr layout of recordings",
        "dynamics.spectra": "how is one matrix measured?",
    },
    {"dynamics.runs": "what is a run?"},
    {
        "dynamics.errors": "what a user can do wrong",
        "dynamics.schema": "the words of files and results",
    },
]


def picture() -> str:
    """The layers as text, a box per floor."""
    width = max(len(name) for floor in LAYERS for name in floor) + 2
    right = max(len(meaning) for floor in LAYERS for meaning in floor.values()) + 2
    rule = "─" * width + "{}" + "─" * right
    lines = ["┌" + rule.format("┬") + "┐"]
    for number, floor in enumerate(LAYERS):
        if number:
            lines.append("├" + rule.format("┼") + "┤")
        lines += [f"│ {name:{width - 2}} │ {floor[name]:{right - 2}} │" for name in floor]
    return "\n".join([*lines, "└" + rule.format("┴") + "┘"])


if __name__ == "__main__":
    print(picture())
