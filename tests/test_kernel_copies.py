"""Block copies, and attention of a prompt, against loops in numpy. What an op must not read is NaN in its inputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from tests.cases import DTYPES, IMPLEMENTATIONS, TOLERANCE, assert_rows_close, assert_same_bits


def tagged(*dims: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=dims).astype(np.float32)


K, L, M, P, S, D = 2, 3, 11, 9, 8, 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_load_blocks(implementation: str):
  pool, slots = tagged(K, L, M, 2, S, D), tagged(P, 2, S, D, seed=1)
  blocks = np.array([[[3, -1, 10], [3, 0, 5]], [[-1, 7, 1], [2, -1, -1]]], np.int32)
  slot = np.array([[[8, 4, 0], [1, -1, 2]], [[-1, 3, 7], [6, 5, -1]]], np.int32)
  pool[np.isin(np.arange(M), blocks, invert=True)[None, None] & np.ones((K, L, 1), bool)] = np.nan
  pool[:, [0, 1]] = np.nan
  expected = slots.copy()
  for b, k, i in np.ndindex(*blocks.shape):
    if blocks[b, k, i] >= 0 and slot[b, k, i] >= 0:
      expected[slot[b, k, i]] = pool[k, 2, blocks[b, k, i]]
  actual = jax.jit(functools.partial(kernels.load_blocks, implementation=implementation))(
    pool, slots, np.int32(2), blocks, slot
  )
  assert_same_bits(actual, expected)
  assert not np.isnan(expected).any()


@pytest.mark.parametrize("n_slots", [P, 0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gather_blocks(implementation: str, n_slots: int):
  pool, slots = tagged(K, L, M, 2, S, D), tagged(n_slots, 2, S, D, seed=1)
  blocks = np.array([[3, -1, 10, 0], [9, 2, -1, 5]], np.int32)
  slot = np.array([[8, -1, -1, 0], [-1, 2, -1, -1]], np.int32) if n_slots else np.full((2, 4), -1, np.int32)
  pool[:, [0, 2]] = np.nan
  slots[np.isin(np.arange(n_slots), slot, invert=True)] = np.nan
  for k, i in np.ndindex(2, 4):
    if slot[k, i] >= 0:
      pool[k, 1, blocks[k, i]] = np.nan  # what is in a slot is read there
  actual = jax.jit(functools.partial(kernels.gather_blocks, implementation=implementation))(
    pool, slots, np.int32(1), blocks, slot
  )
  for k, i in np.ndindex(2, 4):
    if blocks[k, i] >= 0:
      wanted = slots[slot[k, i]] if slot[k, i] >= 0 else pool[k, 1, blocks[k, i]]
      assert np.isfinite(wanted).all()
      assert_same_bits(actual[k, i], wanted)


@pytest.mark.parametrize(("layer", "n_layers"), [(0, L), (2, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_store_blocks(implementation: str, layer: int, n_layers: int):
  pool, source = tagged(K, L, M, 2, S, D), tagged(K, n_layers, 5, 2, S, D, seed=1)
  source_ids, blocks = np.array([4, 0, 2, 1], np.int32), np.array([10, -1, 0, 6], np.int32)
  source[:, :, [0, 3]] = np.nan
  expected = pool.copy()
  for k, j, i in np.ndindex(K, n_layers, 4):
    if blocks[i] >= 0:
      expected[k, layer + j, blocks[i]] = source[k, j, source_ids[i]]
  actual = jax.jit(functools.partial(kernels.store_blocks, implementation=implementation))(
    pool, source, np.int32(layer), source_ids, blocks
  )
  assert_same_bits(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_place_blocks(implementation: str):
  slots, source = tagged(P, 2, S, D), tagged(K, 2, 5, 2, S, D, seed=1)
  source_ids = np.array([4, 0, 2], np.int32)
  slot = np.array([[[8, -1, 0], [3, -1, -1]], [[-1, -1, 5], [1, -1, 2]]], np.int32)
  source[:, :, [0, 1, 3]] = np.nan
  expected = slots.copy()
  for k, j, i in np.ndindex(*slot.shape):
    if slot[k, j, i] >= 0:
      expected[slot[k, j, i]] = source[k, j, source_ids[i]]
  program = jax.jit(functools.partial(kernels.place_blocks, implementation=implementation))
  assert_same_bits(program(slots, source, source_ids, slot), expected)
  assert program(slots[:0], source, source_ids, np.full_like(slot, -1)).shape == (0, 2, S, D)


def test_merge():
  """Three sets of keys, one empty, in any order and nesting, give softmax attention over them all."""
  rng = np.random.default_rng(6)
  s, v = 8 * rng.normal(size=(4, 9)), rng.normal(size=(4, 9, 5))
  parts = []
  for cut in (slice(0, 3), slice(3, 3), slice(3, 9)):
    m = s[:, cut].max(-1, initial=-np.inf)
    p = np.exp(s[:, cut] - m[:, None])
    o = np.einsum("bn,bnd->bd", p, v[:, cut])
    parts.append(kernels.Partial(*(np.asarray(x, np.float32) for x in (o, m, p.sum(-1)))))
  weight = np.exp(s)
  expected = (weight[..., None] * v).sum(1) / weight.sum(1)[:, None]
  a, empty, b = parts
  for merged in (
    kernels.merge(kernels.merge(a, empty), b),
    kernels.merge(a, kernels.merge(b, empty)),
    kernels.merge(kernels.merge(empty, b), a),
  ):
    assert_rows_close(merged.output, expected, 1e-5)
    np.testing.assert_allclose(merged.lse, np.log(weight.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(merged.m, s.max(-1), rtol=1e-6)
  nothing = kernels.merge(empty, empty)
  assert (np.asarray(nothing.output) == 0).all() and (np.asarray(nothing.lse) == -np.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_blocks", [None, 0, 2, 4])
def test_prefill_attention(prefix_blocks: int | None, dtype: str, implementation: str):
  """24 tokens are three tiles of queries. The prefix has room for 4 blocks; every second lies in a slot, not in the
  pool.
  """
  rng = np.random.default_rng(7)
  T, K, G, S, D, L, M, P = 24, 2, 3, 8, 16, 2, 9, 6
  make = lambda *dims: rng.normal(size=dims).astype(DTYPES[dtype])  # noqa: E731
  q, k, v = make(T, K, G, D), make(T, K, D), make(T, K, D)
  pool, slots = (np.full(dims, np.nan, DTYPES[dtype]) for dims in ((K, L, M, 2, S, D), (P, 2, S, D)))
  n_before = S * (prefix_blocks or 0)
  earlier = make(K, prefix_blocks or 0, 2, S, D)
  prefix = None
  if prefix_blocks is not None:
    blocks, slot = np.full((2, K, 4), -1, np.int32)
    prefix = blocks, slot
    free = iter(rng.permutation(P).tolist())
    for head, i in np.ndindex(K, prefix_blocks):
      blocks[head, i] = (3 + 2 * i) % M
      if (head + i) % 2:
        slot[head, i] = next(free)
        slots[slot[head, i]] = earlier[head, i]
      else:
        pool[head, 1, blocks[head, i]] = earlier[head, i]
  expected = np.zeros((T, K, G, D))
  for t, head, g in np.ndindex(T, K, G):
    before = earlier[head].transpose(1, 0, 2, 3).reshape(2, n_before, D)
    keys, values = (np.concatenate([before[i], x[: t + 1, head]]).astype(float) for i, x in enumerate((k, v)))
    p = np.exp(keys @ q[t, head, g].astype(float) * 0.3)
    expected[t, head, g] = p @ values / p.sum()
  attention = jax.jit(functools.partial(kernels.prefill_attention, scale=0.3, implementation=implementation))
  actual = attention(q, k, v, pool, slots, np.int32(1), prefix, np.int32(n_before))
  assert actual.dtype == q.dtype
  assert_rows_close(actual.astype(jnp.float32), expected, TOLERANCE[dtype])
