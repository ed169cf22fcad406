from tests.squares import config_file, data_root

__all__ = ["config_file", "data_root"]
