"""Which layers a method has in the place of the linear ones that it targets."""

from torch import nn
from transformers import LlamaForCausalLM

from probes.relora.config import TrainConfig
from probes.relora.layers.cola import CoLALinear
from probes.relora.layers.sltrain import SLTrainLinear
from probes.relora.seeding import ADAPTERS, own_random_stream


def with_layers_of(config: TrainConfig, model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the layers of a method in the place of each of `target_modules`.

    The seed of the config decides their numbers; everything else stays as it is. Methods that train
    the linear layers themselves change nothing.

    Args:
        config: the run; `cola` and `sltrain` have layers of their own.
        model: from `build_model`; it is changed in place.
    """

    def made(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features
        if config.method == "cola":
            return CoLALinear(*shape, config.lora_rank)
        return SLTrainLinear(
            *shape, config.lora_rank, scaling=config.scaling, sparsity=config.sparsity
        )

    if not config.factored:
        return model
    if config.method == "sltrain":  # which readers of its checkpoints need
        model.config.sltrain = {
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "sparsity": config.sparsity,
        }
    with own_random_stream(config.seed, ADAPTERS, 0, module=model):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if name in config.target_modules and isinstance(child, nn.Linear):
                    setattr(module, name, made(child).to(child.weight))
    return model
