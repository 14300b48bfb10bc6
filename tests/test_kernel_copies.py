"""Block copies against loops in numpy. What an op must not read is NaN in its inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as kernels
from pallas_kernels import copy
from sparse_serve_jax.memory import host_pool
from tests.cases import DTYPES, IMPLEMENTATIONS, assert_rows_close, assert_same_bits


def tagged(*dims: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=dims).astype(DTYPES[dtype])


def jitted(op, implementation: str):
  return jax.jit(functools.partial(op, implementation=implementation))


class Lists(NamedTuple):
  """A list of blocks to copy, B x K x n entries, of which a share has something to do."""

  B: int
  K: int
  n: int
  filled: float
  S: int = 8
  D: int = 16
  dtype: str = "float32"


LISTS = {
  "one": Lists(1, 1, 1, 1.0),
  "nothing": Lists(2, 2, 9, 0.0),
  "fewer than programs": Lists(2, 2, 3, 0.7),
  "more than programs": Lists(3, 2, 13, 0.7),
  "all": Lists(3, 2, 8, 1.0, dtype="bfloat16"),
  "parts": Lists(1, 2, 3, 0.7, 32, 128),
  "parts of a half": Lists(1, 2, 2, 1.0, 64, 128),
}
GPU = pytest.mark.gpu
RUNS = [
  *(
    pytest.param(case, *run, id=f"{name}-{run[0]}")
    for name, case in LISTS.items()
    for run in (("xla", None), ("interpret", None))
  ),
  *(pytest.param(case, "triton", None, marks=GPU, id=f"{name}-triton") for name, case in LISTS.items()),
  # Two programs look at their entries in several rounds.
  pytest.param(LISTS["more than programs"], "interpret", 2, id="rounds-interpret"),
  pytest.param(LISTS["more than programs"], "triton", 2, marks=GPU, id="rounds-triton"),
]
L, M = 3, 11


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch):
  """Limits the programs of a copy, and what one of them looks at together, if given a number."""

  def limit(programs: int | None):
    if programs:
      monkeypatch.setattr(copy, "PCIE_PROGRAMS", programs)
      monkeypatch.setattr(copy, "HBM_PROGRAMS", programs)
      monkeypatch.setattr(copy, "LANES", 4)

  return limit


def some(rng: np.random.Generator, share: float, values: np.ndarray) -> np.ndarray:
  """`values` with all but a share of them -1."""
  empty = rng.permutation(values.size).reshape(values.shape) >= round(share * values.size)
  return np.where(empty, -1, values).astype(np.int32)


@pytest.mark.parametrize(("case", "implementation", "programs"), RUNS)
def test_load_blocks(case: Lists, implementation: str, programs: int | None, few):
  few(programs)
  B, K, n, filled, S, D, dtype = case
  rng, P = np.random.default_rng(1), B * K * n + 2
  pool, slots = tagged(K, L, M, 2, S, D, dtype=dtype), tagged(P, 2, S, D, dtype=dtype, seed=1)
  blocks = some(rng, filled, rng.integers(M, size=(B, K, n)))
  slot = some(rng, max(filled, 0.5), rng.permutation(P)[: B * K * n].reshape(B, K, n))
  read = np.zeros((K, L, M), bool)
  expected = slots.copy()
  for b, k, i in np.ndindex(*blocks.shape):
    if blocks[b, k, i] >= 0 and slot[b, k, i] >= 0:
      expected[slot[b, k, i]] = pool[k, 2, blocks[b, k, i]]
      read[k, 2, blocks[b, k, i]] = True
  pool[~read] = np.nan
  actual = jitted(kernels.load_blocks, implementation)(pool, slots, np.int32(2), blocks, slot)
  assert_same_bits(actual, expected)
  assert np.isfinite(expected.astype(np.float32)).all()


@pytest.mark.parametrize(("case", "implementation", "programs"), RUNS)
def test_gather_blocks(case: Lists, implementation: str, programs: int | None, few):
  """What a block of -1 stands for is zeros, whatever its slot says."""
  few(programs)
  B, K, n, filled, S, D, dtype = case
  rng, n = np.random.default_rng(2), B * n
  pool, slots = (np.full(dims, np.nan, DTYPES[dtype]) for dims in ((K, L, M, 2, S, D), (K * n, 2, S, D)))
  blocks = some(rng, filled, np.stack([rng.permutation(n + 3)[:n] % M for _ in range(K)]))
  slot = some(rng, 0.5, rng.permutation(K * n).reshape(K, n))
  expected = np.zeros((2, n, S, K, D), DTYPES[dtype])
  for k, i in np.ndindex(K, n):
    if blocks[k, i] >= 0:
      block = slots[slot[k, i]] if slot[k, i] >= 0 else pool[k, 1, blocks[k, i]]
      if np.isnan(block.astype(np.float32)).all():
        block[:] = tagged(2, S, D, dtype=dtype, seed=100 * k + i)
      expected[:, i, :, k] = block
  actual = jitted(kernels.gather_blocks, implementation)(pool, slots, np.int32(1), blocks, slot)
  for x, wanted in zip(actual, expected, strict=True):
    assert_same_bits(x, wanted.reshape(n * S, K, D))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gather_leaves_what_is_beyond(implementation: str):
  """Blocks below -1 may hold anything; there are no slots at all."""
  pool, slots = tagged(2, 1, 3, 2, 8, 16), tagged(0, 2, 8, 16)
  blocks, slot = np.array([[1, -1, -2, -2], [2, -1, -2, -2]], np.int32), np.full((2, 4), -1, np.int32)
  k, v = jitted(kernels.gather_blocks, implementation)(pool, slots, np.int32(0), blocks, slot)
  for x, half in ((k, 0), (v, 1)):
    assert_same_bits(x[:8].swapaxes(0, 1), pool[[0, 1], 0, [1, 2], half])
    assert (np.asarray(x[8:16]) == 0).all()


@pytest.mark.parametrize(("case", "implementation", "programs"), RUNS)
def test_store_blocks(case: Lists, implementation: str, programs: int | None, few):
  few(programs)
  B, K, n, filled, S, D, dtype = case
  rng, n, layer, n_layers = np.random.default_rng(3), B * n, 1, 2
  M, n_source = n + 3, n + 2
  pool, source = tagged(K, L, M, 2, S, D, dtype=dtype), tagged(K, n_layers, n_source, 2, S, D, dtype=dtype, seed=1)
  source_ids = rng.permutation(n_source)[:n].astype(np.int32)
  blocks = some(rng, filled, rng.permutation(M)[:n])
  source[:, :, np.isin(np.arange(n_source), source_ids[blocks >= 0], invert=True)] = np.nan
  expected = pool.copy()
  for k, j, i in np.ndindex(K, n_layers, n):
    if blocks[i] >= 0:
      expected[k, layer + j, blocks[i]] = source[k, j, source_ids[i]]
  actual = jitted(kernels.store_blocks, implementation)(pool, source, np.int32(layer), source_ids, blocks)
  assert_same_bits(actual, expected)


@pytest.mark.parametrize(("case", "implementation", "programs"), RUNS)
def test_place_blocks(case: Lists, implementation: str, programs: int | None, few):
  few(programs)
  n_layers, K, n, filled, S, D, dtype = case
  rng, n_source, P = np.random.default_rng(4), n + 2, K * n_layers * n + 2
  slots, source = tagged(P, 2, S, D, dtype=dtype), tagged(K, n_layers, n_source, 2, S, D, dtype=dtype, seed=1)
  source_ids = rng.permutation(n_source)[:n].astype(np.int32)
  slot = some(rng, filled, rng.permutation(P)[: K * n_layers * n].reshape(K, n_layers, n))
  expected, read = slots.copy(), np.zeros(source.shape[:3], bool)
  for k, j, i in np.ndindex(*slot.shape):
    if slot[k, j, i] >= 0:
      expected[slot[k, j, i]] = source[k, j, source_ids[i]]
      read[k, j, source_ids[i]] = True
  source[~read] = np.nan
  program = jitted(kernels.place_blocks, implementation)
  assert_same_bits(program(slots, source, source_ids, slot), expected)
  assert program(slots[:0], source, source_ids, np.full_like(slot, -1)).shape == (0, 2, S, D)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_copy(implementation: str):
  pool, slots = tagged(2, L, M, 2, 8, 16), tagged(4, 2, 8, 16)
  none = functools.partial(np.zeros, dtype=np.int32)
  ops = kernels.load_blocks, kernels.gather_blocks, kernels.store_blocks, kernels.place_blocks
  load, gather, store, place = (jitted(op, implementation) for op in ops)
  for dims in ((0, 2, 3), (3, 2, 0)):
    assert_same_bits(load(pool, slots, np.int32(0), none(dims), none(dims)), slots)
  one = none((1, 2, 3))
  assert load(pool, slots[:0], np.int32(0), one, one - 1).shape == (0, 2, 8, 16)
  for of in (slots, slots[:0]):
    k, v = gather(pool, of, np.int32(0), none((2, 0)), none((2, 0)))
    assert k.shape == v.shape == (0, 2, 16) and k.dtype == v.dtype == pool.dtype
  assert_same_bits(store(pool, pool, np.int32(0), none(0), none(0)), pool)
  assert_same_bits(place(slots, pool, none(0), none((2, L, 0))), slots)


def test_copies_refuse_what_they_cannot_do():
  pool, one, listed = jnp.zeros((1, 1, 1, 2, 8, 24)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 1), jnp.int32)
  for copies in (
    lambda slots, **on: kernels.load_blocks(pool, slots, 0, listed, listed, **on),
    lambda slots, **on: kernels.gather_blocks(pool, slots, 0, listed[0], listed[0], **on),
    lambda _, **on: kernels.store_blocks(pool, pool, 0, one, one, **on),
    lambda slots, **on: kernels.place_blocks(slots, pool, one, listed, **on),
  ):
    for slots in (pool[0, 0], pool[0, 0, :0]):
      with pytest.raises(NotImplementedError, match="'D': 24"):
        copies(slots, implementation="triton")
      with pytest.raises(ValueError, match="implementation='cuda' is none of"):
        copies(slots, implementation="cuda")


@pytest.mark.gpu
def test_copies_with_a_pool_in_host_memory():
  """Blocks go to the pool and come back, which stays where it is and is updated in place."""
  K, L, M, S, D, n = 2, 2, 64, 32, 128, 48
  mesh = jax.make_mesh((1,), ("tp",))
  whole = NamedSharding(mesh, PartitionSpec())
  host = NamedSharding(mesh, PartitionSpec("tp"), memory_kind=host_pool.memory_kind())
  each = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  canary = tagged(K, L, M, 2, S, D, dtype="bfloat16")
  pool = jax.device_put(canary, host)
  source, slots = tagged(K, 1, n, 2, S, D, dtype="bfloat16", seed=1), tagged(K * n, 2, S, D, dtype="bfloat16", seed=2)
  rng = np.random.default_rng(5)
  blocks, ids, slot = (rng.permutation(x).astype(np.int32) for x in (M, n, K * n))
  blocks = some(rng, 0.8, blocks[:n])
  listed, slot = np.broadcast_to(blocks, (1, K, n)), slot.reshape(1, K, n)

  store = functools.partial(kernels.store_blocks, implementation="triton")
  store = jax.jit(
    each(store, in_specs=(host.spec, *[PartitionSpec()] * 4), out_specs=host.spec), donate_argnums=0, out_shardings=host
  )
  before = pool.unsafe_buffer_pointer()
  pool = store(pool, source, np.int32(1), ids, blocks)
  assert pool.sharding.memory_kind == "pinned_host" and pool.unsafe_buffer_pointer() == before
  expected, loaded = canary.copy(), slots.copy()
  for k, i in np.ndindex(K, n):
    if blocks[i] >= 0:
      expected[k, 1, blocks[i]] = loaded[slot[0, k, i]] = source[k, 0, ids[i]]
  assert_same_bits(pool, expected)

  def back(pool, slots):
    missing = jnp.full((K, n), -1)
    return (
      kernels.load_blocks(pool, slots, jnp.int32(1), listed, slot, implementation="triton"),
      kernels.gather_blocks(pool, slots, jnp.int32(1), listed[0], missing, implementation="triton"),
    )

  back = jax.jit(each(back, in_specs=(host.spec, PartitionSpec()), out_specs=PartitionSpec()), out_shardings=whole)
  actual, (keys, values) = back(pool, slots)
  assert_same_bits(actual, loaded)
  wanted = np.where((blocks >= 0)[:, None, None, None], expected[:, 1, blocks], 0)  # [K, n, 2, S, D]
  for x, half in ((keys, 0), (values, 1)):
    assert_same_bits(np.asarray(x).reshape(n, S, K, D), wanted[:, :, half].transpose(1, 2, 0, 3))


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
