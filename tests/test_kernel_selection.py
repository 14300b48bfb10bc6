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
from pallas_kernels.score import REDUCTIONS, Linear, Ranking, box, dot
from tests.cases import DTYPES, IMPLEMENTATIONS, REAL, assert_rows_close, assert_same_bits

RULES = {"cuboid_mean": 2, "min_max": 2, "mean": 1}
on_gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests(dtype: str):
  keys = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(DTYPES[dtype])
  expected = {name: np.zeros((2, 3, n, 5)) for name, n in RULES.items()}
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


def check_store_digests(
  name: str, implementation: str, dtype: str, dims: tuple[int, ...], layer: int, blocks: list[int]
):
  """`dims` are K, L, M, Ls, S, D. Every entry without a block names a source block that does not exist."""
  K, L, M, Ls, S, D = dims
  rng = np.random.default_rng(3)
  n, n_source, n_vectors = len(blocks), len(blocks) + 2, RULES[name]
  before = rng.normal(size=(K, L, M, n_vectors, D)).astype(DTYPES[dtype])
  source = np.full((K, Ls, n_source, 2, S, D), np.nan, DTYPES[dtype])
  source_ids = np.where(np.array(blocks) < 0, n_source + 7, rng.permutation(n_source)[:n]).astype(np.int32)
  wanted = np.flatnonzero(np.array(blocks) >= 0)
  keys = rng.normal(size=(K, Ls, len(wanted), S, D)).astype(DTYPES[dtype])
  source[:, :, source_ids[wanted], 0] = keys

  high, low, average = (f(keys.astype(np.float64), axis=-2) for f in (np.max, np.min, np.mean))
  radius = np.abs(keys - ((high + low) / 2)[..., None, :]).mean(-2)
  corners = (high + low) / 2 + radius, (high + low) / 2 - radius
  digests = np.stack({"cuboid_mean": corners, "min_max": (high, low), "mean": (average,)}[name], -2)

  store = functools.partial(kernels.store_digests, rule=getattr(digest, name), implementation=implementation)
  ids = np.array(blocks, np.int32)
  actual = np.array(jax.jit(store)(before, source, np.int32(layer), source_ids, ids))
  at = np.s_[:, layer : layer + Ls, ids[wanted]]
  if name == "min_max":
    assert_same_bits(actual[at], digests.astype(DTYPES[dtype]))
  else:
    assert_rows_close(actual[at].astype(np.float64), digests, {"float32": 1e-6, "bfloat16": 2**-8}[dtype])
  actual[at] = before[at]
  assert_same_bits(actual, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(16, 64), (32, 128), (64, 64)])
@pytest.mark.parametrize("name", RULES)
def test_store_digests(name: str, S: int, D: int, dtype: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(digest, "PROGRAMS", 9)  # so that each takes several blocks, the last one fewer
  check_store_digests(name, implementation, dtype, (2, 4, 11, 2, S, D), 1, [10, -1, 0, 4, -1, -1, 7])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_store_digests_of_nothing(implementation: str):
  check_store_digests("mean", implementation, "float32", (1, 1, 3, 1, 2, 4), 0, [-1, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_store_digests_of_a_prompt_and_of_a_step(name: str):
  many = np.random.default_rng(4).permutation(700)[:512].tolist()
  check_store_digests(name, "triton", "bfloat16", (8, 3, 700, 1, 32, 128), 2, many)
  few = np.where(np.arange(64) % 20 == 7, np.arange(64), -1).tolist()
  check_store_digests(name, "triton", "bfloat16", (8, 32, 100, 32, 32, 128), 0, few)


def test_store_digests_without_digests():
  empty, source, one = jnp.zeros((1, 1, 3, 0, 4)), jnp.zeros((1, 1, 1, 2, 2, 4)), jnp.zeros(1, jnp.int32)
  assert kernels.store_digests(empty, source, 0, one, one, rule=digest.mean, implementation="triton") is empty


def test_rules_of_a_user():
  """Any function runs in XLA; no kernel takes one."""
  top_channel = lambda keys: jnp.abs(keys).max(-2, keepdims=True)  # noqa: E731
  source = jnp.array([[1, -5], [-3, 2], [9, 9], [9, 9]], jnp.float32).reshape(1, 1, 1, 2, 2, 2)
  before, one = jnp.zeros((1, 1, 3, 1, 2)), jnp.zeros(1, jnp.int32)
  actual = kernels.store_digests(before, source, 0, one, one + 2, rule=top_channel)
  assert actual.tolist() == [[[[[0, 0]], [[0, 0]], [[3, 5]]]]]
  twice = lambda q, digests: 2 * dot(q, digests)  # noqa: E731
  q, tables = jnp.ones((1, 1, 1, 2)), jnp.array([[0, 2]], jnp.int32)
  assert kernels.score(q, actual, 0, tables, one + 2, Ranking(twice)).tolist() == [[[0, 16]]]
  with pytest.raises(NotImplementedError, match="digest.Rule"):
    kernels.store_digests(before, source, 0, one, one + 2, rule=top_channel, implementation="triton")
  with pytest.raises(NotImplementedError, match="score.Linear"):
    kernels.score(q, actual, 0, tables, one + 2, Ranking(twice), implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_digest_has_the_vectors_that_its_rule_makes(implementation: str):
  source, one = jnp.zeros((1, 1, 1, 2, 8, 16)), jnp.zeros(1, jnp.int32)
  store = functools.partial(kernels.store_digests, implementation=implementation)
  with pytest.raises(ValueError, match=r"makes a digest \[2, 16\] of a block, and these are \[1, 16\]"):
    store(jnp.zeros((1, 1, 3, 1, 16)), source, 0, one, one, rule=digest.min_max)
  with pytest.raises(ValueError, match="a tuple of E vectors, not a"):
    store(jnp.zeros((1, 1, 3, 1, 16)), source, 0, one, one, rule=digest.Rule(lambda keys: keys.mean(-2)))


def test_what_an_op_cannot_do_is_said():
  q, tables, n_blocks = jnp.ones((1, 1, 1, 24)), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
  with pytest.raises(ValueError, match="reads 1 vectors of a digest, and these have 2"):
    kernels.score(q, jnp.ones((1, 1, 3, 2, 24)), 0, tables, n_blocks, Ranking(dot))
  with pytest.raises(ValueError, match="reduce='median' is none of mean, max, softmax"):
    Ranking(box, "median")
  with pytest.raises(NotImplementedError, match="'E': 3"):
    three = Linear(3, box.weight)
    kernels.score(q, jnp.ones((1, 1, 3, 3, 24)), 0, tables, n_blocks, Ranking(three), implementation="triton")
  with pytest.raises(NotImplementedError, match="'D': 24"):
    kernels.score(q, jnp.ones((1, 1, 3, 2, 24)), 0, tables, n_blocks, Ranking(box), implementation="interpret")
  with pytest.raises(ValueError, match="implementation='tritn' is none of"):
    kernels.score(q[..., :16], jnp.ones((1, 1, 3, 2, 16)), 0, tables, n_blocks, Ranking(box), implementation="tritn")
  with pytest.raises(ValueError, match="implementation='cuda' is none of"):  # though nothing is to be done
    source, one = jnp.zeros((1, 1, 1, 2, 8, 16)), jnp.zeros(1, jnp.int32)
    kernels.store_digests(jnp.zeros((1, 1, 3, 0, 16)), source, 0, one, one, rule=digest.mean, implementation="cuda")
  with pytest.raises(NotImplementedError, match="40000 best of 40000"):
    kernels.select(jnp.zeros((1, 1, 40000)), 40000, implementation="interpret")


def log_shares(logits: np.ndarray) -> np.ndarray:
  """[..., N] from float64 [..., G, N]."""
  of_head = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
  return np.logaddexp.reduce(of_head, -2)


def check_score(
  rule: str, reduce: str, implementation: str, dtype: str, dims: tuple[int, ...], n_blocks: list[int], window: int = 2
):
  """`dims` are K, G, D, N. Every block has its digest in one row; tables beyond `n_blocks` hold anything."""
  K, G, D, N = dims
  B, L, layer, sinks, n_vectors = len(n_blocks), 2, 1, 1, {"box": 2, "dot": 1}[rule]
  rng = np.random.default_rng(1)
  M = sum(n_blocks) + 3
  digests = np.full((K, L, M, n_vectors, D), np.nan, DTYPES[dtype])
  tables = rng.choice([-1, 3, M, 1 << 30], size=(B, N)).astype(np.int32)
  free = rng.permutation(np.arange(1, M))  # block 0 is none's
  q = rng.normal(size=(B, K, G, D)).astype(DTYPES[dtype])
  expected = np.full((B, K, N), -np.inf)
  for b, n in enumerate(n_blocks):
    tables[b, :n], free = free[:n], free[n:]
    vectors = np.sort(rng.normal(size=(K, n, n_vectors, D)), axis=2)[:, :, ::-1].astype(DTYPES[dtype])  # upper, lower
    forced = (np.arange(n) < sinks) | (np.arange(n) >= n - window)
    digests[:, layer, tables[b, :n]] = vectors
    digests[:, layer, tables[b, :n][forced]] = np.nan
    each = q[b].astype(float)[:, :, None, None] * vectors.astype(float)[:, None]  # [K, G, n, E, D]
    by_head = each.max(-2).sum(-1)
    if reduce == "softmax":
      expected[b, :, :n][:, ~forced] = log_shares(by_head[:, :, ~forced] * D**-0.5)
    else:
      expected[b, :, :n] = by_head.max(1) if reduce == "max" else by_head.mean(1)
    expected[b, :, :n][:, forced] = np.inf

  ranking = Ranking({"box": box, "dot": dot}[rule], reduce, sinks, window)
  score = jax.jit(functools.partial(kernels.score, ranking=ranking, implementation=implementation))
  actual = score(q, digests, np.int32(layer), tables, np.array(n_blocks, np.int32))
  assert actual.dtype == jnp.float32
  assert np.isfinite(expected).any()
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # inputs are exact, products are of float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("rule", ["box", "dot"])
def test_score(rule: str, reduce: str, dtype: str, implementation: str):
  """Three tiles of a kernel and more; rows that end in the first, and one of sinks and window alone."""
  tile = 64  # of D = 64
  if reduce == "mean":
    tile *= {"box": 1, "dot": 2}[rule] * {"bfloat16": 2, "float32": 1}[dtype]
  N = 3 * tile + 5
  check_score(rule, reduce, implementation, dtype, (1, 3, 64, N), [N, 50, 2, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
  ("rule", "G", "D"),
  [("box", 1, 128), ("box", 7, 128), ("box", 8, 16), ("dot", 2, 64), ("dot", 4, 16), ("dot", 20, 16)],
)
def test_score_of_groups(rule: str, G: int, D: int, reduce: str, implementation: str):
  """Query heads that do not fill a matrix product of a tensor core, and more than one has rows."""
  check_score(rule, reduce, implementation, "bfloat16", (2, G, D, 9), [9, 4], window=0)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_score_of_few_channels(reduce: str):
  """Fewer than a matrix product of a tensor core takes."""
  check_score("dot", reduce, "interpret", "bfloat16", (2, 4, 8, 70), [70, 4], window=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**12, 2.0**100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_scores_of_any_size(dtype: str, scale: float, implementation: str):
  """Products are exact here. Heads differ in size, and the later tiles' products are the larger ones."""
  rng = np.random.default_rng(5)
  B, K, G, D, N = 3, 1, 3, 64, 150
  n_blocks = np.array([N, 70, 3])  # all of the last row's are forced
  q = (scale * rng.integers(-3, 4, size=(B, K, G, D)) * 2.0 ** np.arange(G)[:, None]).astype(DTYPES[dtype])
  later = 2.0 ** (np.arange(N) // 64)[:, None, None]
  digests = (later * rng.integers(-3, 4, size=(K, 1, N, 1, D))).astype(DTYPES[dtype])
  ranking = Ranking(dot, "softmax", sinks=1, window=2)
  score = jax.jit(functools.partial(kernels.score, ranking=ranking, implementation=implementation))
  actual = score(q, digests, np.int32(0), np.tile(np.arange(N, dtype=np.int32), (B, 1)), n_blocks.astype(np.int32))
  logits = np.einsum("bkgd,knd->bkgn", q.astype(float), digests[:, 0, :, 0].astype(float)) * D**-0.5
  expected = np.full((B, K, N), -np.inf)
  for b, n in enumerate(n_blocks):
    expected[b, :, :n] = np.inf
    if n > 3:
      expected[b, :, 1 : n - 2] = log_shares(logits[b, :, :, 1 : n - 2])
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


squares = Linear(2, lambda q, e: jnp.where(e == 0, q * q, q * -0.3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("rule", "q_dtype"), [(box, "float32"), (squares, "bfloat16")], ids=["q", "weights"])
def test_weights_are_not_rounded(rule: Linear, q_dtype: str, reduce: str, implementation: str):
  """To the dtype of the digests, which does not hold these."""
  rng = np.random.default_rng(6)
  q = jnp.asarray(rng.normal(size=(1, 2, 3, 32)), q_dtype)
  digests = jnp.asarray(rng.normal(size=(2, 1, 20, 2, 32)), jnp.bfloat16)
  tables, n_blocks = jnp.arange(20, dtype=jnp.int32)[None], jnp.array([20], jnp.int32)
  actual, expected = (
    kernels.score(q, digests, 0, tables, n_blocks, Ranking(rule, reduce), implementation=way)
    for way in (implementation, "xla")
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Every way with seven query heads, which are padded; of the other models one for each rule.
LONG = [("qwen2.5-7b", rule, reduce) for rule in ("box", "dot") for reduce in REDUCTIONS] + [
  (model, *way) for model in REAL if model != "qwen2.5-7b" for way in (("box", "mean"), ("dot", "softmax"))
]


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "rule", "reduce"), LONG)
def test_score_of_long_rows(model: str, rule: str, reduce: str):
  check_score(rule, reduce, "triton", "bfloat16", (8, REAL[model].G, REAL[model].D, 1024), [1024, 1000, 317, 64, 1])


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("rule", [box, dot, lambda q, digests: box(q, digests) ** 2])
def test_tile_scores_are_the_mean_or_the_largest_over_query_heads(rule, reduce: str):
  """Also of a rule that is not linear; of a linear one the mean of the heads' scores is one product's."""
  rng = np.random.default_rng(0)
  q, digests = (rng.normal(size=dims).astype(np.float32) for dims in ((2, 3, 4, 16), (2, 5, 2, 16)))
  scores = np.asarray(kernels.tile_scores(rule, jnp.asarray(q), jnp.asarray(digests), reduce))
  for head, tile in np.ndindex(2, 3):
    by_head = np.asarray(rule(jnp.asarray(q[head, tile]), jnp.asarray(digests[head])))  # [G, N]
    np.testing.assert_allclose(scores[head, tile], getattr(by_head, reduce)(0), rtol=1e-5, atol=1e-5)


def test_score_without_sinks_and_window():
  q, digests = jnp.ones((1, 1, 1, 2)), jnp.arange(8, dtype=jnp.float32).reshape(1, 1, 4, 1, 2)
  actual = kernels.score(q, digests, 0, jnp.array([[3, 0, 2]]), jnp.array([2]), Ranking(dot))
  assert actual.tolist() == [[[13.0, 1.0, -math.inf]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("N", "k"),
  [
    *((1, 1), (2, 1), (12, 1), (12, 5), (12, 11), (12, 12), (64, 64), (100, 37), (100, 100), (300, 129)),
    *(on_gpu(1024, 64), on_gpu(1024, 1024), on_gpu(4096, 64), on_gpu(4096, 4096), on_gpu(5000, 63), on_gpu(5000, 5000)),
    *(on_gpu(16384, 64), on_gpu(16384, 16384), on_gpu(32768, 100), on_gpu(32768, 16384)),
  ],
)
def test_select_breaks_ties_by_the_lowest_id(N: int, k: int, implementation: str):
  rng = np.random.default_rng(2)
  scores = rng.integers(-1, 3, size=(3, 3, N)).astype(np.float32)
  scores[0, :, N // 2 :] = -np.inf
  scores[0, 1] = -np.inf
  scores[1, :, [0, N // 3, N - 1]] = np.inf
  scores[2, 0] = rng.normal(size=N)
  scores[2, 1] = np.where(rng.random(N) < 0.5, 1e-40, -1e-40)  # denormal
  scores[2, 2, -1:] = np.finfo(np.float32).max
  ranked, actual = jax.jit(functools.partial(kernels.select, k=k, implementation=implementation))(scores)
  expected = np.argsort(-scores, axis=-1, kind="stable")[..., :k].astype(np.int32)
  assert_same_bits(actual, expected)
  assert_same_bits(ranked, np.take_along_axis(scores, expected, -1))

  # The blocks that stand there: of a row all, half of them (the others' scores are -inf), or none.
  n_blocks = np.array([N, N // 2, 0], np.int32)
  scores[1:] = np.where(np.arange(N) < n_blocks[1:, None, None], scores[1:], -np.inf)
  tables = rng.permutation(3 * N).reshape(3, N).astype(np.int32)
  listed = kernels.Listed(jnp.asarray(tables), jnp.asarray(n_blocks))
  _, blocks = jax.jit(functools.partial(kernels.select, k=k, implementation=implementation))(scores, listed=listed)
  ids = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
  of_row = np.arange(3)[:, None, None]
  assert_same_bits(blocks, np.where(ids < n_blocks[:, None, None], tables[of_row, ids], -1).astype(np.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [4, 8])
def test_a_list_of_scores_that_are_not_numbers_is_as_long_as_it_says(k: int, implementation: str):
  """NaN of either sign, which a row that is not finite has, comes before what is no block."""
  scores = np.full((2, 1, 8), -np.inf, np.float32)
  scores[0, 0, :3], scores[1, 0, :3] = np.nan, -np.float32(np.nan)
  listed = kernels.Listed(jnp.arange(10, 26, dtype=jnp.int32).reshape(2, 8), jnp.full(2, 3, jnp.int32))
  select = jax.jit(functools.partial(kernels.select, k=k, implementation=implementation))
  blocks = np.asarray(select(scores, listed=listed)[1])
  assert [sorted(of[:3]) for of in blocks[:, 0].tolist()] == [[10, 11, 12], [18, 19, 20]]
  assert (blocks[:, 0, 3:] == -1).all()
