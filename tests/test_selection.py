"""Selection methods: their formulas by hand, a new one from outside, and what a step makes of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import digest
from pallas_kernels.score import box, dot
from sparse_serve_jax.attention import METHODS, Method, get_method
from sparse_serve_jax.attention.decode import Rows, Selector
from sparse_serve_jax.memory.kv_cache import Hot
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.tiny import config, greedy, poisoned, prompt_of, serve, tiny_model

# --------------------------------------------------------------------------------------------------------- the formulas


def test_cuboid_mean_by_hand():
  """ArkVale, equations 3 and 4. The second channel's box leaves its largest key out: it is no bound."""
  keys = jnp.array([[0.0, -1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 7.0]])
  #   channel 0: centre 3, deviations 3 1 1 3, so radius 2;   channel 1: centre 3, deviations 4 2 2 4, so radius 3
  upper_lower = METHODS["cuboid_mean"].summarize(keys)
  assert upper_lower.tolist() == [[5.0, 6.0], [1.0, 0.0]]
  q = jnp.array([[2.0, 1.0], [2.0, -1.0], [-1.0, -1.0]])
  scores = METHODS["cuboid_mean"].score(q, upper_lower[None])
  assert scores.tolist() == [[16.0], [10.0], [-1.0]]  # 2·5 + 6;  2·5 - 0;  -1 - 0
  assert (q @ keys.T).max(-1).tolist() == [19.0, 7.0, 1.0]


def test_min_max_and_mean_by_hand():
  keys = jnp.array([[0.0, -1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 7.0]])
  q = jnp.array([[2.0, -1.0]])
  assert METHODS["min_max"].summarize(keys).tolist() == [[6.0, 7.0], [0.0, -1.0]]
  assert METHODS["min_max"].score(q, METHODS["min_max"].summarize(keys)[None]).tolist() == [[13.0]]
  assert METHODS["mean"].summarize(keys).tolist() == [[3.0, 2.0]]
  assert METHODS["mean"].score(q, METHODS["mean"].summarize(keys)[None]).tolist() == [[4.0]]


vectors = st.lists(st.integers(-9, 9), min_size=3, max_size=3)


@given(st.lists(vectors, min_size=1, max_size=4), vectors)
def test_min_max_is_an_upper_bound(keys, q):
  """Quest's claim, in numbers that float32 adds exactly; one key is its own bound."""
  keys, q = np.array(keys, np.float32), np.array([q], np.float32)
  bound = METHODS["min_max"].score(jnp.asarray(q), METHODS["min_max"].summarize(jnp.asarray(keys))[None])[0, 0]
  assert bound == (q @ keys.T).max() if len(keys) == 1 else bound >= (q @ keys.T).max()


@pytest.mark.parametrize("name", METHODS)
def test_vectors_is_what_summarize_makes(name: str):
  for dtype in (jnp.float32, jnp.bfloat16):
    summary = METHODS[name].summarize(jnp.ones((2, 8, 4), dtype))
    assert summary.shape == (2, METHODS[name].vectors, 4) and summary.dtype == dtype


def test_an_unknown_method_names_those_there_are():
  with pytest.raises(ValueError, match=r"'cuboid'; known: cuboid_mean, mean, min_max"):
    get_method("cuboid")


# ----------------------------------------------------------------------------------------------------- what is selected

# Digests are the key's one vector, [block number, 0] and [0, block number]: a query reads its scores off.
BY_NUMBER = Method(1, digest.mean, dot)
TABLE = np.array([[7, 2, 9, 0, 5, 3, 8, 1]], np.int32)


def selected(selector: Selector, scores: np.ndarray, n_blocks: int) -> tuple[list[int], int]:
  """Positions selected for one row and KV head when query head g scores position i as scores[g, i]."""
  G, n = scores.shape
  digests = np.full((1, 2, 10, 1, G), np.nan, np.float32)
  digests[0, 1, TABLE[0, :n_blocks], 0] = scores.T[:n_blocks]
  nothing = dict.fromkeys((field.name for field in dataclasses.fields(Hot)), None)
  hot = Hot(**(nothing | {"digest": jnp.asarray(digests)}))
  column = lambda x: jnp.array([x], jnp.int32)  # noqa: E731
  at = Rows(column(0), jnp.asarray(TABLE[:, :n]), column(n_blocks), column(1), column(0))
  q = jnp.eye(G, dtype=jnp.float32)[None, None]
  blocks, count = selector.select(q, hot, jnp.int32(1), selector.lists_of(at, 1), "xla")
  used = int(count[0, 0])
  assert (np.asarray(blocks)[0, 0, used:] == -1).all()
  return [TABLE[0].tolist().index(b) for b in blocks[0, 0, :used].tolist()], used


def topk(limit: int, **changes) -> Selector:
  selector = Selector(BY_NUMBER, limit, sinks=1, window=2, reduce="mean", progressive=False, group_blocks=4)
  return dataclasses.replace(selector, **changes)


ONE_HEAD = np.array([[0.0, 3.0, 1.0, 6.0, 2.0, 4.0, 5.0, 9.0]])


def test_topk_takes_sinks_and_window_then_the_best():
  assert selected(topk(5), ONE_HEAD, 8)[0] == [0, 6, 7, 3, 5]  # the always attended ones tie: lowest first
  assert selected(topk(5), ONE_HEAD, 7)[0] == [0, 5, 6, 3, 1]  # the last block does not exist
  assert selected(topk(5), ONE_HEAD, 2)[0] == [0, 1]
  assert selected(topk(5), ONE_HEAD, 0)[0] == []


@pytest.mark.parametrize("limit", [8, 9])
def test_what_a_table_holds_at_most_is_not_ranked(limit: int):
  """Nor are digests read, here NaN."""
  assert selected(topk(limit), np.full((1, 8), np.nan), 7)[0] == list(range(7))
  unlike = lambda ranked, length: length - 1  # noqa: E731  but by a method with a budget of its own
  assert selected(topk(limit, method=dataclasses.replace(BY_NUMBER, budget=unlike)), ONE_HEAD, 8)[1] == 7


def test_dense_takes_every_block_in_order():
  config_ = config("sparse.token_budget=40", "sparse.dense_layers=1")
  dense = Selector.of(config_).dense
  assert selected(dataclasses.replace(dense, method=BY_NUMBER), ONE_HEAD, 7)[0] == list(range(7))
  assert Selector.of(config_).limit == 5


def test_psa_ranks_every_block():
  psa = dataclasses.replace(Selector.of(config("sparse.policy=psa")), method=BY_NUMBER)
  assert selected(psa, ONE_HEAD, 8)[0] == [0, 6, 7, 3, 5, 1, 4, 2]
  assert psa.progressive and not psa.dense.progressive


def test_group_reduce():
  """One head loves block 3 and the other hates it; both like block 4 a little."""
  scores = np.array([[0.0, 0.0, 0.0, 9.0, 1.0, 0.0], [0.0, 0.0, 0.0, -9.0, 1.0, 0.0]])
  assert selected(topk(1, sinks=0, window=0), scores, 6)[0] == [4]
  assert selected(topk(1, sinks=0, window=0, reduce="max"), scores, 6)[0] == [3]
  assert selected(topk(1, sinks=0, window=0, reduce="softmax"), scores, 6)[0] == [3]


def test_a_head_with_a_large_query_counts_no_more_than_another_by_shares():
  """The first is sure of block 2 among many, the other, ten times as loud, prefers all of the others a little."""
  quiet, loud = [0.0, 0.0, 3.0, 0.0], [20.0, 20.0, 0.0, 20.0]
  scores = np.array([quiet, loud])
  assert selected(topk(1, sinks=0, window=0), scores, 4)[0] == [0]
  assert selected(topk(1, sinks=0, window=0, reduce="softmax"), scores, 4)[0] == [2]


def test_shares_too_small_for_float32_keep_their_order():
  scores = np.array([[0.0, -400.0, 9.0, -500.0, -300.0]])
  psa = topk(5, sinks=0, window=0, reduce="softmax", progressive=True)
  assert selected(psa, scores, 5)[0] == [2, 0, 4, 1, 3]


# ------------------------------------------------------------------------------- a new method, from outside the package


def top_p(budget: float):
  """As many ranked blocks as hold `budget` of the softmax over block scores, like Twilight (arXiv 2502.02770)."""

  def blocks(scores: jax.Array, length: jax.Array) -> jax.Array:
    forced = scores == jnp.inf  # sinks and window
    exists = jnp.arange(scores.shape[-1])[None, None] < length[..., None]
    p = jax.nn.softmax(jnp.where(exists & ~forced, scores, -1e30), axis=-1)
    before = jnp.cumsum(p, -1) - p
    return (exists & (forced | (before < budget))).sum(-1, dtype=jnp.int32)

  return blocks


def scaled_box(q: jax.Array, digests: jax.Array) -> jax.Array:
  return box(q, digests) * q.shape[-1] ** -0.5


def twilight(budget: float) -> Method:
  return Method(2, digest.min_max, scaled_box, budget=top_p(budget))


def test_top_p_takes_the_fewest_blocks_that_reach_the_budget():
  mass = np.array([[1.0, 0.3, 0.05, 0.5, 0.15, 1.0, 1.0]])  # the first, and the last two, are always attended
  method = dataclasses.replace(BY_NUMBER, budget=top_p(0.85))
  assert selected(topk(7, method=method), np.log(mass), 7)[0] == [0, 5, 6, 3, 1, 4]
  method = dataclasses.replace(BY_NUMBER, budget=top_p(0.75))
  assert selected(topk(7, method=method), np.log(mass), 7)[0] == [0, 5, 6, 3, 1]
  assert selected(topk(7, method=method), np.log(mass), 2)[0] == [0, 1]
  assert selected(topk(7, method=method), np.log(mass), 0)[0] == []
  assert selected(topk(4, method=method), np.log(mass), 7)[0] == [0, 5, 6, 3]  # never beyond the token budget


def test_a_new_method_decodes(monkeypatch):
  """Registered under a name, it needs nothing else: digests, selection and residency follow."""
  model, prompts, n = tiny_model(), [prompt_of(120, seed=1), prompt_of(43, seed=2)], 12
  attended = {}
  for name, method in (("top_p_all", twilight(2.0)), ("top_p", twilight(0.85))):
    monkeypatch.setitem(METHODS, name, method)
    tokens, engine = serve(config(f"sparse.method={name}"), model, prompts, n)
    attended[name] = engine.usage.blocks_attended
    if name == "top_p_all":
      assert tokens == [greedy("gqa2", tuple(p), n) for p in prompts]
  per_step = model.config.n_layers * model.config.n_kv_heads
  always = sum(per_step * 3 for _ in prompts for _ in range(n - 1))
  full = sum(per_step * ((len(p) + i) // 8) for p in prompts for i in range(n - 1))
  assert attended["top_p_all"] == full
  assert always < attended["top_p"] < full


# -------------------------------------------------------------------------------------------------- steps of the engine


def run_recorded(conf, prompt: list[int], n: int):
  """Serves one prompt. Returns the executor, the block table, and the blocks attended to in each decode step."""
  model = tiny_model()
  executor = poisoned(JaxExecutor(conf, model))
  engine = Engine(executor)
  submit, tables, pending = executor.submit, [], []

  def recorded(plan):
    tables.extend(admission.table for admission in plan.admit)
    result = submit(plan)
    pending.extend([result] if plan.decode else [])
    return result

  executor.submit = recorded
  engine.add_request(prompt, n)
  engine.run()
  return executor, tables[0], [x.result().stats.attended for x in pending]


def test_dense_layers_attend_to_everything():
  """One of the two layers does; the other has room for five blocks."""
  prompt, n = prompt_of(100, seed=3), 6
  executor, _, attended = run_recorded(config("sparse.token_budget=40", "sparse.dense_layers=1"), prompt, n)
  full = [(len(prompt) + step) // 8 for step in range(n - 1)]
  assert full[0] < full[-1]  # a block fills on the way
  assert attended == [executor.shape.K * (blocks + 5) for blocks in full]


@pytest.mark.parametrize("method", ["cuboid_mean", "mean"])
def test_digests_are_those_of_their_blocks(method: str):
  """Every full block of prompt and output, and no other."""
  prompt, n = prompt_of(37, seed=4), 30
  executor, table, _ = run_recorded(config(f"sparse.method={method}"), prompt, n)
  pool, digests = np.asarray(executor.cache.pool), np.asarray(executor.cache.hot.digest)
  n_full = (len(prompt) + n - 1) // 8
  blocks = table[:n_full]
  assert n_full == 8 and sorted(blocks) != sorted(range(n_full))[::-1]
  expected = METHODS[method].summarize(jnp.asarray(pool[:, :, blocks, 0]))
  assert np.isfinite(expected).all()
  np.testing.assert_allclose(digests[:, :, blocks], expected, rtol=1e-6, atol=1e-6)
  others = np.setdiff1d(np.arange(pool.shape[2]), blocks)
  assert np.isnan(digests[:, :, others]).all() and np.isnan(pool[:, :, others]).all()
