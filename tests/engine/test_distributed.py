import pytest
import torch

from nasfcos.config import ConfigError
from nasfcos.engine import distributed


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def place(monkeypatch):
    def set_place(local_rank, processes):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return set_place


def test_each_process_of_a_machine_has_its_own_gpu(two_gpus, place):
    place(1, 2)
    assert distributed.resolve_device("auto") == torch.device("cuda", 1)
    assert distributed.resolve_device("cuda") == torch.device("cuda", 1)
    assert distributed.resolve_device("cpu") == torch.device("cpu")


def test_without_gpus_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "local_rank", "processes", "words"),
    [
        ("auto", 2, 3, "needs GPU 2, but there are 2"),
        ("cuda:5", 0, 1, "needs GPU 5, but there are 2"),
        ("cuda:0", 1, 2, "2 processes on one GPU"),
        ("gpu", 0, 1, "MODEL.DEVICE 'gpu'"),
    ],
)
def test_a_device_that_cannot_be_had(two_gpus, place, name, local_rank, processes, words):
    place(local_rank, processes)
    with pytest.raises(ConfigError, match=words):
        distributed.resolve_device(name)


def test_one_process_talks_to_itself():
    assert distributed.all_gather("x") == distributed.gather("x") == ["x"]
    assert distributed.broadcast("x") == "x"
    assert torch.equal(distributed.mean(torch.ones(2)), torch.ones(2))
    with distributed.session("cpu") as device:
        distributed.barrier()
    assert device == torch.device("cpu")
