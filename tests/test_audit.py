"""Audits of what PSA promises: the true share is that of all keys, nothing else changes, and a threshold that moves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_serve_jax.attention.methods import METHODS, Method
from sparse_serve_jax.config import EngineConfig, SparseConfig, override
from sparse_serve_jax.models import llama
from sparse_serve_jax.serving import audit
from sparse_serve_jax.serving.audit import Audits, wilson
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Audited, AuditOf, DecodeRow, Observed, Plan, Sampling
from tests.fake_engine import SHAPE, continuation, fake_executor
from tests.tiny import config, new_engine, often, poisoned, prompt_of, serve, tiny_model, with_slots

PROMPTS = [prompt_of(n, seed=n) for n in (150, 37, 96)]
PSA = ("sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=2", "scheduler.batch_control=none")
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
SETTINGS = {
  "tight": (),
  "host_loop": ("sparse.stop=host_loop",),
  "in_hbm": ("cache.offload=false",),
  "interpret": ("implementation=interpret",),
  "dense_layer": ("sparse.dense_layers=1", "sparse.rest=last_group", "cache.zones=layer"),
  "two_devices": ("tp=2",),
}


class Watched(JaxExecutor):
  """Audits every decode step, and keeps what tells the true share without it."""

  def __init__(self, conf: EngineConfig, model):
    super().__init__(conf, model)
    self.seen: list[tuple[Any, ...]] = []

  def submit(self, plan: Plan):
    if not plan.decode:
      return super().submit(plan)
    i, dense = plan.iteration, self.config.sparse.dense_layers
    of = AuditOf(i % len(plan.decode), dense + i // 2 % (self.shape.L - dense))
    tokens = np.asarray(self.cache.hot.last_token)
    step, row = super().submit(dataclasses.replace(plan, audit=of)), plan.decode[of.row]
    hot = self.cache.hot
    pool = jax.device_put(self.cache.pool, hot.tail.sharding)  # a view of pinned memory would forbid its donation
    kept = jax.device_get((pool, hot.tail, hot.tables, hot.maps.last_selected))
    self.seen.append((of, row, int(tokens[row.lane]), kept, step))
    return step


def by_hand(model, of: AuditOf, row: DecodeRow, token: int, kept) -> tuple[np.ndarray, np.ndarray]:
  """Shares [K, G] and unread blocks [K], from the query and all keys: what was read says the cache's own note of it."""
  (pool, tail, tables, last_selected), cfg = kept, model.config
  n, in_tail = divmod(row.position, tail.shape[4])
  blocks = tables[row.lane][:n]
  x, cos_sin = llama.embed(model.params, jnp.array([token])), llama.rope(cfg, jnp.array([row.position]))
  share = read = np.zeros(0)
  for layer in range(of.layer + 1):
    lp = llama.layer_params(model.params, layer)
    q = np.asarray(llama.qkv(cfg, lp, x, cos_sin)[0][0], np.float64)  # [K, G, D]
    kv = np.moveaxis(pool[:, layer, blocks], 2, 1)  # [K, 2, n, S, D]
    kv = np.concatenate([kv.reshape(*kv.shape[:2], -1, kv.shape[-1]), tail[:, layer, row.lane, :, : in_tail + 1]], 2)
    read = last_selected[:, layer, blocks] == row.step  # [K, n]
    wanted = np.pad(np.repeat(read, tail.shape[4], 1), ((0, 0), (0, in_tail + 1)), constant_values=True)
    mass = np.exp(np.einsum("kgd,ktd->kgt", q, kv[:, 0]) * cfg.head_dim**-0.5)
    share = (mass * wanted[:, None]).sum(-1) / mass.sum(-1)
    p = mass * wanted[:, None] / (mass * wanted[:, None]).sum(-1, keepdims=True)
    o = jnp.asarray(np.einsum("kgt,ktd->kgd", p, kv[:, 1])[None], jnp.float32)
    x = llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None)
  return share, (~read).sum(-1)


@CPU_AND_GPU
@pytest.mark.parametrize("name", often(SETTINGS, "interpret", "dense_layer", "two_devices"))
def test_shares_are_those_of_all_keys_and_nothing_else_changes(device, name):
  """Tokens, blocks read, and what was in slots are those of a run without audits."""
  if name == "two_devices" and jax.device_count() < 2:
    pytest.skip(f"needs two devices, there is {jax.device_count()}")
  if device == "gpu" and name == "interpret":
    pytest.skip("the interpreter cannot read a pool in host memory")
  model, conf = tiny_model("gqa3-tied"), config(*PSA, *SETTINGS[name])
  conf = conf if name == "in_hbm" else with_slots(conf, 10, model)
  expected, plain = serve(conf, model, PROMPTS, 10)
  executor = Watched(conf, model)
  engine = Engine(poisoned(executor))
  requests = [engine.add_request(prompt, 10) for prompt in PROMPTS]
  engine.run()
  assert [request.output_tokens for request in requests] == expected
  counts = [(u.blocks_attended, u.blocks_missed, u.blocks_loaded) for u in (engine.usage, plain.usage)]
  assert counts[0] == counts[1]
  left, layers = 0, set()
  for of, row, token, kept, step in executor.seen:
    found = step.result().audit
    share, unread = by_hand(model, of, row, token, kept)
    assert found.share.dtype == np.float32 and found.unread.tolist() == unread.tolist()
    np.testing.assert_allclose(found.share, share, atol=2e-6)
    assert ((found.share < 1 - 1e-4) == (found.unread > 0)[:, None]).all()
    left, layers = left + int((unread > 0).sum()), layers | {of.layer}
  assert left > 10 and layers == set(range(conf.sparse.dense_layers, 2))


def tight(*changes: str) -> EngineConfig:
  """Of one setup, whose programs the first of these tests has compiled, for its model."""
  return with_slots(config(*PSA, *changes), 10, tiny_model("gqa3-tied"))


def test_drawn_tokens_and_log_probabilities_stay():
  model, conf = tiny_model("gqa3-tied"), tight()
  told = []
  for kind in (JaxExecutor, Watched):
    engine = Engine(poisoned(kind(conf, model)))
    requests = [engine.add_request(p, 6, temperature=1.0, seed=3, logprobs=2) for p in PROMPTS]
    engine.run()
    told.append([(request.output_tokens, request.logprobs) for request in requests])
  assert told[0] == told[1]


def audited(conf: EngineConfig, n: int = 24, prompts=PROMPTS, model=None) -> tuple[Engine, list[dict[str, Any]]]:
  rows: list[dict[str, Any]] = []

  def observe(seen: Observed) -> None:
    if row := audit.row_of(seen):
      rows.append(row)

  engine = new_engine(conf, model or tiny_model("gqa3-tied"), observer=observe)
  for prompt in prompts:
    engine.add_request(prompt, n)
  engine.run()
  return engine, rows


def test_a_run_is_audited_within_its_share_and_again_alike():
  conf = tight("sparse.audit=0.05")
  engine, rows = audited(conf)
  assert engine.audits
  found = engine.audits.summary()
  assert 0 < found.audit_blocks <= 0.05 * engine.usage.blocks_attended
  shares = [(share, left) for row in rows for share, left in zip(row["true_share"], row["unread_blocks"], strict=True)]
  counted = [share for share, left in shares if left]
  assert found.audited_stops == len(counted) > 0
  assert found.audit_kept == sum(min(share) >= 0.8 for share in counted)
  assert found.audit_true_share == pytest.approx(np.mean(counted), abs=1e-5)
  again, others = audited(conf)
  assert others == rows and again.audits and again.audits.summary() == found


def test_one_program_serves_all_thresholds():
  model, attended = tiny_model("gqa3-tied"), {}
  for threshold in (0.5, 0.9):
    conf = tight(f"sparse.threshold={threshold}")
    executor = JaxExecutor(conf, model)
    before = executor.programs.decode._cache_size()
    engine = Engine(executor)
    engine.add_request(PROMPTS[0], 8)
    engine.run()
    attended[threshold] = engine.usage.blocks_attended, executor.programs.decode._cache_size() - before
  assert attended[0.5][0] < attended[0.9][0] and attended[0.9][1] == 0


def test_audits_are_compiled_before():
  conf = config(*PSA, "sparse.audit=0.1", "cache.prefix=false")
  executor = JaxExecutor(conf, tiny_model())
  plain = JaxExecutor(override(conf, ["sparse.audit=0"]), tiny_model()).compile([150])
  assert executor.compile([150]) > plain
  compiled = executor.programs.decode._cache_size()
  engine = Engine(executor)
  engine.add_request(PROMPTS[0], 24)
  engine.run()
  assert engine.audits and engine.audits.summary().audit_blocks > 0
  assert executor.programs.decode._cache_size() == compiled


# ----------------------------------------------------------------------------------------------- a digest that misleads


def ranked_by(monkeypatch, name: str, sign: float) -> None:
  """Digests are the keys themselves, so a block's mass is known; with sign -1 the heaviest come last."""

  def score(q, digests):
    s = jnp.einsum("...gd,...ned->...gne", q, digests, precision=jax.lax.Precision.HIGHEST) * q.shape[-1] ** -0.5
    return sign * jax.nn.logsumexp(s, -1)

  monkeypatch.setitem(METHODS, name, Method(8, lambda keys: keys, score))


@pytest.fixture
def digests(monkeypatch):
  ranked_by(monkeypatch, "honest", 1.0)
  ranked_by(monkeypatch, "dishonest", -1.0)


def kept(rows: list[dict[str, Any]], promise: float) -> list[bool]:
  stops = ((row["true_share"], row["unread_blocks"]) for row in rows)
  return [min(share) >= promise for shares, left in stops for share, n in zip(shares, left, strict=True) if n]


@pytest.mark.usefixtures("digests")
def test_a_digest_that_hides_heavy_blocks_breaks_promises_until_the_threshold_moves():
  """With one query head a KV head an exact ranking never claims too much: its threshold may fall."""
  model, prompts = tiny_model("mha-qknorm"), [prompt_of(150, seed=i) for i in range(4)]

  def run(method: str, threshold: str):
    # The paper's rule, which trusts the ranking most.
    conf = config(
      *PSA, "sparse.rest=least", f"sparse.method={method}", f"sparse.threshold={threshold}", "sparse.audit=0.1"
    )
    engine, rows = audited(conf, 100, prompts, model)
    assert engine.audits
    return engine.audits.summary(), kept(rows, 0.5)

  fixed, _ = run("honest", "0.5")
  assert fixed.audited_stops > 90 and fixed.audit_kept_share == 1.0 and fixed.psa_threshold == 0.5
  fixed, _ = run("dishonest", "0.5")
  assert fixed.audit_kept_high is not None and fixed.audit_kept_high < 0.25
  moved, stops = run("dishonest", "auto:0.5")
  assert moved.psa_threshold > 0.9 and not any(stops[:4])
  assert len(stops) > 150 and np.mean(stops[len(stops) // 2 :]) > 0.9
  moved, stops = run("honest", "auto:0.5")
  assert moved.psa_threshold < 0.4 and moved.audit_promise == 0.5
  assert len(stops) > 90 and np.mean(stops[len(stops) // 2 :]) > 0.9


# -------------------------------------------------------------------------------------- what is audited, and what moves


def sparse(**changes: Any) -> SparseConfig:
  return SparseConfig(**{"policy": "psa", "threshold": 0.9, "audit": 0.1} | changes)


def plan_of(*positions: int) -> Plan:
  rows = tuple(DecodeRow(str(i), i, position, 1, Sampling()) for i, position in enumerate(positions))
  return Plan(0, np.zeros(0, np.int32), (), (), rows, ())


def told(shares: list[list[float]], unread: list[int]) -> Audited:
  return Audited(np.array(shares, np.float32), np.array(unread, np.int32))


def test_every_row_and_every_layer_that_stops_is_drawn():
  audits = Audits(sparse(dense_layers=1), dataclasses.replace(SHAPE, L=4))
  drawn = [audits.plan(plan_of(80, 8, 800), 1 << 30).audit for _ in range(300)]
  counts = np.array([[drawn.count(AuditOf(row, layer)) for layer in range(4)] for row in range(3)])
  assert counts.sum() == 300 and not counts[:, 0].any() and counts[:, 1:].min() > 15


def test_a_long_row_has_its_turn_when_it_can_be_paid_for():
  """Short ones do not go before it because they cost less; K = 2 lists of blocks of 8 tokens."""
  audits = Audits(sparse(), SHAPE)
  plan = plan_of(8, 807)
  assert audits.plan(plan, 1999).audit is None and audits.plan(plan, 2000).audit
  assert audits.plan(plan_of(7), 1 << 30).audit is None  # has no full block
  assert Audits(sparse(dense_layers=2), SHAPE).plan(plan, 1 << 30).audit is None
  empty = dataclasses.replace(plan, decode=())
  assert audits.plan(empty, 1 << 30) is empty


@hypothesis.given(st.lists(st.tuples(st.lists(st.integers(0, 400), min_size=1, max_size=4), st.integers(0, 500))))
def test_audits_cost_no_more_than_their_share(steps: list[tuple[list[int], int]]):
  audits, attended, cost = Audits(sparse(audit=0.05), SHAPE), 0, 0
  for positions, more in steps:
    plan = audits.plan(plan_of(*positions), attended)
    if plan.audit:
      cost += positions[plan.audit.row] // 8 * 2
      audits.take(plan, told([[1.0], [1.0]], [0, 0]))
    assert cost <= 0.05 * attended
    attended += more
  assert audits.summary().audit_blocks == cost


def test_a_promise_is_kept_by_every_head_or_by_their_mean():
  for when, kept_of in (("every_head", 1), ("mean_of_heads", 2)):
    audits = Audits(sparse(stop_when=when), SHAPE)
    plan = audits.plan(plan_of(80), 1 << 30)
    audits.take(plan, told([[0.95, 0.91], [0.89, 0.95]], [3, 1]))
    audits.take(plan, told([[0.5, 0.5], [0.2, math.nan]], [0, 1]))  # nothing is unread, or the request has failed
    found = audits.summary()
    assert (found.audits, found.audited_stops, found.audit_kept, found.audit_blocks) == (1, 2, kept_of, 40)
    assert found.audit_true_share == pytest.approx((0.93 + 0.92) / 2)
    assert (found.psa_threshold, plan.threshold) == (0.9, 0.9)


def test_nothing_audited_says_nothing():
  found = Audits(sparse(threshold=1.0), SHAPE).summary()
  assert (found.audited_stops, found.audit_kept_share, found.audit_kept_low, found.psa_threshold) == (
    0,
    None,
    None,
    1.0,
  )


def test_an_executor_that_audits_nothing():
  """As the simulator's: plans are run, and nothing is counted."""
  executor = fake_executor()
  executor.config = override(executor.config, ["sparse.policy=psa", "sparse.threshold=auto:0.9", "sparse.audit=0.1"])
  engine = Engine(executor)
  request = engine.add_request([1, 2, 3] * 6, 30)
  engine.run()
  assert request.output_tokens == continuation([1, 2, 3] * 6, 30) and any(plan.audit for plan in executor.plans)
  assert engine.audits and (engine.audits.summary().audits, engine.audits.summary().audit_blocks) == (0, 0)


def moving(broken: list[bool], promise: float = 0.9) -> list[float]:
  """Thresholds before and after each stop."""
  audits = Audits(sparse(threshold=f"auto:{promise}"), SHAPE)
  plan, thresholds = audits.plan(plan_of(80), 1 << 30), [audits.threshold]
  for wrong in broken:
    audits.take(plan, told([[promise - 0.05 if wrong else promise + 0.05]], [1]))
    thresholds.append(audits.threshold)
  return thresholds


def test_broken_promises_raise_the_threshold_and_kept_ones_lower_it():
  thresholds = moving([True, *[False] * 19, False])
  assert thresholds[0] == pytest.approx(0.9)
  odds = np.array(thresholds) / (1 - np.array(thresholds))
  assert np.log(odds[1] / odds[0]) == pytest.approx(0.19)
  assert thresholds[20] == pytest.approx(0.9)  # one in twenty is as many as there may be
  assert thresholds[21] < 0.9


def test_a_threshold_stays_in_its_range():
  assert moving([False] * 400)[-1] == pytest.approx(0.9 / (0.9 + 10 * 0.1))  # a tenth of the odds
  top = moving([True] * 400)[-1]
  assert top == moving([True] * 500)[-1] < np.float32(1) and np.float32(top) < 1


@hypothesis.given(st.integers(0, 1 << 30), st.floats(0.0, 0.3))
def test_few_promises_are_broken_whatever_comes(seed: int, chance: float):
  """Stops are broken by chance below a level that jumps about, and the bound is the one of the docstring."""
  rng, audits = np.random.default_rng(seed), Audits(sparse(threshold="auto:0.9"), SHAPE)
  plan, broken, top = audits.plan(plan_of(80), 1 << 30), 0, math.log(audit.MOST)
  level = 0.9
  for n in range(1, 600):
    level = rng.uniform(0.5, 0.999) if rng.random() < chance else level
    wrong = audits.threshold < level
    audits.take(plan, told([[0.8 if wrong else 0.95]], [1]))
    broken += wrong
    assert broken <= 0.05 * n + (top - math.log(9)) / audit.STEP


def test_wilson():
  """Against published values (Newcombe 1998, table I, and Brown, Cai and DasGupta 2001)."""
  assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
  assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
  assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
  assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
  for share, n in itertools.product((0.0, 0.3, 1.0), (1, 7, 1000)):
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
