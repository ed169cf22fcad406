import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nasfcos.transfer import to_cpu
from tests.copies import Copies


def results():
    return [
        {"boxes": torch.rand(count, 4), "labels": torch.arange(count)} for count in (3, 0, 70)
    ]


def test_what_is_on_the_cpu_stays_as_it_is():
    given = results()
    for before, after in zip(given, to_cpu(given), strict=True):
        assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


def test_results_come_from_a_gpu_with_one_wait(monkeypatch):
    """With fake tensors, which need no GPU."""
    waits = []

    class Stream:
        def synchronize(self):
            waits.append(copies.all)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with FakeTensorMode(), Copies() as copies:
        with torch.device("cuda"):
            given = results()
        found = to_cpu(given)
    assert waits == [6] and copies.all == 6 and not copies.waiting
    for before, after in zip(given, found, strict=True):
        for key, x in after.items():
            assert x.device.type == "cpu"
            assert (x.shape, x.dtype) == (before[key].shape, before[key].dtype)


@pytest.mark.gpu
def test_results_from_a_gpu_are_the_same_and_not_pinned():
    given = results()
    for before, after in zip(
        given, to_cpu([{key: x.cuda() for key, x in one.items()} for one in given]), strict=True
    ):
        for key, x in after.items():
            assert torch.equal(x, before[key]) and not x.is_pinned()
