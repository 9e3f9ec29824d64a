"""Parts of fused matrices: those that the real models compute with, and none that is a guess."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import dynamics as dy
from dynamics.components import COMPONENTS
from dynamics.errors import MissingError
from dynamics.formats.recording import RecordingRun
from dynamics.runs.fused import Part, kept_whole, split_fused
from dynamics.runs.matrix_cache import CachedRun
from dynamics.runs.parameter_names import matches, module_of
from dynamics.runs.run import Dense, Factored

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDTH, HEADS = 16, 4
HUGGING_FACE = {
    "vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "pad_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 40, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS}

# name of the test -> (class, config)
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
    "imagegpt": ("ImageGPTForCausalImageModeling", GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT),
    "gpt_bigcode, per head": ("GPTBigCodeForCausalLM", GPT | {"multi_query": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", HUGGING_FACE),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        HUGGING_FACE | {"intermediate_multiple_size": 2},
    ),
    "bloom": ("BloomForCausalLM", HUGGING_FACE | {"n_head": HEADS, "n_layer": 2}),
    "falcon, one key": ("FalconForCausalLM", HUGGING_FACE),
    "falcon, per head": ("FalconForCausalLM", HUGGING_FACE | {"multi_query": False}),
    "falcon, new": (
        "FalconForCausalLM",
        HUGGING_FACE | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "persimmon": ("PersimmonForCausalLM", HUGGING_FACE | {"qk_layernorm": False}),
    "phi3": ("Phi3ForCausalLM", HUGGING_FACE | {"num_key_value_heads": 2}),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 2}),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": 40, "d_model": WIDTH, "n_heads": HEADS, "n_layers": 2},
    ),
    "modernbert": ("ModernBertForMaskedLM", HUGGING_FACE),
}
GATED = {
    "glm": ("GlmForCausalLM", HUGGING_FACE | {"num_key_value_heads": 2, "head_dim": 4}),
    "glm4": ("Glm4ForCausalLM", HUGGING_FACE | {"num_key_value_heads": 2, "head_dim": 4}),
}  # fmt: skip
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
OUTPUT = ("c_proj", "dense", "out_proj", "o_proj", "Wo")


def build(family, **more):
    """A float64 model with large random weights and without biases, which no matrix shows."""
    torch.manual_seed(0)
    name, settings = (FAMILIES | GATED)[family]
    made = getattr(transformers, name)
    config = made.config_class(**(settings | more), attn_implementation="eager")
    model = made(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 2 else None
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.endswith("bias") else None
    return model


def attentions(model):
    """Path -> attention module, each with its fused matrix and its output projection."""
    found = {}
    for path, module in model.named_modules():
        fused = [(name, each) for name, each in module.named_children() if name in FUSED]
        if fused:
            ((name, matrix),) = fused
            output = next(each for name, each in module.named_children() if name in OUTPUT)
            found[path] = SimpleNamespace(module=module, name=name, fused=matrix, output=output)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family): (model, its checkpoint, opened and split)."""
    made = {}

    def get(family):
        if family not in made:
            model = build(family)
            directory = tmp_path_factory.mktemp("family")
            model.save_pretrained(directory / "checkpoint-1")
            made[family] = model, split_fused(dy.open_run(directory))
        return made[family]

    return get


def computed(model, monkeypatch, tokens):
    """Path of each attention -> what the running model computes in it.

    `x` is its input, `q`, `k` and `v` are (heads, tokens, head_dim) as its forward has them,
    `written` is what its output projection gives.
    """
    found = {path: SimpleNamespace() for path in attentions(model)}

    def keep(path, q, k, v):
        if model.config.model_type == "openai-gpt":
            k = k.transpose(-1, -2)  # as the scores need it
        for name, each in zip("qkv", (q, k, v), strict=True):
            setattr(found[path], name, each[0].detach().numpy())

    def before(function, path):
        def call(*args, **kwargs):
            keep(path, *args[:3])
            return function(*args, **kwargs)

        return call

    def after(function, path, transposed):
        def call(*args, **kwargs):
            parts = function(*args, **kwargs)
            keep(path, *(part.transpose(1, 2) if transposed else part for part in parts))
            return parts

        return call

    interface, eager = transformers.modeling_utils.AttentionInterface, {}

    def get_interface(self, implementation, default):
        def call(module, q, k, v, *args, **kwargs):
            keep(eager[module], q, k, v)
            return default(module, q, k, v, *args, **kwargs)

        return call

    monkeypatch.setattr(interface, "get_interface", get_interface)
    handles = []
    for path, each in attentions(model).items():
        module, eager[each.module] = each.module, path
        if hasattr(module, "_attn"):
            monkeypatch.setattr(module, "_attn", before(module._attn, path))
        elif hasattr(module, "_reshape"):  # BLOOM
            monkeypatch.setattr(module, "_reshape", after(module._reshape, path, False))
        elif model.config.model_type == "falcon":
            monkeypatch.setattr(module, "_split_heads", after(module._split_heads, path, True))
        handles += [
            each.fused.register_forward_hook(
                lambda _, args, out, path=path: vars(found[path]).update(
                    x=args[0].detach().numpy()[0], fused=out
                )
            ),
            each.output.register_forward_hook(
                lambda _, args, out, path=path: vars(found[path]).update(
                    written=out.detach().numpy()[0]
                )
            ),
        ]
    if model.config.model_type == "mpt":  # its chunks are in no function of their own
        chunk = torch.Tensor.chunk

        def chunked(tensor, *args, **kwargs):
            parts = chunk(tensor, *args, **kwargs)
            for path, each in found.items():
                if getattr(each, "fused", None) is tensor:
                    heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
                    keep(path, *heads)
            return parts

        monkeypatch.setattr(torch.Tensor, "chunk", chunked)
    with torch.no_grad():
        done = model(torch.tensor([tokens]), output_attentions=True)
    monkeypatch.undo()
    for handle in handles:
        handle.remove()
    for each, pattern in zip(found.values(), done.attentions, strict=True):
        each.pattern = pattern[0].numpy()
    return found


def weight(run, name):
    found = run.read(name, 1, "weight")
    assert isinstance(found, Dense)
    return found.values


# What the forward computes with ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_what_the_forward_projects_with(family, saved, monkeypatch):
    model, run = saved(family)
    paths = attentions(model)
    assert len(paths) == 2
    # One token: at position 0 rotary embeddings turn nothing. Some families have them in float32.
    for path, seen in computed(model, monkeypatch, [7]).items():
        for letter in "qkv":
            name = f"{path}.{paths[path].name}.{letter}_proj.weight"
            part = weight(run, name)
            outputs = seen.x @ (part if run.matrices[name].axis == 1 else part.T)
            heads = getattr(seen, letter)[:, 0]
            if outputs.size < heads.size:  # grouped: Falcon hands them out to the query heads
                groups = outputs.size // heads.shape[-1]
                heads = heads[:: heads.shape[0] // groups]
            np.testing.assert_allclose(outputs.ravel(), heads.ravel(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_number_is_in_one_part(family, saved):
    model, run = saved(family)
    whole = {name: each.detach().numpy() for name, each in model.named_parameters()}
    parts = {}
    for info in run.matrices.values():
        if isinstance(info, Part):
            parts.setdefault(info.fused, []).append(info)
    assert parts
    for fused, each in parts.items():
        index = np.concatenate([part.index for part in each])
        np.testing.assert_array_equal(np.sort(index), np.arange(whole[fused].shape[each[0].axis]))
        for part in each:
            assert (part.rows, part.cols) == weight(run, part.name).shape
            assert part.name == fused.replace(".weight", f".{part.module}.weight")
            assert part.module == module_of(part.name)
            assert matches(part.name, f"*{part.module}")
        stacked = np.concatenate([weight(run, part.name) for part in each], axis=each[0].axis)
        expected = whole[fused].take(index, axis=each[0].axis)
        np.testing.assert_array_equal(stacked, expected)


@pytest.mark.parametrize("family", ["phi3", "glm", "glm4", "modernbert"])
def test_gate_and_up_are_what_the_mlp_computes_with(family, saved):
    model, run = saved(family)
    mlp = model.get_submodule("model.layers.1.mlp")
    fused, down = ("Wi", "Wo") if family == "modernbert" else ("gate_up_proj", "down_proj")
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    gate, up = (
        torch.tensor(weight(run, f"model.layers.1.mlp.{fused}.{part}_proj.weight"))
        for part in ("gate", "up")
    )
    act = mlp.act if family == "modernbert" else mlp.activation_fn
    with torch.no_grad():
        expected, found = mlp(x), getattr(mlp, down)(act(x @ gate.T) * (x @ up.T))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-10, atol=1e-12)


def test_cross_attention_of_gpt2_has_keys_and_values(tmp_path):
    model = build("gpt2", add_cross_attention=True)
    model.save_pretrained(tmp_path / "checkpoint-1")
    run = split_fused(dy.open_run(tmp_path))
    cross = model.transformer.h[1].crossattention
    states, x = torch.randn(2, 1, 3, WIDTH, dtype=torch.float64)
    seen = {}
    cross.c_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    with torch.no_grad():
        _, pattern = cross(x, encoder_hidden_states=states, output_attentions=True)[:2]
    name = "transformer.h.1.crossattention.c_attn.{}_proj.weight"
    k, v = (torch.tensor(weight(run, name.format(letter))) for letter in "kv")
    q = torch.tensor(weight(run, "transformer.h.1.crossattention.q_attn.weight"))
    for head in range(HEADS):
        own = slice(head * 4, head * 4 + 4)
        scores = (x[0] @ q[:, own]) @ (states[0] @ k[:, own]).T / 2
        torch.testing.assert_close(scores.softmax(-1), pattern[0, head])
        written = pattern[0, head] @ states[0] @ v[:, own]
        torch.testing.assert_close(written, seen["heads"][0][:, own])


# Circuits ----------------------------------------------------------------------------------------


def circuit(run, component, path, head):
    readers = {info.name: read for info, read in COMPONENTS[component](run)}
    return readers[f"{path}.{component}.{head}"](1, "weight").product()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_write_the_sum_of_their_ov_circuits(family, saved, monkeypatch):
    model, run = saved(family)
    for path, seen in computed(model, monkeypatch, [7, 3, 11, 5, 2]).items():
        expected = sum(
            seen.pattern[head] @ seen.x @ circuit(run, "ov_circuit", path, head).T
            for head in range(HEADS)
        )
        assert np.abs(expected).max() > 0.1
        assert np.ptp(seen.pattern, axis=0).max() > 0.01  # heads that one can tell apart
        # Patterns come from a softmax in float32 in some families.
        np.testing.assert_allclose(seen.written, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_score_with_their_qk_circuits(family, saved, monkeypatch):
    model, run = saved(family)
    for path, seen in computed(model, monkeypatch, [7]).items():
        for head in range(HEADS):
            key = seen.k[head // (HEADS // seen.k.shape[0]), 0]
            expected = seen.q[head, 0] @ key
            found = seen.x[0] @ circuit(run, "qk_circuit", path, head) @ seen.x[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pico_circuits_of_gpt2_are_made_of_the_transposed_weights(saved):
    model, run = saved("gpt2")
    (info, read), *_ = COMPONENTS["pico_ov_circuit"](run)
    attention = model.transformer.h[0].attn
    value = attention.c_attn.weight.detach().numpy()[:, 2 * WIDTH :].T
    output = attention.c_proj.weight.detach().numpy().T
    expected = [value[h * 4 : h * 4 + 4] @ output[:, h * 4 : h * 4 + 4] for h in range(HEADS)]
    assert info.name == "transformer.h.0.attn.pico_ov_circuit"
    np.testing.assert_allclose(read(1, "weight").product(), np.hstack(expected), rtol=1e-10)


def write(directory, tensors, config=None):
    (directory / "checkpoint-1").mkdir(parents=True)
    save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()},
              directory / "checkpoint-1/model.safetensors")  # fmt: skip
    if config is not None:
        (directory / "checkpoint-1/config.json").write_text(json.dumps(config))
    return split_fused(dy.open_run(directory))


def test_nanogpt_has_the_circuits_of_the_gpt2_that_it_loads(saved, tmp_path):
    model, run = saved("gpt2")
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # as its from_pretrained does
    tensors = {
        name: each.detach().numpy().T if name.endswith(transposed) else each.detach().numpy()
        for name, each in model.named_parameters()
    }
    nano = write(tmp_path, tensors, {"n_head": HEADS, "n_embd": WIDTH, "n_layer": 2})
    assert nano.matrices["transformer.h.0.attn.c_attn.k_proj.weight"].axis == 0
    assert run.matrices["transformer.h.0.attn.c_attn.k_proj.weight"].axis == 1
    for component in ("ov_circuit", "qk_circuit"):
        for path in attentions(model):
            expected = circuit(run, component, path, 2)
            np.testing.assert_array_equal(circuit(nano, component, path, 2), expected)


# Never a guess -----------------------------------------------------------------------------------

C_ATTN = {"transformer.h.0.attn.c_attn.weight": np.ones((3 * WIDTH, WIDTH))}
C_ATTN |= {"transformer.h.0.attn.c_proj.weight": np.ones((WIDTH, WIDTH))}
CONV1D = {name: each.T for name, each in C_ATTN.items()}
NEOX = {"gpt_neox.layers.0.attention.query_key_value.weight": np.ones((3 * WIDTH, WIDTH))}
SHAPE = {"n_embd": WIDTH, "n_head": HEADS}


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (C_ATTN, None, r"no model config, .* of transformer\.h\.0\.attn\.c_attn.*config\.json"),
        (NEOX, None, "no model config"),
        ({"h.0.attn.Wqkv.weight": np.ones((WIDTH, 3 * WIDTH))}, None, "no model config"),
        (NEOX, SHAPE, "model of type '' is not known; known: gpt_neox"),
        (NEOX, SHAPE | {"model_type": "bloom"}, "model of type 'bloom' is not known"),
        (NEOX, SHAPE | {"model_type": "gpt_neox", "n_head": 5}, "not a multiple of 5 heads"),
        (NEOX, {"model_type": "gpt_neox"}, "none of num_attention_heads"),
        (NEOX, SHAPE | {"model_type": "gpt_neox", "n_embd": 32}, "which its model config"),
        (C_ATTN, SHAPE | {"model_type": "gpt_bigcode"}, "config contradicts .*, 1 key-val"),
        (C_ATTN, SHAPE | {"model_type": "qwen"}, "type 'qwen' is not known; known: gpt2"),
        (C_ATTN, SHAPE | {"n_embd": 48}, "contradicts"),
        (CONV1D, SHAPE | {"model_type": "our_own"}, "type 'our_own' is not known; known: gpt2"),
        (CONV1D, SHAPE | {"model_type": "gpt2", "n_embd": 32}, "contradicts"),
        ({"layers.0.attention.wqkv.weight": np.ones((48, 16))}, SHAPE, "No arrangement of layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_stays_whole_and_says_why(tensors, config, reason, tmp_path):
    run = write(tmp_path, tensors, config)
    ((name, why),) = kept_whole(run).items()
    assert name in tensors
    assert run.matrices[name].module == "qkv_proj"
    np.testing.assert_array_equal(run.read(name, 1, "weight").values, tensors[name])
    assert "\n" not in why
    with pytest.raises(MissingError, match=reason) as caught:
        COMPONENTS["qk_circuit"](run)
    assert why in str(caught.value)


def test_heads_of_another_width_than_the_config_says_stay_whole(tmp_path):
    # A mixture of queries and shared keys whose rows happen to be a multiple of three.
    tensors = {"transformer.h.0.attn.c_attn.weight": np.ones((WIDTH + 2 * 4, WIDTH))}
    assert "contradicts" in str(kept_whole(write(tmp_path, tensors, SHAPE)))


def test_without_a_config_the_shape_tells_gpt2s_conv1d(tmp_path):
    stored = np.arange(3 * WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, 3 * WIDTH)
    run = write(tmp_path, {"transformer.h.0.attn.c_attn.weight": stored})
    name = "transformer.h.0.attn.c_attn.v_proj.weight"
    np.testing.assert_array_equal(weight(run, name), stored[:, 2 * WIDTH :])


# The run around it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "target", "path"),
    [
        ("gpt2", "c_attn", "transformer.h.1.attn.c_attn"),
        ("phi3", "qkv_proj", "model.layers.1.self_attn.qkv_proj"),
        ("gpt_neox", "query_key_value", "gpt_neox.layers.1.attention.query_key_value"),
    ],
)
def test_parts_of_adapters_keep_their_rank_and_add_up(family, target, path, tmp_path):
    peft = pytest.importorskip("peft")
    build(family).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[target], fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_() if "lora_" in name else None
    model.save_pretrained(tmp_path / "checkpoint-1")
    layer = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        delta = layer.get_delta_weight("default").numpy()
        merged = model.merge_and_unload().get_submodule(path).weight.numpy()
    run = split_fused(dy.open_run(tmp_path))
    for letter in "qkv":
        info = run.matrices[f"{path}.{letter}_proj.weight"]
        adapter = run.read(info.name, 1, "adapter")
        assert isinstance(adapter, Factored)
        assert adapter.rank_bound == 2
        expected = delta.take(info.index, axis=info.axis)
        np.testing.assert_allclose(adapter.product(), expected, rtol=1e-5, atol=1e-6)
        base, now = (run.read(info.name, 1, kind).values for kind in ("base", "weight"))
        np.testing.assert_allclose(now, merged.take(info.index, axis=info.axis), rtol=1e-5,
                                   atol=1e-6)  # fmt: skip
        np.testing.assert_allclose(base + adapter.product(), now, rtol=1e-5, atol=1e-6)


FUSED_SHAPES = {
    "transformer.h.0.attn.c_attn.weight": (8, 24),
    "transformer.h.0.attn.c_proj.weight": (8, 8),
    "transformer.h.0.mlp.c_fc.weight": (8, 32),
}


@pytest.fixture
def recorded(write_recording, tmp_path):
    """A recording with a fused matrix, as the format reads it: not split."""
    return RecordingRun(write_recording(tmp_path / "a.zarr", shapes=FUSED_SHAPES, merges=(10,)))


def test_a_recordings_gradients_and_updates_are_split_alike(recorded):
    fused, run = "transformer.h.0.attn.c_attn.weight", split_fused(recorded)
    assert fused not in run.matrices
    for kind in ("weight", "gradient"):
        whole = recorded.read(fused, 20, kind).values
        for start, letter in zip((0, 8, 16), "qkv", strict=True):
            part = run.read(f"transformer.h.0.attn.c_attn.{letter}_proj.weight", 20, kind)
            np.testing.assert_array_equal(part.values, whole[:, start : start + 8])
            assert part.dtype == "float32"
    name = "transformer.h.0.attn.c_attn.k_proj.weight"
    assert run.read(name, 0, "gradient") is recorded.read(fused, 0, "gradient") is None
    measured = dy.analyze(run).sel(matrix=name, kind="update", step=20)
    now, before = (recorded.read(fused, step, "weight").values[:, 8:16] for step in (20, 10))
    expected = np.linalg.svd(now.astype(np.float64) - before, compute_uv=False)
    np.testing.assert_allclose(measured["singular_value"], expected, rtol=1e-10)
    assert str(measured["module"].values) == "k_proj"


def test_unfused_matrices_are_those_of_the_run_itself(recorded):
    run = split_fused(recorded)
    for name in ("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight"):
        assert run.matrices[name] == recorded.matrices[name]
        expected = recorded.read(name, 10, "weight").values
        np.testing.assert_array_equal(run.read(name, 10, "weight").values, expected)
        assert run.origin(name, 10, "weight") == recorded.origin(name, 10, "weight")


def test_a_split_run_and_one_with_nothing_fused_are_left_alone(recorded, write_recording, tmp_path):
    run = split_fused(recorded)
    assert split_fused(run) is run
    plain = RecordingRun(write_recording(tmp_path / "plain.zarr"))
    assert split_fused(plain) is plain
    assert kept_whole(run) == kept_whole(plain) == kept_whole(recorded) == {}


def test_the_parts_of_a_matrix_are_read_at_once(recorded, monkeypatch):
    fused, calls, read = "transformer.h.0.attn.c_attn", [], recorded.read

    def counted(*asked):
        calls.append(asked)
        return read(*asked)

    monkeypatch.setattr(recorded, "read", counted)
    run = CachedRun(split_fused(recorded))
    for letter in "qkv":
        for step in (0, 10, 20):
            run.read(f"{fused}.{letter}_proj.weight", step, "weight")
    assert calls == [(f"{fused}.weight", step, "weight") for step in (0, 10, 20)]


def test_an_audit_reads_a_fused_matrix_once(recorded, monkeypatch):
    calls, read = [], recorded.read
    monkeypatch.setattr(recorded, "read", lambda *asked: calls.append(asked) or read(*asked))
    dy.audit(split_fused(recorded))
    assert len(calls) == len(set(calls)) == 3 * 3 * 2  # stored matrices, steps, kinds


def test_parts_have_origins_of_their_own(recorded, monkeypatch):
    monkeypatch.setattr(recorded, "origin", lambda name, step, kind: f"{name}@{step}")
    run = split_fused(recorded)
    names = [f"transformer.h.0.attn.c_attn.{letter}_proj.weight" for letter in "qkv"]
    origins = {run.origin(name, step, "weight") for name in names for step in (0, 10)}
    assert len(origins) == 6
    assert all(each.startswith("transformer.h.0.attn.c_attn.weight@") for each in origins)
    monkeypatch.setattr(recorded, "origin", lambda *_: None)
    assert run.origin(names[0], 0, "weight") is None


def test_merges_into_the_whole_are_merges_into_each_part(recorded, monkeypatch):
    counts = {"transformer.h.0.attn.c_attn.weight": 3, "transformer.h.0.attn.c_proj.weight": 1}
    monkeypatch.setattr(recorded, "merges_between", lambda name, before, now: counts[name])
    run = split_fused(recorded)
    assert run.merges_between("transformer.h.0.attn.c_attn.k_proj.weight", 0, 20) == 3
    assert run.merges_between("transformer.h.0.attn.c_proj.weight", 0, 20) == 1


def test_circuits_of_an_unsplit_run_say_how_to_split_it(recorded):
    with pytest.raises(MissingError, match=r"c_attn.weight.*apart\. Open it with split_fused=True"):
        COMPONENTS["ov_circuit"](recorded)
