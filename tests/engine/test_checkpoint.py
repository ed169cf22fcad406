import contextlib
import logging
import os
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from nasfcos.config import load_config
from nasfcos.engine import checkpoint as ck
from nasfcos.engine.run_folder import make_aside, remove_old_checkpoints, set_aside
from nasfcos.models.weights import WeightsError, read_weights


def state(iteration):
    weights = {"w": torch.full((100,), float(iteration))}
    return dict.fromkeys(ck.CONTENT) | {"model": weights, "iteration": iteration}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = ck.checkpoint_path(tmp_path, 5)
    ck.save_checkpoint(state(5), path)

    def write_half(value, file):
        file.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(ck.CheckpointError, match="model_0000005.pth.*No space left"):
        ck.save_checkpoint(state(6), path)
    assert names(tmp_path) == ["model_0000005.pth"]
    assert ck.load_checkpoint(path)["iteration"] == 5


@pytest.fixture
def files_of_100_kb():
    """Limit the size of files that this process writes; for torch this looks like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_cannot_be_written_whole_is_told_with_the_free_space(tmp_path, files_of_100_kb):
    large = state(7) | {"model": {"w": torch.zeros(100, 1000)}}
    words = r"model_0000007\.pth: .*Its disk has [\d,]+ MB free; .*delete older checkpoints"
    with pytest.raises(ck.CheckpointError, match=f"(?s){words}"):
        ck.save_checkpoint(large, ck.checkpoint_path(tmp_path, 7))
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_ignored_and_cleared(tmp_path):
    (tmp_path / ".model_0000009.123.pth").write_bytes(b"half")
    assert ck.newest_checkpoint(tmp_path) is None
    ck.save_checkpoint(state(3), ck.checkpoint_path(tmp_path, 3))
    assert names(tmp_path) == ["model_0000003.pth"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_broken_newest_checkpoint_is_named_and_passed_over(tmp_path, damage, caplog):
    for iteration in (3, 6):
        ck.save_checkpoint(state(iteration), ck.checkpoint_path(tmp_path, iteration))
    newest = tmp_path / "model_0000006.pth"
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-50])
    elif damage == "other":
        torch.save({"model": {}}, newest)
    else:
        newest.write_bytes(b"" if damage == "empty" else b"not a checkpoint")
    with caplog.at_level(logging.WARNING, logger="nasfcos"):
        path, found = ck.newest_checkpoint(tmp_path)
    assert path.name == "model_0000003.pth" and found["iteration"] == 3
    assert "model_0000006.pth" in caplog.text


def test_a_damaged_byte_is_noticed(tmp_path):
    path = ck.checkpoint_path(tmp_path, 1)
    ck.save_checkpoint(state(1), path)
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((100,), 1.0).numpy().tobytes())
    content[at + 41] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ck.CheckpointError, match="model_0000001.pth is damaged"):
        ck.load_checkpoint(path)


@pytest.mark.parametrize("part", sorted(ck.CONTENT))
def test_a_file_without_a_part_of_a_run_is_no_checkpoint(tmp_path, part):
    content = state(1)
    del content[part]
    torch.save(content, tmp_path / ck.FINAL)
    with pytest.raises(ck.CheckpointError, match=f"model_final.pth .*it has no {part}$"):
        ck.load_checkpoint(tmp_path / ck.FINAL)
    assert ck.newest_checkpoint(tmp_path) is None


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with (tmp_path / "model_0000007.pth").open("wb") as file:
        pickle.dump({**state(7), "model": Attack()}, file, protocol=2)
    torch.save({**state(8), "model": Attack()}, tmp_path / "model_0000008.pth")
    assert ck.newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "executed").exists()


def test_the_final_checkpoint_counts_by_its_iterations(tmp_path):
    ck.save_checkpoint(state(8), tmp_path / ck.FINAL)
    ck.save_checkpoint(state(6), ck.checkpoint_path(tmp_path, 6))
    assert ck.newest_checkpoint(tmp_path)[0].name == ck.FINAL
    # A run that resumed from the final one, with more iterations.
    ck.save_checkpoint(state(10), ck.checkpoint_path(tmp_path, 10))
    assert ck.newest_checkpoint(tmp_path)[0].name == "model_0000010.pth"


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (9, 10, 100, 12345678):
        ck.save_checkpoint(state(iteration), ck.checkpoint_path(tmp_path, iteration))
    ck.save_checkpoint(state(5), tmp_path / ck.FINAL)
    remove_old_checkpoints(tmp_path, 2, 12345678)
    assert names(tmp_path) == ["model_0000100.pth", "model_12345678.pth", ck.FINAL]


def test_the_checkpoint_just_saved_is_kept_whatever_lies_beside_it(tmp_path):
    for iteration in (1, 2, 40):
        ck.save_checkpoint(state(iteration), ck.checkpoint_path(tmp_path, iteration))
    remove_old_checkpoints(tmp_path, 1, 2)
    assert names(tmp_path) == ["model_0000002.pth", "model_0000040.pth"]


def test_an_earlier_run_is_set_aside_whole(tmp_path):
    make_aside(tmp_path)  # left by a run that was stopped before it moved anything
    for _ in range(2):
        ck.save_checkpoint(state(3), ck.checkpoint_path(tmp_path, 3))
        (tmp_path / "metrics.jsonl").write_text("{}")
        (tmp_path / "model_0000004.pth.damaged").write_text("")
        (tmp_path / "log.txt").write_text("stays")
        set_aside(ck.checkpoint_files(tmp_path), make_aside(tmp_path))
    assert names(tmp_path) == ["earlier_1", "earlier_2", "log.txt"]
    moved = ["metrics.jsonl", "model_0000003.pth", "model_0000004.pth.damaged"]
    assert names(tmp_path / "earlier_2") == moved


def test_setting_aside_can_be_cut_off_anywhere(tmp_path, monkeypatch):
    """The folder keeps the earlier run's newest checkpoint until everything else was moved."""
    files = ["model_0000003.pth", "model_0000006.pth", ck.FINAL, "metrics.jsonl", "config.yaml"]
    rename = Path.rename
    for moves in range(len(files) + 1):
        folder = tmp_path / str(moves)
        ck.save_checkpoint(state(6), folder / "model_0000006.pth")  # written before the others
        for at, name in enumerate(files):
            if name.endswith("pth"):
                ck.save_checkpoint(state(3 * at + 3), folder / name)
                os.utime(folder / name, (at, at))
            else:
                (folder / name).write_text("{}")
        left = iter(range(moves))

        def limited(path, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", limited)
        with contextlib.suppress(KeyboardInterrupt):
            set_aside(ck.checkpoint_files(folder), make_aside(folder))
        found = ck.newest_checkpoint(folder)
        if moves < len(files):
            assert found[0].name == ck.FINAL and found[1]["iteration"] == 9
        else:
            assert found is None
        moved = {path.name for path in (folder / "earlier_1").iterdir()}
        assert moved | set(names(folder)) == {*files, "earlier_1"}


def test_what_is_passed_over_is_renamed_only_for_a_run_that_goes_on(tmp_path, caplog):
    for iteration in (3, 6):
        ck.save_checkpoint(state(iteration), ck.checkpoint_path(tmp_path, iteration))
    for name in ("model_0000009.pth", ck.FINAL):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    before = names(tmp_path)
    assert ck.newest_checkpoint(tmp_path)[1]["iteration"] == 6
    assert names(tmp_path) == before
    assert ck.newest_checkpoint(tmp_path, rename_damaged=True)[1]["iteration"] == 6
    assert names(tmp_path) == [
        "model_0000003.pth", "model_0000006.pth", "model_0000009.pth.damaged",
        "model_final.pth.damaged",
    ]  # fmt: skip
    assert "model_0000009.pth cannot be read and was renamed to" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file without a start")
def test_a_checkpoint_that_a_disk_does_not_give_is_not_called_damaged(tmp_path):
    """It may be intact when the disk is back, so nothing is renamed and no other one is chosen."""
    ck.save_checkpoint(state(6), ck.checkpoint_path(tmp_path, 6))
    (tmp_path / "model_0000009.pth").symlink_to("/proc/self/mem")  # reading it is an I/O error
    with pytest.raises(OSError, match="Input/output error.*model_0000009.pth"):
        ck.newest_checkpoint(tmp_path, rename_damaged=True)
    assert names(tmp_path) == ["model_0000006.pth", "model_0000009.pth"]
    with pytest.raises(WeightsError, match="Input/output error.*model_0000009.pth"):
        read_weights(tmp_path / "model_0000009.pth")


def test_random_states_survive_a_file(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    random.gauss(0, 1)  # leaves a cached second number in the generator
    torch.save(ck.random_state(), tmp_path / "state")
    expected = draw(), random.gauss(0, 1)
    draw()
    ck.set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (draw(), random.gauss(0, 1)) == expected


def test_differing_keys():
    cfg = load_config(None, ["SOLVER.BASE_LR", 0.02, "SOLVER.STEPS", "(5, 6)"])
    then = load_config(None, ["SOLVER.STEPS", "(5, 6)", "DATASETS.CUSTOM.mine.FORMAT", "coco"])
    assert ck.differing_keys(cfg, cfg.dump()) == []
    changes = ck.differing_keys(cfg, then.dump())
    assert "SOLVER.BASE_LR: 0.01 -> 0.02" in changes
    assert any(line.startswith("DATASETS.CUSTOM") and "absent" in line for line in changes)
    assert not any("STEPS" in line for line in changes)
