import os

import pytest
import torch

from tests.small import cfg, checkpoint, picture, predictor

__all__ = ["cfg", "checkpoint", "picture", "predictor"]

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several that test at a time
    torch.set_num_threads(1)


def _with_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For modules of many small computations, or of equal bits."""
    yield from _with_threads(1)


@pytest.fixture
def two_threads():
    """For sums that must be cut as they were when the expected values were computed."""
    yield from _with_threads(2)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
