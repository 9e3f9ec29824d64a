"""Two processes: live values are shown once, by the one that records."""

import pytest
import torch

from tests.probes.live import live_ranks, reading
from tests.probes.live.test_trackers import in_float32
from tests.probes.live.training import expected
from tests.probes.torchrun import run_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of two processes, which check that training computes the same bits."""
    folder = tmp_path_factory.mktemp("live")
    run_two_ranks(live_ranks, folder)
    return folder


@pytest.mark.parametrize("stack", ["ddp", "fsdp"])
def test_rank_0_shows_the_values_of_analyze_and_rank_1_none(two_ranks, stack):
    shown, none = (torch.load(two_ranks / f"{stack}-{rank}.pt") for rank in (0, 1))
    assert list(shown) == [0, 1, 2, 3, 4]
    assert shown == expected(two_ranks / f"{stack}.zarr")
    assert none == {}


def test_the_trainers_tensorboard_has_the_values_once(two_ranks):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    values = expected(two_ranks / "trainer.zarr")
    assert reading.of_tensorboard(two_ranks / "trainer", "train/") == in_float32(values)


def test_lightnings_tensorboard_has_the_values_once(two_ranks):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    values = expected(two_ranks / "lightning/run.zarr")
    assert reading.of_tensorboard(two_ranks / "lightning/log") == in_float32(values)
