"""The only file that touches the Pallas Triton backend.

The backend works in jax 0.10.2 to 0.12 and warns of its removal since 0.11.0; when it goes, this file and the compiler
parameters below are what has to change, and the XLA implementations in `reference.py` keep every op alive meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:  # a jax built without it: interpretation still works
  plgpu = None


def call(kernel: Callable[..., None], *, interpret: bool, num_warps: int = 4, num_stages: int = 2, **kwargs: Any):
  """`pl.pallas_call` on the Triton backend, or interpreted; whole arrays are passed by reference (no block specs)."""
  if interpret:
    return pl.pallas_call(kernel, interpret=True, **kwargs)
  if plgpu is None:
    raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return pl.pallas_call(kernel, compiler_params=params, **kwargs)
