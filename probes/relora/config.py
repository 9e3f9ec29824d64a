"""What one training run is: its method, model, schedule and data order."""

from dataclasses import dataclass

from dynamics.errors import DynamicsError

METHODS = ("full_rank", "relora", "lora")
PRECISIONS = ("float32", "bfloat16")
ADAPTER_STARTS = ("kaiming", "zero")
RESET_MODES = ("drop", "zero", "random_prune", "magnitude_prune")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Fields that mean nothing to a method: the twins of a sweep do not repeat a run for them.
RESTART_FIELDS = (
    "reset_every",
    "restart_warmup_steps",
    "optimizer_reset",
    "prune_ratio",
    "shared_prune_mask",
    "merge_with_scaling",
)
ADAPTER_FIELDS = (
    "min_lr_ratio",
    "adapter_start",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run, so that equal configs and data give equal weights.

    Two runs whose configs differ only in `method` are twins: they start from the same function
    and see the same batches in the same order. Variations come from `dataclasses.replace`, the
    sizes of the reference experiment from `probes.relora.presets`.

    Attributes:
        method: "full_rank", "relora" (Lialin et al. 2023, arXiv 2307.05695), or "lora": the same
            adapters, never merged.
        seed: of the weights, the adapters, the order of the data and the dropout.
        hidden_size: d_model.
        intermediate_size: width of the SwiGLU.
        num_layers: transformer layers.
        num_heads: query heads; head_dim = hidden_size / num_heads.
        num_kv_heads: key and value heads; several query heads share one.
        vocab_size: rows of the embedding.
        sequence_length: tokens per sequence.
        dataset: what it trains on where no text is given: a Hugging Face dataset by name, or a
            file or folder of tokens (see `open_tokens`); None is the built-in corpus.
        tokenizer: a tokenizer by name, or its tokenizer.json, that made a dataset's tokens; None
            where it is trained on the text, or not at hand.
        validation_sequences: held out for the validation loss: the first of a dataset, or at most
            5 % of a text.
        max_steps: optimizer steps.
        batch_size: sequences per forward pass, on all devices together.
        gradient_accumulation_steps: forward passes per optimizer step.
        precision: "float32", or "bfloat16": autocast, with parameters and moments in float32.
        learning_rate: peak; the schedule multiplies it.
        weight_decay: AdamW's, on all trainable parameters.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        warmup_steps: of the first linear warm-up.
        restart_warmup_steps: of the linear ramp after each merge (relora).
        min_lr_ratio: where the cosine ends (relora, lora); the full-rank decay ends at 0.
        reset_every: optimizer steps between merges (relora).
        optimizer_reset: what a merge does to the adapters' optimizer state (relora),
            see `reset_optimizer`.
        prune_ratio: share of the moments that the pruning resets empty (relora).
        shared_prune_mask: whether both moments lose the same entries (relora).
        merge_with_scaling: merge s·B·A, what the forward pass adds, and not B·A (relora).
        adapter_start: "kaiming" is A drawn and B zero; "zero" is both zero until the first merge.
        lora_rank: r.
        lora_alpha: scaling s = lora_alpha / lora_rank.
        lora_dropout: on the input of the adapters.
        target_modules: the linear layers that are frozen and adapted.
        log_every: optimizer steps between logged losses, each a mean over these steps.
        evaluate_every: optimizer steps between validation losses.
        record_every: optimizer steps between records of the recorder.
        save_every: optimizer steps between checkpoints; the last step is saved too.
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
    target_modules: tuple[str, ...] = TARGET_MODULES
    log_every: int
    evaluate_every: int
    record_every: int
    save_every: int

    def __post_init__(self) -> None:
        """Refuse what could not train, or would train something else than it says.

        Raises:
            DynamicsError: naming the field, what it is and what it must be.
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
            "max_grad_norm",
            "validation_sequences",
            "warmup_steps",
            "restart_warmup_steps",
        ):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("learning_rate", "lora_alpha"):
            self._require(getattr(self, name) > 0, name, "greater than 0")
        for name, words in (
            ("precision", PRECISIONS),
            ("optimizer_reset", RESET_MODES),
            ("adapter_start", ADAPTER_STARTS),
        ):
            self._require(getattr(self, name) in words, name, f"one of {', '.join(words)}")
        self._require(0 <= self.prune_ratio <= 1, "prune_ratio", "between 0 and 1")
        self._require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "between 0 and 1")
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
        if self.method == "relora":
            # A merge inside a ramp would cut it off and the rate would never get back up.
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
        return self.method != "full_rank"

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step consumes."""
        return self.batch_size * self.gradient_accumulation_steps

    def _require(self, satisfied: bool, name: str, expected: str) -> None:
        if not satisfied:
            raise DynamicsError(
                f"TrainConfig.{name} is {getattr(self, name)!r}; it must be {expected}."
            )
