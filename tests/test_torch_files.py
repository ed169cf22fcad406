import pytest
import torch

from nasfcos.torch_files import TorchFileError, read_saved, read_torch_file


def test_what_is_saved_is_read_where_it_is_whole(tmp_path, caplog):
    path = tmp_path / "saved.pth"
    assert read_saved(path) == {} and not caplog.records
    torch.save({"a": torch.ones(100)}, path)
    assert torch.equal(read_saved(path)["a"], torch.ones(100))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TorchFileError, match=r"saved\.pth cannot be read .*cut off"):
        read_torch_file(path)
    assert read_saved(path) == {} and "saved.pth is damaged" in caplog.text
    torch.save([1], path)  # not a dict
    assert read_saved(path) == {}
