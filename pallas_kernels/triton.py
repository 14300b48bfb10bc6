"""The only file that touches the Pallas Triton backend.

The backend works in jax 0.10.2 to 0.12 and warns of its removal since 0.11.0; when it goes, this file is what has to
change, and the XLA implementation of every op stays whatever happens.
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


def call(kernel: Callable[..., None], *, implementation: str, num_warps: int = 4, num_stages: int = 2, **kwargs: Any):
  """`pl.pallas_call` of a kernel for the GPU, whole arrays passed by reference (no block specs).

  Args:
    kernel: of refs.
    implementation: "triton", or "interpret" to run it anywhere, one program after another.
    num_warps: of a program.
    num_stages: of its pipelined loops.
    **kwargs: of `pl.pallas_call`.

  Raises:
    ValueError: `implementation` is another name.
    NotImplementedError: this jax has no Pallas Triton backend.
  """
  if implementation not in ("triton", "interpret"):
    raise ValueError(f"{implementation=} is none of 'xla', 'triton', 'interpret'")
  if plgpu is None:
    raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
  if implementation == "interpret":
    return pl.pallas_call(kernel, interpret=True, **kwargs)
  params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
  return pl.pallas_call(kernel, compiler_params=params, **kwargs)


def power_of_two(**sizes: int) -> None:
  """Checks sizes that a kernel's tiles take from the arrays.

  Raises:
    NotImplementedError: one is not a power of two.
  """
  odd = {name: size for name, size in sizes.items() if size & (size - 1)}
  if odd:
    raise NotImplementedError(f"kernels need powers of two, not {odd}; use implementation='xla'")


def dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
  """a [m, c] times b [c, n], or b [n, c] transposed, in float32; float32 operands by IEEE products, not TF32."""
  if min(*a.shape, *b.shape) < 16:  # below the smallest tile of a tensor core
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


def barrier(implementation: str) -> None:
  """Waits for every thread of the program; what they wrote before is then seen by all."""
  if implementation != "interpret":  # where a program is one thread
    plgpu.debug_barrier()
