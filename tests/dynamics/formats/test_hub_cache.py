import shutil

import numpy as np
import pytest

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.writers.hub_cache import Cache

pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def cache(tiny_llama, tmp_path):
    """cache(refs, seed=0, **config): (the cache, the model that the refs stand for)."""
    made = Cache(tmp_path / "hub")

    def add(*refs, seed=0, **options):
        model = tiny_llama(seed, num_hidden_layers=1)
        saved = tmp_path / f"saved-{seed}"
        model.save_pretrained(saved, **options)
        made.snapshot = made.add(refs, saved)
        return made, matrices(model)

    return add


def matrices(model):
    return {name: each.detach() for name, each in model.named_parameters() if each.ndim == 2}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=str)
def test_every_revision_with_a_step_is_one(cache, options):
    expected = {
        step: cache(ref, seed=seed, **options)[1]
        for seed, (ref, step) in enumerate(
            [
                ("step1000", 1000),
                ("step20-tokens4B", 20),
                ("stage1-step3000-tokens13B", 3000),
                ("global_step7", 7),
                ("refs/convert/step_15", 15),
            ]
        )
    }
    made, _ = cache("main", seed=9)
    seen = huggingface_hub.scan_cache_dir(made.directory)
    assert seen.warnings == []
    (repository,) = seen.repos
    assert repository.repo_id == "org/suite"
    assert len(repository.revisions) == 6
    assert "refs/convert/step_15" in repository.refs

    run = dy.open_run(made.repository, split_fused=False)
    assert run.format == "hub_cache"
    assert run.steps.tolist() == sorted(expected)
    assert dict(run.problems) == {}
    assert run.attrs["config"]["hidden_size"] == 16
    for step, tensors in expected.items():
        assert_bits(run, step, tensors)


def test_it_is_measured(cache):
    _, first = cache("step1", seed=1)
    made, second = cache("step2", seed=2)
    analysis = dy.analyze(made.repository, metrics=["frobenius_norm"])
    name = "lm_head.weight"
    moved = np.linalg.norm((second[name].double() - first[name].double()).numpy())
    found = analysis["frobenius_norm"].sel(kind="update", step=2, matrix=name)
    np.testing.assert_allclose(float(found), moved, rtol=1e-12)


def test_a_model_without_steps_is_at_step_0(cache):
    made, model = cache("main")
    assert_bits(dy.open_run(made.repository), 0, model)
    shutil.rmtree(made.repository / "refs")  # as after a download by commit
    assert_bits(dy.open_run(made.repository), 0, model)


def test_one_snapshot_may_be_opened(cache):
    made, model = cache("step5")
    assert_bits(dy.open_run(made.snapshot), 0, model)


def test_refs_of_the_same_commit_and_step_are_one(cache):
    made, model = cache("step5", "stage1-step5")
    assert_bits(dy.open_run(made.repository), 5, model)


def test_two_models_of_one_step_are_refused(cache):
    cache("stage1-step5", seed=1)
    made, _ = cache("stage2-step5", seed=2)
    assert_refused(made.repository, "refs stage1-step5 and stage2-step5, both of step 5")


def test_several_models_without_steps_are_refused(cache):
    cache("main", seed=1)
    made, _ = cache("dev", seed=2)
    assert_refused(made.repository, r"2 snapshots with models and no ref with a step \(dev, main\)")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("0" * 40, "names the snapshot 0+, which is not in"),
        ("", "outside its directory: ''"),
        ("../../elsewhere", "outside its directory: '../../elsewhere'"),
        ("é" * 20, "does not hold a commit"),
        ("a" * 9999, "9999 bytes, too many for a commit"),
    ],
)
def test_a_damaged_ref_makes_its_step_a_problem(cache, content, match):
    cache("step1", seed=1)
    made, _ = cache("step2", seed=2)
    (made.repository / "refs/step2").write_text(content, encoding="utf-8")
    assert_problem(dy.open_run(made.repository), 2, match)


def test_a_revision_without_its_weights_is_a_problem(cache):
    cache("step1", seed=1)
    made, _ = cache("step2", seed=2)
    (made.snapshot / "model.safetensors").unlink()
    assert_problem(dy.open_run(made.repository), 2, r"holds no model\.safetensors")


def test_a_truncated_blob_is_a_problem(cache):
    cache("step1", seed=1)
    made, _ = cache("step2", seed=2)
    blob = (made.snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    assert_problem(dy.open_run(made.repository), 2, "truncated or damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leads_out_of_the_repository_is_refused(cache, tmp_path, name):
    cache("step1", seed=1)
    made, _ = cache("step2", seed=2)
    shutil.copy(made.snapshot / name, tmp_path / "outside")
    (made.snapshot / name).unlink()
    (made.snapshot / name).symlink_to(tmp_path / "outside")
    assert_problem(dy.open_run(made.repository), 2, "files outside of a run are not read")


def test_a_directory_of_another_kind_is_refused_when_forced(llama_checkpoints):
    assert_refused(llama_checkpoints, "cannot be read", format="hub_cache")
