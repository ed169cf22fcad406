"""The config tree: defaults, YAML files with inheritance, command-line overrides, and errors."""

from .defaults import get_defaults
from .errors import ConfigError
from .load import is_weight_given, load_config, override_config

__all__ = ["ConfigError", "get_defaults", "is_weight_given", "load_config", "override_config"]
