import json
import os
import resource
import subprocess
import sys

import pytest

from nasfcos.files import read_json, remove_temporary, replacing, write_json


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"AP": 0.5})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text('{"AP"')
        raise RuntimeError("disk full")
    assert json.loads(path.read_text()) == {"AP": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, sys; from nasfcos.files import replacing\n"
        "with replacing(sys.argv[1]) as path: path.touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "below" / "best.pth"])
    (left,) = (tmp_path / "below").iterdir()
    others = [tmp_path / name for name in (".notes.txt", ".a.json", f".b.{os.getpid()}.json")]
    for other in others:
        other.touch()
    remove_temporary(tmp_path)
    assert not left.exists() and all(other.exists() for other in others)


def test_what_a_disk_refuses_names_the_file(tmp_path):
    path = tmp_path / "figures.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="figures.json"):
            write_json(path, list(range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_be_as_long_as_file_systems_take(tmp_path):
    path = tmp_path / f"{'x' * 250}.json"
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_values_that_are_not_json_are_refused_whole(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "figures.json", [float("inf")])
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_nan_is_null(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"x": float("nan"), "y": {"z": float("nan")}})
    assert path.read_text() == '{"x": null, "y": {"z": null}}'


def test_what_cannot_be_read_is_none(tmp_path):
    path = tmp_path / "figures.json"
    assert read_json(path) is None
    write_json(path, {"AP": 0.5})
    assert read_json(path) == {"AP": 0.5}
    for broken in (b'{"AP"', b"", b'"\xff"'):
        path.write_bytes(broken)
        assert read_json(path) is None
    assert read_json(tmp_path) is None
