"""Digests, scores and selection against oracles in plain numpy, written here. What an op must not read is NaN."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import digest
from pallas_kernels.score import box, dot
from tests.cases import DTYPES, assert_rows_close


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests(dtype: str):
  keys = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(DTYPES[dtype])
  expected = {name: np.zeros((2, 3, n, 5)) for name, n in (("cuboid_mean", 2), ("min_max", 2), ("mean", 1))}
  for i, j, d in np.ndindex(2, 3, 5):
    column = [float(keys[i, j, s, d]) for s in range(8)]
    centre = (max(column) + min(column)) / 2
    radius = sum(abs(x - centre) for x in column) / 8
    expected["cuboid_mean"][i, j, :, d] = centre + radius, centre - radius
    expected["min_max"][i, j, :, d] = max(column), min(column)
    expected["mean"][i, j, 0, d] = sum(column) / 8
  for name, value in expected.items():
    actual = jax.jit(getattr(digest, name))(keys)
    assert actual.dtype == keys.dtype
    assert_rows_close(actual.astype(jnp.float32), value, {"float32": 1e-6, "bfloat16": 2**-8}[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("rule", "n_vectors"), [("box", 2), ("dot", 1)])
def test_score(rule: str, n_vectors: int, reduce: str, dtype: str):
  rng = np.random.default_rng(1)
  B, K, G, D, L, M, N, sinks, window, layer = 4, 2, 3, 16, 2, 40, 9, 1, 2, 1
  n_blocks = np.array([9, 4, 2, 0], np.int32)  # the third row is all sinks and window
  ids = rng.permutation(M)[: B * N].reshape(B, N)
  tables = np.where(np.arange(N) < n_blocks[:, None], ids, -1).astype(np.int32)
  tables[1, 6] = ids[1, 6]  # beyond n_blocks a table may hold anything
  digests = np.full((K, L, M, n_vectors, D), np.nan, DTYPES[dtype])
  for b in range(B):
    for i in range(n_blocks[b]):
      vectors = np.sort(rng.normal(size=(K, n_vectors, D)), axis=1)[:, ::-1]  # upper, lower
      digests[:, layer, tables[b, i]] = vectors
  q = rng.normal(size=(B, K, G, D)).astype(DTYPES[dtype])

  expected = np.full((B, K, N), -np.inf)
  for b, k in np.ndindex(B, K):
    for i in range(n_blocks[b]):
      heads = []
      for g in range(G):
        upper, lower = (digests[k, layer, tables[b, i], e].astype(np.float64) for e in (0, -1))
        head = q[b, k, g].astype(np.float64)
        heads.append(
          sum(max(x * u, x * v) if rule == "box" else x * u for x, u, v in zip(head, upper, lower, strict=True))
        )
      expected[b, k, i] = max(heads) if reduce == "max" else sum(heads) / G
      if i < sinks or i >= n_blocks[b] - window:
        expected[b, k, i] = np.inf

  options = dict(rule={"box": box, "dot": dot}[rule], reduce=reduce, sinks=sinks, window=window)
  actual = jax.jit(functools.partial(kernels.score, **options))(q, digests, np.int32(layer), tables, n_blocks)
  assert actual.dtype == jnp.float32
  assert np.isfinite(expected).any()
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # inputs are exact, products are of float32


def test_score_without_sinks_and_window():
  q, digests = np.ones((1, 1, 1, 2), np.float32), np.arange(8, dtype=np.float32).reshape(1, 1, 4, 1, 2)
  actual = kernels.score(q, digests, 0, np.array([[3, 0, 2]], np.int32), np.array([2], np.int32), rule=dot)
  assert actual.tolist() == [[[13.0, 1.0, -math.inf]]]


@pytest.mark.parametrize("k", [1, 5, 12])
def test_select_breaks_ties_by_the_lowest_id(k: int):
  rng = np.random.default_rng(2)
  scores = rng.integers(-1, 3, size=(3, 2, 12)).astype(np.float32)
  scores[0, :, 7:] = -np.inf
  scores[1, :, [0, 3, 10]] = np.inf
  ranked, actual = (np.asarray(x) for x in kernels.select(scores, k))
  np.testing.assert_array_equal(ranked, np.take_along_axis(np.asarray(scores), actual, -1))
  assert actual.dtype == np.int32
  for b, h in np.ndindex(3, 2):
    assert actual[b, h].tolist() == sorted(range(12), key=lambda i: (-scores[b, h, i], i))[:k]
