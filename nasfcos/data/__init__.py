"""Data: named data sets, readers, transforms, samplers, loaders, and a generated demo set."""

from .build import build_dataset, build_test_loader, build_train_loader
from .catalog import DatasetSpec, class_names, find_dataset, num_classes
from .dataset import DetectionDataset
from .records import DataError, Record
from .transforms import resized_shape

__all__ = [
    "DataError",
    "DatasetSpec",
    "DetectionDataset",
    "Record",
    "build_dataset",
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "find_dataset",
    "num_classes",
    "resized_shape",
]
