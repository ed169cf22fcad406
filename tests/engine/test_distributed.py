import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buffers_are_not_sent_before_each_step(group, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        DistributedDataParallel, "_sync_buffers", lambda *_: pytest.fail("buffers were sent")
    )
    norm = nn.BatchNorm2d(2)
    model = distributed.parallel(norm.train())
    assert isinstance(model, DistributedDataParallel)
    for _ in range(2):
        model(torch.rand(2, 2, 3, 3)).sum().backward()
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("wanted", "processes", "threads"),
    [(None, 2, 4), ("1", 2, 4), ("1", 16, 1), ("3", 2, 5), ("1", 1, 5)],
)
def test_processes_share_out_the_cores_unless_threads_were_asked_for(
    monkeypatch, place, one_thread, wanted, processes, threads
):
    monkeypatch.setattr(distributed, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    place(0, processes)
    torch.set_num_threads(5)  # restore the number at the start of the process
    with distributed.session("cpu"):
        assert torch.get_num_threads() == threads
