"""The config of a training run: its method, model, schedule and data."""

from dataclasses import dataclass

from dynamics.errors import DynamicsError

METHODS = (
    "full_rank",
    "relora",
    "lora",
    "galore",
    "fira",
    "apollo",
    "muon",
    "cola",
    "sltrain",
)
ADAPTED = ("relora", "lora")
PROJECTED = ("galore", "fira", "apollo")
FACTORED = ("cola", "sltrain")
PRECISIONS = ("float32", "bfloat16")
ADAPTER_STARTS = ("kaiming", "zero")
RESET_MODES = ("drop", "zero", "random_prune", "magnitude_prune")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Fields that have no effect on some methods: a sweep does not repeat the runs of those for them.
RESTART_FIELDS = (
    "reset_every",
    "restart_warmup_steps",
    "optimizer_reset",
    "prune_ratio",
    "shared_prune_mask",
    "merge_with_scaling",
)
ADAPTER_FIELDS = ("min_lr_ratio", "adapter_start", "lora_alpha", "lora_dropout")
PROJECTION_FIELDS = ("projection_scale",)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run: equal configs and data give equal weights.

    Two runs whose configs differ only in `method` are twins: they start from the same function
    and see the same batches in the same order. The presets give the sizes of the reference
    experiment; `dataclasses.replace` changes single fields.

    Attributes:
        method: "full_rank"; "relora" (Lialin et al. 2023, arXiv 2307.05695); "lora": the same
            adapters, never merged; "galore", "fira", "apollo" or "muon": the full-rank model,
            with another optimizer for `target_modules`; "cola": `target_modules` are two factors
            with a nonlinearity in between; "sltrain": they are s·B·A plus a sparse matrix.
        seed: for the weights, the adapters, the order of the data and the dropout.
        hidden_size: d_model.
        intermediate_size: width of the SwiGLU.
        num_layers: transformer layers.
        num_heads: query heads; head_dim = hidden_size / num_heads.
        num_kv_heads: key and value heads; each is shared by num_heads / num_kv_heads query heads.
        vocab_size: rows of the embedding.
        sequence_length: tokens per sequence.
        dataset: the training data if no text is given: the name of a Hugging Face dataset, or a
            file or folder of tokens (see `open_tokens`). None means the built-in corpus.
        tokenizer: the tokenizer that made the tokens of a dataset: its name, or its
            tokenizer.json. None if it is trained on the text, or not available.
        validation_sequences: sequences that are held out for the validation loss: the first ones
            of a dataset, or at most 5 % of a text.
        max_steps: optimizer steps.
        batch_size: sequences per forward pass, on all devices together.
        gradient_accumulation_steps: forward passes per optimizer step.
        precision: "float32", or "bfloat16": autocast, with parameters and moments in float32.
        learning_rate: the peak; the schedule multiplies it.
        other_learning_rate: the peak for what is not in `target_modules`: embeddings, norms and
            the head; 0 means `learning_rate`.
        weight_decay: of AdamW, on all trainable parameters.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        warmup_steps: length of the first linear warm-up.
        restart_warmup_steps: length of the linear ramp after each merge (relora).
        min_lr_ratio: multiplier at the end of the cosine (relora, lora); full rank decays to 0.
        reset_every: optimizer steps between merges (relora), or between projectors (galore, fira,
            apollo). Equal values and ranks give ReLoRA and GaLore the same rank bound.
        optimizer_reset: what a merge does to the optimizer state of the adapters (relora); see
            `reset_optimizer`.
        prune_ratio: share of the moments that the pruning modes empty (relora).
        shared_prune_mask: whether pruning empties the same entries of both moments (relora).
        merge_with_scaling: merge s·B·A, which the forward pass adds, instead of B·A (relora).
        adapter_start: "kaiming" draws A and sets B to zero; "zero" sets both to zero until the
            first merge.
        lora_rank: r, of adapters, projectors or factors.
        lora_alpha: scaling s = lora_alpha / lora_rank (relora, lora, sltrain).
        lora_dropout: on the input of the adapters.
        projection_scale: α of galore, fira and apollo, see `ProjectedAdamW`.
        sparsity: δ, the share of entries that the sparse part of a weight has (sltrain).
        target_modules: the linear layers that are frozen and adapted, have an optimizer of their
            own, or are factors.
        log_every: optimizer steps between logged losses, each a mean over these steps.
        evaluate_every: optimizer steps between validation losses.
        record_every: optimizer steps between records of the recorder.
        save_every: optimizer steps between checkpoints; the last step is saved too.

    Raises:
        DynamicsError: a field has a value that it cannot have, or two fields contradict each
            other.

    Example:
        >>> from dataclasses import replace
        >>> from probes.relora import micro
        >>> config = replace(micro(), lora_rank=4)
        >>> config.method, config.scaling, config.sequences_per_step
        ('relora', 4.0, 16)
    """

    method: str
    seed: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    sequence_length: int
    dataset: str | None = None
    tokenizer: str | None = None
    validation_sequences: int = 256
    max_steps: int
    batch_size: int
    gradient_accumulation_steps: int
    precision: str = "float32"
    learning_rate: float
    other_learning_rate: float = 0.0
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    restart_warmup_steps: int
    min_lr_ratio: float = 0.1
    reset_every: int
    optimizer_reset: str = "drop"
    prune_ratio: float = 0.99
    shared_prune_mask: bool = True
    merge_with_scaling: bool = True
    adapter_start: str = "kaiming"
    lora_rank: int
    lora_alpha: float
    lora_dropout: float = 0.1
    projection_scale: float = 0.25
    sparsity: float = 0.03
    target_modules: tuple[str, ...] = TARGET_MODULES
    log_every: int
    evaluate_every: int
    record_every: int
    save_every: int

    def __post_init__(self) -> None:
        """Refuse values that cannot train, or that would train something other than they say.

        Raises:
            DynamicsError: names the field, its value, and what it must be.
        """
        self._require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        self._require(0 <= self.seed < 2**32, "seed", "between 0 and 2^32 - 1")
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "vocab_size",
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "reset_every",
            "lora_rank",
            "log_every",
            "evaluate_every",
            "record_every",
            "save_every",
        ):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "weight_decay",
            "other_learning_rate",
            "max_grad_norm",
            "validation_sequences",
            "warmup_steps",
            "restart_warmup_steps",
        ):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("learning_rate", "lora_alpha", "projection_scale"):
            self._require(getattr(self, name) > 0, name, "greater than 0")
        for name, words in (
            ("precision", PRECISIONS),
            ("optimizer_reset", RESET_MODES),
            ("adapter_start", ADAPTER_STARTS),
        ):
            self._require(getattr(self, name) in words, name, f"one of {', '.join(words)}")
        self._require(0 <= self.prune_ratio <= 1, "prune_ratio", "between 0 and 1")
        self._require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "between 0 and 1")
        self._require(0 < self.sparsity <= 1, "sparsity", "greater than 0 and at most 1")
        self._require(0 <= self.lora_dropout < 1, "lora_dropout", "at least 0 and below 1")
        # A sequence of one token predicts nothing.
        self._require(self.sequence_length >= 2, "sequence_length", "at least 2")
        # Rotary embeddings turn pairs of a head's dimensions.
        self._require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "hidden_size",
            f"a multiple of 2 · num_heads = {2 * self.num_heads}",
        )
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_heads = {self.num_heads}",
        )
        self._require(
            self.warmup_steps <= self.max_steps,
            "warmup_steps",
            f"at most max_steps = {self.max_steps}",
        )
        if self.method == "galore":
            # It decays every direction, and the rank bound would be lost.
            self._require(self.weight_decay == 0, "weight_decay", "0 with method galore")
        if self.method == "relora":
            # A merge during a ramp would cut the ramp off: the rate would never come back up.
            self._require(
                self.warmup_steps <= self.reset_every,
                "warmup_steps",
                f"at most reset_every = {self.reset_every}, so that it ends before the first merge",
            )
            self._require(
                self.restart_warmup_steps < self.reset_every,
                "restart_warmup_steps",
                f"below reset_every = {self.reset_every}",
            )
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        self._require(
            bool(self.target_modules) and not unknown,
            "target_modules",
            f"one or more of {', '.join(TARGET_MODULES)}",
        )

    @property
    def scaling(self) -> float:
        """The factor of B·A in the effective weight, s = lora_alpha / lora_rank."""
        return self.lora_alpha / self.lora_rank

    @property
    def adapted(self) -> bool:
        """Whether the run trains adapters on frozen weights."""
        return self.method in ADAPTED

    @property
    def factored(self) -> bool:
        """Whether the run has other layers in the place of the linear ones that it targets."""
        return self.method in FACTORED

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step consumes."""
        return self.batch_size * self.gradient_accumulation_steps

    def _require(self, satisfied: bool, name: str, expected: str) -> None:
        if not satisfied:
            raise DynamicsError(
                f"TrainConfig.{name} is {getattr(self, name)!r}; it must be {expected}."
            )
