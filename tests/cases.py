"""What the tests of all kernels share: implementations, dtypes, real shapes, tolerances."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

IMPLEMENTATIONS = ["xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the norm of a row
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Shape(NamedTuple):
  G: int
  S: int
  D: int


REAL = {  # query heads per KV head and head dim from each model's config.json; blocks as served
  "lwm-7b": Shape(1, 32, 128),  # LargeWorldModel/LWM-Text-Chat-1M
  "llama3-8b": Shape(4, 32, 128),  # meta-llama/Meta-Llama-3-8B
  "llama-3.2-1b": Shape(4, 32, 64),  # meta-llama/Llama-3.2-1B
  "qwen2.5-7b": Shape(7, 32, 128),  # Qwen/Qwen2.5-7B
}


def assert_rows_close(actual, expected, tolerance: float):
  """Relative norm of the difference along the last axis; a row that is 0 must be 0 exactly."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(actual).all()
  error, size = np.linalg.norm(actual - expected, axis=-1), np.linalg.norm(expected, axis=-1)
  assert (error <= tolerance * size).all(), f"{np.max(error / np.maximum(size, 1e-30))} > {tolerance}"


def assert_same_bits(actual, expected: np.ndarray):
  actual = np.asarray(actual)
  assert actual.shape == expected.shape and actual.dtype == expected.dtype
  assert actual.tobytes() == expected.tobytes()
