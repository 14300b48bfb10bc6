"""Attention of a piece of a prompt, against loops in numpy. What it must not read is NaN in its inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import pallas_kernels as kernels
from pallas_kernels import copy, prefill
from tests.cases import DTYPES, IMPLEMENTATIONS, REAL, TOLERANCE, assert_rows_close


class Piece(NamedTuple):
  """A piece of T tokens after `prefix_blocks` blocks, of a list with room for N; None: it begins the prompt."""

  prefix_blocks: int | None
  T: int = 24
  K: int = 2
  G: int = 3
  S: int = 8
  D: int = 16
  N: int = 4


def piece(case: Piece, dtype: str):
  """Arguments of `prefill_attention` and its result in float64; every second block lies in a slot, not in the pool."""
  rng = np.random.default_rng(7)
  prefix_blocks, T, K, G, S, D, N = case
  L, M, P = 2, 2 * N + 1, K * N
  make = lambda *dims: rng.normal(size=dims).astype(DTYPES[dtype])  # noqa: E731
  q, k, v = make(T, K, G, D), make(T, K, D), make(T, K, D)
  pool, slots = (np.full(dims, np.nan, DTYPES[dtype]) for dims in ((K, L, M, 2, S, D), (P, 2, S, D)))
  n_before = S * (prefix_blocks or 0)
  earlier = make(K, prefix_blocks or 0, 2, S, D)
  prefix = None
  if prefix_blocks is not None:
    blocks, slot = np.full((2, K, N), -1, np.int32)
    blocks[:, prefix_blocks:] = 1  # beyond the prefix: any block, which holds NaN
    prefix = kernels.Prefix(pool, slots, np.int32(1), blocks, slot, np.int32(n_before))
    free = iter(rng.permutation(P).tolist())
    for head, i in np.ndindex(K, prefix_blocks):
      blocks[head, i] = 3 + 2 * i if 3 + 2 * i < M else (4 + 2 * i) % M
      if (head + i) % 2:
        slot[head, i] = next(free)
        slots[slot[head, i]] = earlier[head, i]
      else:
        pool[head, 1, blocks[head, i]] = earlier[head, i]
  expected = np.zeros((T, K, G, D))
  for head in range(K):
    before = earlier[head].transpose(1, 0, 2, 3).reshape(2, n_before, D)
    keys, values = (np.concatenate([before[i], x[:, head]]).astype(float) for i, x in enumerate((k, v)))
    for t, g in np.ndindex(T, G):
      seen = n_before + t + 1
      p = np.exp(keys[:seen] @ q[t, head, g].astype(float) * D**-0.5)
      expected[t, head, g] = p @ values[:seen] / p.sum()
  return (q, k, v, prefix), expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_blocks", [None, 0, 2, 4])
def test_prefill_attention(prefix_blocks: int | None, dtype: str, implementation: str):
  """24 tokens are three tiles of queries."""
  inputs, expected = piece(Piece(prefix_blocks), dtype)
  actual = jax.jit(functools.partial(kernels.prefill_attention, implementation=implementation))(*inputs)
  assert actual.dtype == inputs[0].dtype
  assert_rows_close(actual.astype(jnp.float32), expected, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_blocks", [None, 0, 1, 5, 8])
@pytest.mark.parametrize("name", REAL)
def test_prefill_attention_of_real_shapes(name: str, prefix_blocks: int | None):
  G, S, D = REAL[name]
  inputs, expected = piece(Piece(prefix_blocks, 256, 2, G, S, D, 8), "bfloat16")
  attention = jax.jit(functools.partial(kernels.prefill_attention, implementation="triton"))
  actual = attention(*inputs).astype(jnp.float32)
  assert_rows_close(actual, expected, TOLERANCE["bfloat16"])
  q, k, v, prefix = inputs
  with pytest.raises(AssertionError):
    assert_rows_close(attention(q, v, k, prefix).astype(jnp.float32), expected, TOLERANCE["bfloat16"])


@pytest.mark.gpu
def test_prefill_reads_nothing_far_beyond_the_prefix():
  """5 of 40 blocks of 32 tokens: what is gathered ends 512 tokens after them."""
  inputs, expected = piece(Piece(5, 256, 2, 4, 32, 128, 40), "bfloat16")
  attention = jax.jit(functools.partial(kernels.prefill_attention, implementation="triton"))
  poison = jax.jit(lambda: jnp.full(1 << 24, jnp.nan, jnp.bfloat16))  # freed, for the gathered arrays to lie in
  for _ in range(3):
    jax.block_until_ready(poison())
    assert_rows_close(attention(*inputs).astype(jnp.float32), expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("prefix_blocks", [None, 0, 2])
def test_prefill_merges_two_calls(prefix_blocks: int | None, monkeypatch: pytest.MonkeyPatch):
  """The GPU's path with stand-ins for what needs one: its two attentions, and how they are put together."""

  def attention(q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, return_residual):
    assert return_residual and (kv_seqlen is None) == (mask_type == fused_attention_stablehlo.MaskType.CAUSAL)
    q, k, v = (x[0].astype(jnp.float32) for x in (q, k, v))
    (n_queries, n_heads, depth), (n_keys, n_kv_heads, _) = q.shape, k.shape
    s = jnp.einsum("tkgd,ukd->kgtu", q.reshape(n_queries, n_kv_heads, -1, depth), k) * scale
    place = jnp.arange(n_keys)[None]
    seen = place <= jnp.arange(n_queries)[:, None] if kv_seqlen is None else place < kv_seqlen[:, None]
    s = jnp.where(seen, s, -1e30)  # v is not cleared here: 0 * NaN is to be seen
    o = jnp.einsum("kgtu,ukd->tkgd", jax.nn.softmax(s), v).reshape(1, n_queries, n_heads, depth)
    return o.astype(jnp.bfloat16), jax.nn.logsumexp(s, -1).reshape(1, n_heads, n_queries)

  monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", attention)
  monkeypatch.setattr(
    prefill, "gather_blocks", lambda *a, implementation: copy.gather_blocks(*a, implementation="interpret")
  )
  inputs, expected = piece(Piece(prefix_blocks), "bfloat16")
  actual = jax.jit(functools.partial(kernels.prefill_attention, implementation="triton"))(*inputs)
  assert_rows_close(actual.astype(jnp.float32), expected, TOLERANCE["bfloat16"])


def test_prefill_names_a_head_dimension_that_cudnn_lacks():
  q, kv = jnp.zeros((8, 1, 1, 12), jnp.bfloat16), jnp.zeros((8, 1, 12), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="not 12"):
    kernels.prefill_attention(q, kv, kv, implementation="triton")
  with pytest.raises(ValueError, match="implementation='cuda' is none of"):
    kernels.prefill_attention(q, kv, kv, implementation="cuda")
