"""The shape of a model's attention, from the configuration that a run carries.

The same four numbers have different names in the config.json of Hugging Face, of pico-train and of
GPT-2. A spelling is one entry of `_SPELLINGS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamics.errors import DynamicsError, MissingError
from dynamics.runs import parameter_names

# Hugging Face first, then pico-train, then GPT-2 and its kin, GPT-Neo and T5, Meta's Llama.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "num_heads": ("num_attention_heads", "attention_n_heads", "n_heads", "n_head", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "attention_n_kv_heads", "n_kv_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size", "d_model", "n_embd", "dim"),
    "head_dim": ("head_dim", "d_kv"),
}
# Families in which one key-value head serves all query heads, unless `multi_query` is false. Other
# numbers of key-value heads in their config are then not used (but Falcon's new architecture does).
_MULTI_QUERY = ("falcon", "gpt_bigcode")
# Where a config keeps its language model: multimodal models, pico-train's training config.
_NESTED = ("text_config", "model")


@dataclass(frozen=True)
class Architecture:
    """The attention heads of a model.

    Attributes:
        num_heads: query heads of each layer.
        num_kv_heads: key-value heads of each layer, a divisor of `num_heads`.
        head_dim: width of a head.
        hidden_size: width of the residual stream, d_model.

    Raises:
        DynamicsError: a number is not positive, or `num_kv_heads` does not divide `num_heads`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DynamicsError(f"{name} is {value!r}, expected a positive integer.")
        if self.num_heads % self.num_kv_heads:
            raise DynamicsError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly."
            )

    def kv_head(self, head: int) -> int:
        """The key-value head that a query head uses: head // (num_heads / num_kv_heads).

        >>> [Architecture(4, 2, 8, 32).kv_head(head) for head in range(4)]
        [0, 0, 1, 1]
        """
        return head // (self.num_heads // self.num_kv_heads)

    def projection_shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the weight of q_proj, k_proj, v_proj or o_proj."""
        queries, values = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (values, self.hidden_size),
            "v_proj": (values, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
        }[module]


def read_architecture(attrs: Mapping[str, Any], where: str, stack: str = "") -> Architecture:
    """The architecture that a run's `attrs["config"]` states.

    Without a number of key-value heads, every query head has its own; without a `head_dim` it is
    hidden_size / num_heads.

    Args:
        attrs: `Run.attrs`.
        where: the run's path, for messages.
        stack: of `parameter_names.stack_of`, where a model has several with heads of their own.

    Raises:
        MissingError: there is no config, or one without a number of heads or a hidden size.
        DynamicsError: what it states is impossible.
    """
    config = attrs.get("config")
    if not isinstance(config, Mapping) or not config:
        raise MissingError(
            f"{where} has no model config, so its number of attention heads is unknown; "
            "put the model's config.json beside its weights."
        )
    inner = config.get(f"{stack}_config")
    config = inner if isinstance(inner, Mapping) else language_config(config)
    numbers = _numbers(config, stack)
    for name in ("num_heads", "hidden_size"):
        if name not in numbers:
            raise MissingError(
                f"The model config of {where} has none of {', '.join(_SPELLINGS[name])}; "
                f"without its {name} the matrices of its heads cannot be told apart."
            )
    num_heads, hidden_size = numbers["num_heads"], numbers["hidden_size"]
    try:
        given = Architecture(num_heads, numbers.get("num_kv_heads", num_heads), 1, hidden_size)
        if "head_dim" not in numbers and hidden_size % num_heads:
            raise DynamicsError(
                f"hidden_size {hidden_size} is not a multiple of {num_heads} heads, and no "
                "head_dim is given."
            )
        head_dim = numbers.get("head_dim", hidden_size // num_heads)
        return Architecture(given.num_heads, given.num_kv_heads, head_dim, given.hidden_size)
    except DynamicsError as error:
        raise DynamicsError(f"The model config of {where} is inconsistent: {error}") from None


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: the config itself, or one inside."""
    for inner in (config, *(config.get(nested) for nested in _NESTED)):
        if isinstance(inner, Mapping) and "num_heads" in _numbers(inner):
            return inner
    return config


def describes_a_model(config: Mapping[str, Any]) -> bool:
    """Whether a config says of which family a model is, or how many heads it has.

    >>> describes_a_model({"n_head": 2}), describes_a_model({"lr": 0.1, "batch_size": 8})
    (True, False)
    """
    return "model_type" in config or "num_heads" in _numbers(language_config(config))


def tied_aliases(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None
) -> set[str]:
    """The names of output embeddings that are the input embedding under a second name.

    The config says so with `tie_word_embeddings`: loading such a checkpoint discards a stored
    lm_head. A config that does not say so ties nothing here.

    Args:
        shapes: clean name -> shape of the stored tensors.
        config: `Run.attrs["config"]`.

    >>> shapes = {"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}
    >>> tied_aliases(shapes, {"tie_word_embeddings": True})
    {'lm_head.weight'}
    """
    config, key = config if isinstance(config, Mapping) else {}, "tie_word_embeddings"
    if config.get(key, language_config(config).get(key)) is not True:
        return set()
    modules = {name: parameter_names.module_of(name) for name in shapes if name.endswith(".weight")}
    inputs = {shapes[name] for name, module in modules.items() if module == "embed_tokens"}
    return {name for name, m in modules.items() if m == "lm_head" and shapes[name] in inputs}


def check_projections(
    architecture: Architecture, shapes: Mapping[str, tuple[int, int]], where: str
) -> None:
    """Refuse an architecture that the attention's weights contradict.

    Args:
        architecture: what the config states.
        shapes: clean name -> (out, in) of the q, k, v and o projections to be used.
        where: the run's path, for messages.

    Raises:
        DynamicsError: a weight has another shape than the config gives it.
    """
    for name, shape in shapes.items():
        expected = architecture.projection_shape(parameter_names.module_of(name))
        if tuple(shape) != expected:
            raise DynamicsError(
                f"{where} has {name} in shape {tuple(shape)}, but its model config says "
                f"{expected} ({architecture.num_heads} heads, {architecture.num_kv_heads} "
                f"key-value heads, head_dim {architecture.head_dim}, "
                f"hidden_size {architecture.hidden_size}); it is not this model's config."
            )


def _numbers(config: Mapping[str, Any], stack: str = "") -> dict[str, Any]:
    """What the config states, in our words: of one stack where it counts their heads apart."""
    numbers = {}
    own = config.get(f"{stack}_attention_heads")  # BART, Whisper: encoder_attention_heads, ...
    config = config if own is None else {**config, "num_attention_heads": own}
    for name, spellings in _SPELLINGS.items():
        given = [config[key] for key in spellings if config.get(key) is not None]
        if given:
            numbers[name] = given[0]
    if config.get("model_type") in _MULTI_QUERY and not config.get("new_decoder_architecture"):
        numbers.pop("num_kv_heads", None)
        if config.get("multi_query", True):
            numbers["num_kv_heads"] = 1
    return numbers
