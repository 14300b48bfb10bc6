"""A variant is one entry in a table and one function: here each is added from outside the package, and served with."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.score import dot
from sparse_serve_jax import workloads
from sparse_serve_jax.attention.methods import METHODS, Method
from sparse_serve_jax.config import override
from sparse_serve_jax.memory.eviction import EVICTIONS
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.memory.saves import SAVES
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.serving import run
from sparse_serve_jax.workloads import ARRIVALS, WORKLOADS, ArrivalConfig, Item, WorkloadConfig, arrival_times
from tests.tiny import config, greedy, new_engine, prompt_of, serve, tiny_model, with_slots

PROMPTS = [prompt_of(n, seed=n) for n in (90, 61, 40)]


def oracle(n: int) -> list[list[int]]:
  return [greedy("gqa2", tuple(prompt), n) for prompt in PROMPTS]


def add_selection_method(monkeypatch) -> None:
  """Ranks blocks by their last key."""
  method = Method(vectors=1, summarize=lambda keys: keys[..., -1:, :], score=dot)
  monkeypatch.setitem(METHODS, "last_key", method)


def add_eviction_policy(monkeypatch) -> None:
  """Most recently used goes first, empty slots before all."""

  def mru(maps, since):
    return jnp.where(maps.block_of < 0, jnp.iinfo(jnp.int32).min, since - maps.last_used)

  monkeypatch.setitem(EVICTIONS, "mru", mru)


def add_load(monkeypatch) -> None:
  """Copies the first miss of each list, of one group, if it has a place."""

  def first(pool, hot, layer, located, implementation):
    ranks = jnp.arange(located.blocks.shape[-1])[None, None]
    wanted = (ranks == located.n_hits) & (located.place >= 0)
    blocks, at = (jnp.where(wanted, x, -1) for x in (located.blocks, located.place))
    slots = kernels.load_blocks(pool, hot.slots, layer, blocks, at, implementation=implementation)
    copied = wanted.sum(-1, dtype=jnp.int32)
    slot, n_hits = jnp.maximum(located.slot, at), located.n_hits + copied[..., None]
    return slots, located._replace(slot=slot, n_hits=n_hits), copied

  monkeypatch.setitem(LOADS, "first", first)


def add_save(monkeypatch) -> None:
  """A scatter of XLA's."""

  def scatter(pool, new, implementation):
    layers = new.layer + jnp.arange(new.kv.shape[1])
    to = jnp.where(new.blocks >= 0, new.blocks, pool.shape[2])
    return pool.at[:, layers[:, None], to[None]].set(new.kv[:, :, new.ids], mode="drop")

  monkeypatch.setitem(SAVES, "scatter", scatter)


def add_arrival_process(monkeypatch) -> None:
  """One request a period, like a clock."""

  def regular(n, rate, seed):
    return np.arange(n) / rate

  monkeypatch.setitem(ARRIVALS, "regular", regular)


def add_workload(monkeypatch) -> None:
  """Counting prompts of one length."""

  def counting(config):
    def source(tokenizer, max_request_tokens):
      prompts = (np.arange(i, i + config.prompt_tokens, dtype=np.int32) % 96 for i in range(config.limit))
      return [Item(f"count-{i}", prompt, config.max_new_tokens) for i, prompt in enumerate(prompts)]

    return source

  monkeypatch.setitem(WORKLOADS, "counting", counting)


@pytest.mark.parametrize(
  "add", [add_selection_method, add_eviction_policy, add_load, add_save, add_arrival_process, add_workload]
)
def test_a_variant_costs_fifteen_lines(add):
  assert len(inspect.getsource(add).splitlines()) <= 15


def test_a_selection_method(monkeypatch):
  add_selection_method(monkeypatch)
  whole, _ = serve(config("sparse.method=last_key"), tiny_model(), PROMPTS, 12)
  assert whole == oracle(12)
  some, engine = serve(config("sparse.method=last_key", "sparse.token_budget=48"), tiny_model(), PROMPTS, 12)
  assert some != whole and engine.usage.blocks_attended > 0


@pytest.mark.parametrize("name", ["mru", "fifo"])
def test_an_eviction_policy(monkeypatch, name):
  """Tokens do not depend on it, what misses does."""
  add_eviction_policy(monkeypatch)
  other, loaded = name, {}
  for name in ("lru", other):
    conf = with_slots(config(f"cache.eviction={name}", "sparse.token_budget=64"), 40, tiny_model())
    tokens, engine = serve(conf, tiny_model(), PROMPTS, 12)
    loaded[name] = engine.usage.blocks_loaded, tokens
  assert loaded[other][1] == loaded["lru"][1]
  assert loaded[other][0] != loaded["lru"][0]


def test_the_first_that_came_is_not_the_least_recently_used():
  """Slot 0 came first and was used last."""
  maps = kernels.Maps.empty(1, 1, 9, 2)
  one, zero = jnp.ones((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
  for stamp, block in enumerate((4, 5, 4)):
    victims = kernels.victims(kernels.ages(maps, jnp.int32(stamp)), jnp.int32(stamp))
    located = kernels.propose(maps, victims, 0, jnp.full((1, 1, 1), block), one)
    maps = kernels.commit(maps, 0, located, one, jnp.int32(stamp), zero)
  assert maps.entered.tolist() == [0, 1] and maps.last_used.tolist() == [2, 1]


def test_results_of_a_wrong_shape_are_refused(monkeypatch):
  monkeypatch.setitem(EVICTIONS, "three", lambda maps, since: jnp.arange(3))
  conf = with_slots(config("cache.eviction=three"), 40, tiny_model())
  with pytest.raises(ValueError, match=r"cache.eviction=three gives int32\[3\], not int32\[40\]"):
    new_engine(conf, tiny_model())
  wide = Method(vectors=1, summarize=lambda keys: keys[..., -2:, :], score=dot)
  flat = Method(vectors=1, summarize=lambda keys: keys[..., -1:, :], score=lambda q, digests: digests[..., 0, 0])
  for name, method, message in (
    ("wide", wide, r"the digest of sparse.method=wide gives float32\[2, 2, 16\], not float32\[2, 1, 16\]"),
    ("flat", flat, r"the score of sparse.method=flat gives float32\[3\], not float32\[2, 3\]"),
  ):
    monkeypatch.setitem(METHODS, name, method)
    with pytest.raises(ValueError, match=message):
      new_engine(config(f"sparse.method={name}"), tiny_model())


@pytest.mark.parametrize("changed", ["cache.load=first", "cache.save=scatter"])
def test_a_load_and_a_save(monkeypatch, changed):
  """Tokens and hits are those of today's."""
  add_load(monkeypatch)
  add_save(monkeypatch)
  conf = with_slots(config("sparse.token_budget=64"), 40, tiny_model())
  expected, theirs = serve(conf, tiny_model(), PROMPTS, 12)
  tokens, engine = serve(override(conf, [changed]), tiny_model(), PROMPTS, 12)
  assert tokens == expected
  ours, theirs = engine.usage, theirs.usage
  assert ours.blocks_attended == theirs.blocks_attended
  assert (ours.blocks_missed, ours.blocks_loaded) == (theirs.blocks_missed, theirs.blocks_loaded)


def test_an_arrival_process_and_a_workload(monkeypatch):
  add_arrival_process(monkeypatch)
  add_workload(monkeypatch)
  arrivals = ArrivalConfig(process="regular", rate=50.0)
  workload = WorkloadConfig(source="counting", limit=4, prompt_tokens=20, max_new_tokens=5, arrivals=arrivals)
  engine = new_engine(config(), tiny_model())
  items = workloads.read(workload)(ByteTokenizer(), engine.max_request_tokens)
  rows = []
  times = arrival_times(arrivals, len(items))
  served = run.serve(engine, items, times, rows.append)
  assert served.summary.requests == len(rows) == 4
  assert times.tolist() == [0.0, 0.02, 0.04, 0.06]


@pytest.mark.parametrize(
  ("changed", "table"), [("cache.eviction", EVICTIONS), ("cache.load", LOADS), ("cache.save", SAVES)]
)
def test_an_unknown_name_is_refused_with_those_there_are(changed, table):
  with pytest.raises(ValueError, match=rf"unknown {changed} 'nope'; known: {', '.join(sorted(table))}"):
    new_engine(config(f"{changed}=nope"), tiny_model())
