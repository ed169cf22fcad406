import pytest

from nasfcos.config import load_config
from tests.squares import config_file, data_root

__all__ = ["config_file", "data_root"]


@pytest.fixture
def config(config_file, tmp_path):
    """The config of the tiny job with overrides and an OUTPUT_DIR of this test."""

    def make(*overrides, output="out"):
        return load_config(config_file, ["OUTPUT_DIR", str(tmp_path / output), *overrides])

    return make
