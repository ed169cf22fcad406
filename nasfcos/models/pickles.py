"""Reads pickles of numpy arrays, such as those of Caffe2, without executing anything.

numpy's own classes are not used: their ``__setstate__`` trusts its arguments, down to pointers. The
stand-ins below read a type code and raw bytes, and nothing else.
"""

from __future__ import annotations

import codecs
import collections
import io
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def read_pickle(data: bytes) -> Mapping[Any, Any]:
    """The dict in a pickle; its arrays are `PickledArray`.

    Args:
        data: content of the file.

    Raises:
        Exception: of many kinds; the pickle is damaged or contains something else.
    """
    content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError("it does not begin with a dict")
    return content


class PickledArray:
    """Stand-in for numpy.ndarray while a pickle is read.

    Attributes:
        value: the array.
    """

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        self.value = dtype.array(data, shape, "F" if fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays of numbers and plain containers; refuses every other object."""

    MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
    NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return PickledArray
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if module in self.MULTIARRAY and name == "_reconstruct":
            return lambda kind, shape, dtype: PickledArray()
        if module in self.MULTIARRAY and name == "scalar":
            return lambda dtype, data: dtype.array(data, ())
        if module in self.NUMERIC and name == "_frombuffer":
            return lambda data, dtype, shape, order: dtype.array(data, shape, order)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")


class _Dtype:
    """Stand-in for numpy.dtype: floats, integers and booleans in either byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[fiub][1248]", code):
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order, details = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(detail is not None for detail in details):
            raise pickle.UnpicklingError("an array of a structured type")
        self.order = order

    def array(self, data: Any, shape: Any, order: str = "C") -> np.ndarray:
        if isinstance(data, str):  # bytes pickled by Python 2 are read as text
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"an array whose content is {type(data).__name__}")
        return np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order=order)


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return codecs.encode(text, "latin1")
