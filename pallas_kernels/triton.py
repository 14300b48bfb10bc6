"""The only file that touches the Pallas Triton backend.

The backend works in jax 0.10.2 to 0.12 and warns of its removal since 0.11.0. When it goes every kernel has to be
written anew: they rely on index gathers, masked stores, barriers and sorts in registers. The XLA implementation of
every op stays whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:  # a jax without the backend: only XLA's implementations work
  plgpu: Any = None

LEAST_TILE = 16  # rows, columns and channels of the smallest matrix product of a tensor core


def check(implementation: str, **sizes: int) -> None:
  """Checks the implementation that an op is asked for. `sizes` are the dimensions that a kernel has as tiles.

  Raises:
    ValueError: there is no such implementation.
    NotImplementedError: it names a kernel, and a size is not a power of two or this jax lacks the backend.
  """
  if implementation not in ("xla", "triton", "interpret"):
    raise ValueError(f"{implementation=} is none of 'xla', 'triton', 'interpret'")
  if implementation == "xla":
    return
  if plgpu is None:
    raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
  if odd := {name: size for name, size in sizes.items() if size & (size - 1)}:
    raise NotImplementedError(f"kernels need powers of two, not {odd}; use implementation='xla'")


def call(kernel: Callable[..., None], *, implementation: str, num_warps: int = 4, num_stages: int = 2, **kwargs: Any):
  """`pl.pallas_call` of a kernel for the GPU, whole arrays passed by reference (no block specs).

  Args:
    kernel: of refs.
    implementation: "triton", or "interpret" to run it anywhere, one program after another.
    num_warps: of a program.
    num_stages: of its pipelined loops.
    **kwargs: of `pl.pallas_call`.
  """
  if implementation == "interpret":
    return pl.pallas_call(kernel, interpret=True, **kwargs)
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return pl.pallas_call(kernel, compiler_params=params, **kwargs)


def dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
  """a [m, c] times b [c, n], or b [n, c] transposed, in float32; float32 operands by IEEE products, not TF32."""
  if min(*a.shape, *b.shape) < LEAST_TILE:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(a[:, None] * b[None], 2) if trans_b else jnp.sum(a[:, :, None] * b[None], 1)
  dims = (((1,), (1 if trans_b else 0,)), ((), ()))
  return jax.lax.dot_general(a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def store(ref: Any, value: jax.Array, *, mask: jax.Array) -> None:
  """Writes `value` to `ref`, an `x.at[indices]`, where `mask`.

  Elsewhere give it an index beyond the array: interpreted, what is masked writes the old value back, and must not share
  a place with what is not.
  """
  plgpu.store(ref, value, mask=mask)


def atomic_add(ref: Any, index: jax.Array | int, value: jax.Array) -> jax.Array:
  """Adds to ref[index] as if no other program ran meanwhile; returns what it was before."""
  return plgpu.atomic_add(ref, (index,), value)


def barrier(implementation: str) -> None:
  """Waits for every thread of the program; what they wrote before is then seen by all."""
  if implementation != "interpret":  # where a program is one thread
    plgpu.debug_barrier()
