"""Training and testing: optimizer, training loop, checkpoints, distributed jobs and the log."""

from .solver import build_lr_scheduler, build_optimizer
from .test import load_test_model, test, test_sets
from .train import train

__all__ = [
    "build_lr_scheduler",
    "build_optimizer",
    "load_test_model",
    "test",
    "test_sets",
    "train",
]
