"""The words that files and results are spelled with: formats, kinds, dimensions, status.

Everything else imports these; no other file spells them.
"""

from enum import IntEnum

RECORDING_FORMAT = "learning-dynamics-recording"
RECORDING_VERSION = 2  # 1 had no checksums
ANALYSIS_FORMAT = "learning-dynamics-analysis"
ANALYSIS_VERSION = 1

# Kinds: which matrix of a parameter. W is the weight that the model computes with.
WEIGHT = "weight"
BASE = "base"
ADAPTER = "adapter"
GRADIENT = "gradient"
UPDATE = "update"
DISPLACEMENT = "displacement"
CYCLE_UPDATE = "cycle_update"
OPTIMIZER_UPDATE = "optimizer_update"
ACCUMULATED_ADAPTER = "accumulated_adapter"

KINDS: dict[str, str] = {
    WEIGHT: "the weight the model computes with (base + adapter where there is one)",
    BASE: "the weight without its adapter",
    ADAPTER: "the adapter's product s·B·A",
    GRADIENT: "the gradient that the optimizer step consumed",
    UPDATE: "weight now - weight at the previous record",
    DISPLACEMENT: "weight now - weight at the first step of the run",
    CYCLE_UPDATE: "weight now - weight at the last merge (or the first step)",
    OPTIMIZER_UPDATE: "weight now - weight one optimizer step before",
    ACCUMULATED_ADAPTER: "the sum of s·B·A over all cycles so far, from their factors",
}

# Kinds that are a weight less an earlier one.
DIFFERENCES = (UPDATE, DISPLACEMENT, CYCLE_UPDATE, OPTIMIZER_UPDATE)

# Events: what happened after an optimizer step and before the next.
MERGE = "merge"
OPTIMIZER_RESET = "optimizer_reset"
PROJECTION = "projection"  # the next step takes new directions for the moments
RESUME = "resume"
SKIPPED = "skipped"  # a record that the storage was too slow for

COMPONENTS: dict[str, str] = {
    "parameters": "every two-dimensional parameter",
    "ov_circuit": "W_O @ W_V of each attention head: what it writes",
    "qk_circuit": "W_Q^T @ W_K of each attention head: where it attends",
    "pico_ov_circuit": "W_V @ W_O per head, side by side: what pico-analyze calls OV circuit",
}

# Dimensions of an analysis.
RUN, KIND, STEP, MATRIX, INDEX = "run", "kind", "step", "matrix", "index"
MATRIX_COORDS = (
    "component", "layer", "module", "stack", "attention", "head", "expert", "rows", "cols"
)  # fmt: skip
NO_LAYER = -1  # the `layer` of a matrix outside the stack of layers, e.g. an embedding
NO_HEAD = -1  # the `head` of a matrix that belongs to no single head, e.g. a parameter
NO_EXPERT = -1  # the `expert` of a matrix outside of the routed experts of a mixture

# Variables that every analysis has beside its metrics.
SINGULAR_VALUE = "singular_value"
SINGULAR_VALUE_ERROR = "singular_value_error"
NOISE_FLOOR = "noise_floor"
STORAGE_NOISE_FLOOR = "storage_noise_floor"
STATUS = "status"
REFERENCE_STEP = "reference_step"
COMMAND = "command"  # an attribute: the command line that made a saved result
MADE = "made"  # an attribute: when it was made, UTC
SOURCES = "sources"  # an attribute of comparisons: what each run was measured from
AUDITS = "audits"  # an attribute: check -> its verdict; of comparisons by run
LAG = "lag"  # an attribute: the optimizer steps that updates are over, where that was asked for
NO_STEP = -1  # the `reference_step` of what is no difference, or has nothing to subtract


class Status(IntEnum):
    """Why a cell of an analysis holds a number, or NaN.

    Example:
        >>> ranks = dy.analyze("run.zarr", kinds=["update"])
        >>> dy.Status(int(ranks["status"][0, 0, 0])).name  # nothing comes before the first record
        'UNDEFINED'
    """

    NOT_RECORDED = 0  # the run has no such matrix at this step
    MEASURED = 1
    UNDEFINED = 2  # an update at the first step; a kind that the component does not have
    NON_FINITE = 3  # the matrix holds NaN or Inf
    UNREADABLE = 4  # its file is damaged or missing
