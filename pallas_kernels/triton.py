"""The only file that touches the Pallas Triton backend.

The backend works in jax 0.10.2 to 0.12 and warns of its removal since 0.11.0; when it goes, this file and the compiler
parameters below are what has to change, and the XLA implementation of every op stays whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:  # a jax built without it: interpretation still works
  plgpu: Any = None


def call(kernel: Callable[..., None], *, interpret: bool, num_warps: int = 4, num_stages: int = 2, **kwargs: Any):
  """`pl.pallas_call` on the Triton backend, or interpreted; whole arrays are passed by reference (no block specs)."""
  if interpret:
    return pl.pallas_call(kernel, interpret=True, **kwargs)
  if plgpu is None:
    raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return pl.pallas_call(kernel, compiler_params=params, **kwargs)


def dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
  """a [m, c] times b [c, n], or b [n, c] transposed, in float32; float32 operands by IEEE products, not TF32."""
  if min(*a.shape, *b.shape) < 16:  # below the smallest tile of a tensor core
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(a[:, None] * b[None], 2) if trans_b else jnp.sum(a[:, :, None] * b[None], 1)
  dims = (((1,), (1 if trans_b else 0,)), ((), ()))
  return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def store(ref: Any, value: jax.Array, *, mask: jax.Array):
  """Writes `value` to `ref`, an `x.at[indices]`, where `mask`; elsewhere the indices must only be legal."""
  plgpu.store(ref, value, mask=mask)


def barrier():
  """Waits for every thread of the program; what they wrote before is then seen by all. Not when interpreting."""
  plgpu.debug_barrier()
