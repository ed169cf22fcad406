import mmap

import pytest
import torch
from torch import nn

from nasfcos.benchmark.memory import peak_bytes, storage_bytes, tensor_bytes

CPU = torch.device("cpu")
MIB = 2**20


def needs_linux(value):
    if value is None:
        pytest.skip("this system does not tell the peak of resident memory")
    return value


@pytest.mark.parametrize("size", [4, 64])
def test_a_tensor_needs_its_size(size):
    found = needs_linux(peak_bytes(lambda: torch.ones(size * MIB // 4), CPU))
    assert (size - 1) * MIB < found < (size + 3) * MIB


def test_it_is_the_peak_not_the_sum_nor_the_end():
    def run():
        # Pages of the system itself: whether an allocator returns a freed tensor's at once
        # depends on what else lies in its heap.
        for size in [48, 20]:
            with mmap.mmap(-1, size * MIB) as pages:
                for _ in range(size):
                    pages.write(bytes(MIB))

    assert 47 * MIB < needs_linux(peak_bytes(run, CPU)) < 51 * MIB


def test_memory_that_the_allocator_kept_is_not_overlooked():
    def run():
        return [torch.ones(1024) for _ in range(10_000)]  # too small to go back at once

    found = [needs_linux(peak_bytes(run, CPU)) for _ in range(3)]
    assert min(found) > 0.9 * 10_000 * 4096  # some free memory was there before
    assert max(found) < 1.2 * min(found)


def test_what_was_there_before_does_not_count():
    held = torch.ones(16 * MIB)
    assert needs_linux(peak_bytes(lambda: held.sum(), CPU)) < 4 * MIB


def test_tensors_of_a_module_and_its_optimizer():
    layer = nn.Linear(10, 5)
    layer.register_buffer("again", layer.weight.detach())  # shares its storage
    assert tensor_bytes(layer) == 4 * 55
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert tensor_bytes(layer, optimizer) == 2 * 4 * 55
    assert storage_bytes([torch.zeros(3, dtype=torch.bfloat16)]) == 6
