"""The reproduction note's numbers: rounding gives the published update curves."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CURVES = ROOT.parent / "shared" / "paper" / "curves.csv"


@pytest.fixture(scope="module")
def reproduction():
    spec = importlib.util.spec_from_file_location("reproduction", ROOT / "docs" / "reproduction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_stored_in_bfloat16_a_rank_16_product_exceeds_its_bound_and_measured_above_the_floor_not(
    reproduction,
):
    found = reproduction.simulate((384, 1536), runs=1)
    bound = 16 / 384
    assert found.per_stored > bound > found.per_above_floor
    assert found.per_above_floor == pytest.approx(found.per_exact, rel=1e-3)
    assert found.numerical_rank == 16
    assert found.condition_number_stored > 1000 * found.condition_number_above_floor


@pytest.mark.slow
@pytest.mark.skipif(not CURVES.is_file(), reason="the published curves are not beside the project")
@pytest.mark.parametrize("component", ["attention.v_proj", "attention.o_proj", "swiglu.w_2"])
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_simulated_rounding_is_near_the_published_end_values(reproduction, component, scale):
    published = reproduction.published(CURVES)
    found = reproduction.simulate(reproduction.SHAPES[component, scale], runs=1)
    assert found.per_stored == pytest.approx(published["per", component, scale], rel=0.05)
    # A square matrix of noise has a heavy-tailed condition number; the order of magnitude counts.
    tolerance = 10 if component == "attention.o_proj" else 1.5
    ratio = found.condition_number_stored / published["condition_number", component, scale]
    assert 1 / tolerance <= ratio <= tolerance


def test_the_rank_of_another_study_is_full_where_ours_is_that_of_the_update(reproduction):
    sizes = {share: reproduction.study(share, size=128, rank=4) for share in (1, 0.01)}
    for found in sizes.values():
        assert [each["study_rank"] for each in found.values()] == [128, 128]
        assert [each["numerical_rank"] for each in found.values()] == [4, 4]
        assert found["float32"]["study_effective_rank"] < 4.01
    assert sizes[0.01]["bfloat16"]["study_effective_rank"] > 20
    assert [found["bfloat16"]["study_count_above_0_1"] for found in sizes.values()] == [4, 0]
