"""The names that the files of a model will have, where those of the live model are others.

transformers keeps some models in memory under other names than in their files: Mixtral's router is
`mlp.gate` here and `block_sparse_moe.gate` there, GPT-NeoX's head is `lm_head` and `embed_out`. A
recording uses the names of the files, so that it lines up with checkpoints of the same run.
"""

import sys
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dynamics.runs import parameter_names


def saved_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Clean name of a parameter -> its name in files, where `save_pretrained` renames it.

    Only renamed tensors are listed, not those that are split or joined: see
    `dynamics.runs.stacks` for experts.

    Args:
        model: any module; the outermost model of transformers inside decides.
        shapes: clean name -> shape of the parameters.
    """
    found = _transformers_model(model)
    if found is None:
        return {}
    prefix, inner = found
    from transformers.core_model_loading import revert_weight_conversion

    names = [name for name in shapes if name.startswith(prefix)]
    tensors = {
        name.removeprefix(prefix): torch.empty(shapes[name], device="meta") for name in names
    }
    try:
        saved = revert_weight_conversion(inner, dict(tensors))
    except Exception:  # the model is quantised or unusual; its live names are right, too
        return {}
    # What is only renamed stays the same object.
    new = {id(tensor): prefix + name for name, tensor in saved.items()}
    renamed = {
        prefix + name: new.get(id(tensor), prefix + name) for name, tensor in tensors.items()
    }
    return {
        name: other for name, other in _without_collisions(renamed, shapes).items() if other != name
    }


def _without_collisions(renamed: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    after = [renamed.get(name, name) for name in names]
    return renamed if len(set(after)) == len(after) else {}


def _transformers_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(what its parameters' clean names begin with, the outermost model of transformers)."""
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for name, _ in module.named_parameters():
                inner = parameter_names.clean_name(name)
                whole = parameter_names.clean_name(f"{path}.{name}" if path else name)
                return (whole.removesuffix(inner), module) if whole.endswith(inner) else None
    return None
