"""Families of models: a recording holds the matrices of the files that save_pretrained writes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

import dynamics as dy
from dynamics.runs.account import Account
from dynamics.runs.stacks import parts_of
from probes import Recorder

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "moe_intermediate_size": 12, "num_experts_per_tok": 2, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
IMAGE_SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 3}
ENCODER_DECODER = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_source_positions": 8, "max_target_positions": 16,
}  # fmt: skip
DEEPSEEK = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip

# class -> (config, inputs)
FAMILIES = {
    "LlamaForCausalLM": (SIZES, TOKENS),
    "GPT2LMHeadModel": ({"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, TOKENS),
    "GPTNeoXForCausalLM": ({**SIZES, "num_key_value_heads": None}, TOKENS),
    "MixtralForCausalLM": (SIZES, TOKENS),
    "PhimoeForCausalLM": (SIZES, TOKENS),
    "Qwen2MoeForCausalLM": ({**SIZES, "shared_expert_intermediate_size": 20}, TOKENS),
    "Qwen3MoeForCausalLM": (SIZES, TOKENS),
    "DeepseekV3ForCausalLM": ({**SIZES, **DEEPSEEK, "num_key_value_heads": 4}, TOKENS),
    "GraniteMoeForCausalLM": (SIZES, TOKENS),
    "GptOssForCausalLM": (SIZES, TOKENS),
    # a layer with experts and a dense one
    "Llama4ForCausalLM": (
        {**SIZES, "num_hidden_layers": 2, "moe_layers": [0], "intermediate_size_mlp": 20},
        TOKENS,
    ),
    "BertForMaskedLM": ({**SIZES, "max_position_embeddings": 16}, TOKENS),
    "T5ForConditionalGeneration": (ENCODER_DECODER, TOKENS),
    "BartForConditionalGeneration": (ENCODER_DECODER, TOKENS),
    "MambaForCausalLM": ({**SIZES, "state_size": 4, "tie_word_embeddings": True}, TOKENS),
    "ViTForImageClassification": ({**SIZES, **IMAGE_SIZES}, IMAGES),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        IMAGES,
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        IMAGES,
    ),
}  # fmt: skip


def tiny(family):
    torch.manual_seed(0)
    made = getattr(transformers, family)
    accepted = {key: value for key, value in FAMILIES[family][0].items() if value is not None}
    text_only = family == "Llama4ForCausalLM"  # its config_class is that of the multimodal model
    config_class = transformers.Llama4TextConfig if text_only else made.config_class
    return made(config_class(**accepted))


def trained(family, store=None, steps=2):
    model, inputs = tiny(family), FAMILIES[family][1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, store, every=1).attach() if store else None
    for _ in range(steps):
        output = model(**inputs)
        loss = output.loss if output.loss is not None else output.logits.square().mean()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    if recorder:
        recorder.close()
    return model, gradients, recorder


def matrices(tensors, config):
    found = {}
    for name, tensor in tensors.items():
        parts = parts_of(name, tuple(tensor.shape), config)
        if not isinstance(parts, str):
            found |= {part.name: part.of(tensor) for part in parts}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_has_the_matrices_of_the_files_bit_for_bit(family, tmp_path):
    model, gradients, recorder = trained(family, tmp_path / "run.zarr")
    plain, *_ = trained(family)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    model.save_pretrained(tmp_path / "saved")
    config = model.config.to_dict()
    weights = matrices(load_file(tmp_path / "saved/model.safetensors"), config)
    # transformers itself turns gradients into tensors with the names of the files.
    consumed = matrices(revert_weight_conversion(model, gradients), config)
    run = dy.open_run(tmp_path / "run.zarr", split_fused=False)
    tied = set(run.matrices) - set(weights)  # written under their other name alone
    assert all("decoder.weight" in name or "shared" in name or "embed" in name for name in tied)
    assert set(weights) <= set(run.matrices)
    for kind, expected in (("weight", weights), ("gradient", consumed)):
        assert expected
        for name, matrix in expected.items():
            assert torch.equal(torch.from_numpy(run.read(name, 2, kind).values), matrix)
    measured = sum(each.rows * each.cols for each in run.matrices.values())
    assert measured == recorder.account.numbers
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == measured + sum(each.numbers for each in recorder.account.left_out)
    assert run.account == recorder.account
    assert run.account == Account.from_json(run.attrs["account"])
    assert run.account.unchosen_share() == 0
