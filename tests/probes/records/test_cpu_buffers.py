import pytest
import torch

from probes import Recorder
from probes.records.cpu_buffers import CpuBuffers
from tests.probes import training


def test_a_copy_stays_as_it_was_while_training_goes_on():
    buffers = CpuBuffers()
    weight = torch.arange(12.0).view(3, 4).T  # not contiguous
    copy = buffers.copy(weight)
    expected = weight.clone()
    weight.zero_()
    assert torch.equal(copy, expected)
    assert copy.is_contiguous()


def test_memory_is_used_again_once_it_is_given_back_and_not_before():
    buffers = CpuBuffers()
    first, second = (buffers.copy(torch.full((3, 4), value)) for value in (1.0, 2.0))
    assert first.data_ptr() != second.data_ptr()
    memory = first.data_ptr()
    buffers.release([first, torch.ones(3, 4)])  # and one that is none of its buffers
    other_dtype = buffers.copy(torch.full((3, 4), 3.0, dtype=torch.bfloat16))
    assert other_dtype.data_ptr() != memory
    third, fourth = (buffers.copy(torch.full((3, 4), value)) for value in (3.0, 4.0))
    assert third.data_ptr() == memory
    assert fourth.data_ptr() != memory
    assert [each[0, 0].item() for each in (second, third, fourth)] == [2.0, 3.0, 4.0]


def test_what_nobody_else_changes_is_not_copied():
    buffers = CpuBuffers()
    own = torch.ones(3, 4)
    assert buffers.copy(own, owned=True).data_ptr() == own.data_ptr()


@pytest.mark.slow
def test_a_recorder_needs_no_more_buffers_than_records_that_are_under_way(tmp_path):
    model, optimizer = training.build()
    recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1, queue_size=2)
    with recorder:
        training.train(model, optimizer, 60)
    # Of each of 4 arrays: one pending, two waiting, one being written.
    assert 4 <= len(recorder._contents.buffers) <= 4 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_of_the_moment_it_was_asked_for():
    buffers = CpuBuffers()
    weight = torch.zeros(2048, 2048, device="cuda")
    copies = []
    for _ in range(8):
        copies.append(buffers.copy(weight))
        weight += 1
    marks = buffers.pop_events()
    assert len(marks) == 1
    for mark in marks:
        mark.synchronize()
    assert all(copy.is_pinned() for copy in copies)
    assert [copy.unique().tolist() for copy in copies] == [[float(n)] for n in range(8)]
