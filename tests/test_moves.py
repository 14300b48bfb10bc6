"""Loads and saves: what each promises, and that tokens depend on none of them.

The same cases run on a GPU with `-m gpu`, there by the Triton kernels with the pool in pinned host memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from sparse_serve_jax.config import CacheConfig, EngineConfig, SchedulerConfig, override
from sparse_serve_jax.memory import host_pool, loads
from sparse_serve_jax.memory.create import empty_hot
from sparse_serve_jax.memory.host_pool import HostPool
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.memory.saves import SAVES, NewBlocks
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.memory.writer import Writer
from sparse_serve_jax.serving.engine import DeviceError, Engine
from sparse_serve_jax.serving.plan import StepResult, StepStats
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.scheduler import Scheduler
from tests.cases import DTYPES, IMPLEMENTATIONS, assert_same_bits
from tests.fake_engine import fake_executor
from tests.tiny import config, greedy, new_engine, prompt_of, serve, tiny_model, with_slots

K, L, M, P, S, D = 2, 3, 40, 30, 8, 16
AHEAD = sorted(set(LOADS) - {"fused"})
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def in_host_memory(array: np.ndarray) -> jax.Array:
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=host_pool.memory_kind())
  return jax.device_put(array, sharding)


def lists(n: int, group: int, seed: int, share: float = 0.5) -> kernels.Located:
  """Lists as `propose` makes them, but that a miss without a place may stand anywhere among the misses."""
  rng = np.random.default_rng(seed)
  blocks, slot, place = (np.full((2, K, n), -1, np.int32) for _ in range(3))
  n_hits, length = np.zeros((2, K, -(-n // group)), np.int32), np.array([[n, max(n - 3, 1)], [n, 0]], np.int32)
  places = iter(rng.permutation(P))
  for b, k in np.ndindex(2, K):
    blocks[b, k, : length[b, k]] = rng.permutation(M)[: length[b, k]]
    for g, start in enumerate(range(0, length[b, k], group)):
      end = min(start + group, length[b, k])
      n_hits[b, k, g] = hits = rng.integers(0, end - start + 1) if share < 1 else 0
      for i in range(start, end):
        if i < start + hits:
          slot[b, k, i] = 10**6  # of no load's concern
        elif rng.random() < share:
          place[b, k, i] = next(places)
  return kernels.Located(*map(jnp.asarray, (blocks, slot, place, n_hits, length)))


@functools.cache
def hot_of(dtype: str):
  shape = CacheShape(K=K, L=L, M=M, P=P, R=1, S=S, D=D, E=1, dtype=dtype, offload=True, max_context=S, slab_tokens=S)
  return empty_hot(shape)


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("n", "group", "dtype"), [(7, 7, "float32"), (10, 4, "bfloat16"), (1, 1, "float32")], ids=lambda x: str(x)
)
def test_what_a_load_copies_becomes_hits_in_order(name, implementation, n, group, dtype, monkeypatch):
  """Of each group hits, then what was copied, then misses; each in the order in which they stood."""
  monkeypatch.setattr(loads, "STAGED", (8, 2))  # several rounds of several sizes
  rng, layer = np.random.default_rng(0), 1
  values = rng.normal(size=(K, L, M, 2, S, D)).astype(DTYPES[dtype])
  pool, host = in_host_memory(values), HostPool(1)
  host.follow(pool)
  before = rng.normal(size=(P, 2, S, D)).astype(DTYPES[dtype])
  hot = hot_of(dtype).replace(slots=jnp.asarray(before), pool_id=jnp.asarray(host.numbers))
  load = jax.jit(lambda pool, hot, located: LOADS[name](pool, hot, jnp.int32(layer), located, implementation))
  for seed, share in enumerate((0.5, 0.0, 0.99)):
    located = lists(n, group, seed, share)
    slots, found, copied = load(pool, hot, located)
    expected = before.copy()
    blocks, slot, place, n_hits, length = map(np.array, located)
    for b, k in np.ndindex(2, K):
      arrives = (slot[b, k] < 0) & (place[b, k] >= 0)
      assert int(copied[b, k]) == arrives.sum()
      expected[place[b, k][arrives]] = values[k, layer][blocks[b, k][arrives]]
      slot[b, k][arrives] = place[b, k][arrives]
      order = []
      for g, start in enumerate(range(0, n, group)):
        ranks = range(start, min(start + group, n))
        order += sorted(ranks, key=lambda i: 2 - arrives[i] if i >= start + n_hits[b, k, g] else 0)
        n_hits[b, k, g] += arrives[start : start + group].sum()
      for x in (blocks, slot, place):
        x[b, k] = x[b, k][order]
    assert_same_bits(slots, expected)
    for actual, wanted in zip(found, (blocks, slot, place, n_hits, length), strict=True):
      assert_same_bits(actual, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", sorted(SAVES))
def test_a_save_writes_the_blocks_and_no_others(name, implementation):
  rng = np.random.default_rng(1)
  before = rng.normal(size=(K, L, M, 2, S, D)).astype(np.float32)
  source = rng.normal(size=(K, 2, 5, 2, S, D)).astype(np.float32)
  ids, blocks = np.array([4, 0, 2, 1], np.int32), np.array([7, -1, 39, 0], np.int32)
  new = functools.partial(NewBlocks, layer=jnp.int32(1), ids=jnp.asarray(ids), blocks=jnp.asarray(blocks))
  pool = in_host_memory(before)
  save = jax.jit(lambda pool, kv: SAVES[name](pool, new(kv), implementation), out_shardings=pool.sharding)
  expected = before.copy()
  for i in (0, 2, 3):
    expected[:, 1:, blocks[i]] = source[:, :, ids[i]]
  assert_same_bits(save(pool, source), expected)


def test_the_host_knows_a_pool_that_moves():
  pool, host = in_host_memory(np.zeros((K, L, M, 2, S, D), np.float32)), HostPool(1)
  host.follow(pool)
  host.follow(pool)
  with pytest.raises(RuntimeError, match="has moved in memory"):
    host.follow(in_host_memory(np.ones((K, L, M, 2, S, D), np.float32)))


def saving() -> tuple[jax.Array, Writer]:
  """A pool of zeros, a writer that is to put ones into block 5 of layer 0 for iteration 3."""
  pool, host = in_host_memory(np.zeros((K, L, M, 2, S, D), np.float32)), HostPool(1)
  host.follow(pool)
  slab = jnp.ones((K, 1, 1, 2, S, D))
  writer = Writer(host, slab.nbytes)
  writer.save(3, slab, range(1), np.array([5]), alive=None)
  return pool, writer


def test_a_save_has_not_landed_when_waiting_for_it_is_interrupted(monkeypatch):
  go, place = Event(), Writer._place
  monkeypatch.setattr(Writer, "_place", lambda *args: go.wait(60) and place(*args))
  pool, writer = saving()

  def interrupted(self):
    raise KeyboardInterrupt

  for wait in (functools.partial(writer.landed, 3, wait=True), functools.partial(writer.make_room, 1 << 20)):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
      patched.setattr(Future, "result", interrupted)
      wait()
    assert writer.landed(3) == 2
  go.set()
  writer.drain()
  assert writer.landed(3) == 3
  assert_same_bits(pool[:, 0, 5], np.ones((K, 2, S, D), np.float32))


@pytest.mark.parametrize("asks", ["start", "landed", "make_room", "drain", "forget"])
def test_a_save_begins_when_its_tokens_are_delivered_or_somebody_waits_for_it(asks):
  """So that a first token need not wait for it."""
  pool, writer = saving()
  job = writer._jobs[0]
  writer.start(2)  # an earlier iteration
  assert writer.landed(3) == 2 and not job.begin.is_set()  # its result is read
  time.sleep(0.05)
  assert not job.placed.done()
  {
    "start": lambda: writer.start(3),
    "landed": lambda: writer.landed(3, wait=True),
    "make_room": lambda: writer.make_room(1),
    "drain": writer.drain,
    "forget": writer.forget,
  }[asks]()
  job.placed.result(timeout=60)
  assert job.begin.is_set() and (np.asarray(pool[:, 0, 5]) == 1).all()


def test_a_save_whose_tokens_nobody_hands_out_begins_too():
  pool, writer = saving()
  writer._jobs[0].placed.result(timeout=60)
  assert (np.asarray(pool[:, 0, 5]) == 1).all()


def test_writers_of_two_pools_share_a_buffer(monkeypatch):
  """As on a GPU: one's slab is not overwritten by the other's before it has been placed."""
  shared = np.zeros(K * 2 * S * D * 2 * 4, np.uint8)

  def copied(part, out):
    for row, values in enumerate(np.asarray(part).reshape(len(out), -1).view(np.uint8)):
      out[row] = values
      yield range(row, row + 1)
    time.sleep(0.2)  # in which the other would write

  monkeypatch.setattr(host_pool, "memory_kind", lambda: host_pool.PINNED)
  monkeypatch.setattr("sparse_serve_jax.memory.writer.pinned_buffer", lambda *_: shared)
  monkeypatch.setattr("sparse_serve_jax.memory.writer.copy_rows", copied)
  pools, hosts = [np.zeros((K, L, M, 2, S, D), np.float32) for _ in range(2)], [HostPool(1) for _ in range(2)]
  slabs = [jnp.full((K, 1, 2, 2, S, D), i + 1, jnp.float32) for i in range(2)]
  for pool, host in zip(pools, hosts, strict=True):
    host.rows = [pool.view(np.uint8).reshape(K, L, M, -1)]
  writers = [Writer(host, slab.nbytes) for host, slab in zip(hosts, slabs, strict=True)]
  for writer, slab in zip(writers, slabs, strict=True):
    writer.save(1, slab, range(1), np.array([0, 1]), alive=None)
  for writer in writers:
    writer.start(1)  # both
  for i, writer in enumerate(writers):
    assert writer.landed(1, wait=True) == 1
    assert (pools[i][:, 0, :2] == i + 1).all()


N = 12
PROMPTS = [prompt_of(n, seed=n) for n in (50, 17, 40, 7)]
PREFILLS = ("scheduler.max_inject_tokens=128", "scheduler.max_inject_tokens=16", "scheduler.prefill=chunked")


def small(*assignments: str) -> EngineConfig:
  """Slots for less than an eighth of the KV, and pieces of prompts in few sizes."""
  conf = config("scheduler.batch_control=none", "scheduler.max_context=64", "scheduler.chunk_tokens=16", *assignments)
  return with_slots(conf, 6, tiny_model())


def combinations() -> Iterator:
  """Every load with every save and kind of prefill; with `make test` what rungs have together, with one kind each."""
  for i, (load, save) in enumerate(itertools.product(sorted(LOADS), sorted(SAVES))):
    often = load == "fused" or save == "direct" or (load, save) in (("gather", "staged"), ("per_block", "per_block"))
    for kind, prefill in enumerate(PREFILLS):
      chosen = often and kind == (i + i // len(SAVES)) % len(PREFILLS)
      yield pytest.param(load, save, prefill, marks=[] if chosen else [pytest.mark.soak])


@CPU_AND_GPU
@pytest.mark.parametrize(("load", "save", "prefill"), list(combinations()))
def test_tokens_depend_on_no_load_and_no_save(device, load, save, prefill):
  """Whole layers, pieces within a layer and pieces through all layers, with a budget of the whole prompt."""
  blocks = 4 * sum(len(prompt) // S for prompt in PROMPTS)
  tokens, engine = serve(small(f"cache.load={load}", f"cache.save={save}", prefill), tiny_model(), PROMPTS, N)
  assert tokens == [greedy("gqa2", tuple(prompt), N) for prompt in PROMPTS]
  assert engine.usage.blocks_loaded >= engine.usage.blocks_missed > blocks >= 8 * 6
  assert engine._scheduler.pool_blocks_in_use == 0


@CPU_AND_GPU
def test_the_host_moves_the_parts_of_two_devices(device):
  if jax.device_count() < 2:
    pytest.skip(f"needs two devices, there is {jax.device_count()}")
  conf = small("cache.load=staged", "cache.save=staged", "tp=2", PREFILLS[1])
  tokens, engine = serve(conf, tiny_model(), PROMPTS, N)
  assert tokens == [greedy("gqa2", tuple(prompt), N) for prompt in PROMPTS]
  assert engine.usage.blocks_missed > 0


def test_late_saves_change_no_tokens(monkeypatch):
  """Threads write as late as they like, while requests are cancelled and their blocks given out again."""
  place, rng, waits = Writer._place, random.Random(0), []

  def late(*args):
    waits.append(rng.choice((0.0, 0.0, 0.005, 0.02)))
    time.sleep(waits[-1])
    place(*args)

  monkeypatch.setattr(Writer, "_place", late)
  prompts = [prompt_of(n, seed=n) for n in (50, 17, 40, 33, 25, 48, 9, 30)]
  for prefill in PREFILLS:
    conf = small("cache.save=staged", "cache.dram_bytes=96KiB", prefill)  # three of these requests at a time
    engine = new_engine(conf, tiny_model())
    requests, doomed, cancelled, step = [], [], 0, 0
    left = list(prompts)
    while engine.has_work or left:
      if left and step % 4 == 0:
        requests.append(engine.add_request(left.pop(), N))
        doomed.append(engine.add_request(prompt_of(52, seed=step), N))
      if step % 4 == 2:
        cancelled += engine.cancel(doomed.pop(0).id) if doomed else 0
      engine.step()
      step += 1
    assert [r.output_tokens for r in requests] == [greedy("gqa2", tuple(prompt), N) for prompt in reversed(prompts)]
    assert cancelled > 4 and sum(waits) > 0.1
    assert engine._scheduler._allocator.available == 24


def test_a_request_decodes_and_blocks_are_given_out_when_saves_have_landed():
  executor = fake_executor(SchedulerConfig(max_inject_tokens=32), M=5)
  conf = dataclasses.replace(executor.config, cache=CacheConfig(block_tokens=8, save="staged", prefix=False))
  scheduler = Scheduler(conf, executor.shape)
  first, second = (Request(name, np.arange(34, dtype=np.int32), 4, 0.0) for name in "ab")
  scheduler.add(first)
  scheduler.add(second)
  done = functools.partial(StepResult, {}, {}, StepStats())

  pieces = [scheduler.schedule(0.0).prefill for _ in range(2)]
  # The second reads the first from the pool, so the first's own program saves it.
  assert [(work.start, program.unstaged) for ((program, (work,)),) in pieces] == [(0, True), (32, False)]
  scheduler.cancel(first, 0.0)
  assert scheduler.schedule(0.0).release.size == 5
  for _ in range(3):
    scheduler.update(done(landed=1), 0.0)
  waits = scheduler.schedule(0.0)
  assert waits.await_saves and not waits.admit  # the cancelled request's blocks may still be written
  scheduler.update(done(landed=waits.iteration), 0.0)
  assert [admission.request_id for admission in scheduler.schedule(0.0).admit] == ["b"]


def test_a_piece_waits_for_one_that_is_saved_beside_its_program():
  """Which is one that is not full: another prompt took a part of its iteration."""
  executor = fake_executor(SchedulerConfig(prefill="chunked", chunk_tokens=32), M=32)
  conf = dataclasses.replace(executor.config, cache=CacheConfig(block_tokens=8, save="staged"))
  scheduler = Scheduler(conf, executor.shape)
  for name, n in (("a", 24), ("b", 60)):
    scheduler.add(Request(name, np.full(n, ord(name), np.int32), 1, 0.0))
  pieces = [scheduler.schedule(0.0).prefill for _ in range(2)]
  assert [[(work.request_id, len(work.tokens), of.unstaged) for of, (work,) in found] for found in pieces] == [
    [("a", 24, False), ("b", 8, False)],
    [],
  ]
  done = functools.partial(StepResult, {"a": 1}, {}, StepStats())
  scheduler.update(done(landed=-1), 0.0)
  assert not scheduler.schedule(0.0).prefill
  scheduler.update(done(landed=1), 0.0)
  assert [(work.request_id, work.start, of.unstaged) for of, (work,) in scheduler.schedule(0.0).prefill] == [
    ("b", 8, True)
  ]


@pytest.mark.parametrize("rest", [2100, 4030])  # which is padded to a full piece
@pytest.mark.parametrize(("allowance", "full"), [(4096, 4096), (4040, 4032)])  # after others 4032 are padded to 4040
def test_a_layer_does_not_wait_for_what_the_one_before_it_saves(allowance: int, full: int, rest: int):
  """The last piece of a layer is saved beside its program: only steps that decode read it."""
  executor = fake_executor(SchedulerConfig(max_inject_tokens=allowance), M=2048, max_context=16384)
  conf = dataclasses.replace(executor.config, cache=CacheConfig(block_tokens=8, save="staged"))
  scheduler = Scheduler(conf, executor.shape)
  scheduler.add(Request("a", np.zeros(2 * full + rest, np.int32), 4, 0.0))
  pieces = [piece for _ in range(6) for piece in scheduler.schedule(0.0).prefill]
  assert [(work.first_layer, work.start, program.unstaged) for program, (work,) in pieces] == [
    (layer, start, start < 2 * full) for layer in range(2) for start in (0, full, 2 * full)
  ]
  assert not scheduler.schedule(0.0).decode


def test_the_rest_of_a_layer_has_a_size_though_all_layers_of_it_would_fit():
  executor = fake_executor(SchedulerConfig(max_inject_tokens=4096), M=1024, max_context=6000)
  conf = dataclasses.replace(executor.config, cache=CacheConfig(block_tokens=8, save="staged", prefix=False))
  scheduler = Scheduler(conf, executor.shape)
  scheduler.add(Request("a", np.zeros(4096 + 65, np.int32), 4, 0.0))
  works = [work for _ in range(4) for work in scheduler.schedule(0.0).works]
  assert [(work.first_layer, work.start) for work in works] == [(0, 0), (0, 4096), (1, 0), (1, 4096)]


def test_a_save_that_fails_is_a_failure_of_the_device(monkeypatch):
  place, failures = Writer._place, iter([OSError("no such memory")])

  def failing(*args):
    for error in failures:
      raise error
    place(*args)

  monkeypatch.setattr(Writer, "_place", failing)
  engine = new_engine(small("cache.save=staged"), tiny_model())
  lost = engine.add_request(PROMPTS[0], N)
  engine.run()
  assert isinstance(lost.error, DeviceError) and "no such memory" in str(lost.error)
  again = engine.add_request(PROMPTS[0], N)
  engine.run()
  assert again.output_tokens == greedy("gqa2", tuple(PROMPTS[0]), N)


def test_a_new_engine_waits_for_saves_of_the_one_before(monkeypatch):
  """Which may still be on their way when its last request has ended; iterations are counted anew."""
  place = Writer._place
  monkeypatch.setattr(Writer, "_place", lambda *args: (time.sleep(0.2), place(*args)))
  engine = new_engine(small("cache.save=staged", PREFILLS[0]), tiny_model())
  for prompt, n in ((PROMPTS[1], N), (PROMPTS[3], N), (PROMPTS[2], 1)):
    engine.add_request(prompt, n)
    engine.run()
  engine = Engine(engine._executor)
  request = engine.add_request(PROMPTS[0], N)
  engine.run()
  assert request.output_tokens == greedy("gqa2", tuple(PROMPTS[0]), N)


def test_slabs_on_their_way_count_as_memory():
  """Two of the largest: one that is computed while the one before it leaves."""
  conf, cfg = config("scheduler.max_inject_tokens=64", "cache.hbm_bytes=800KiB"), tiny_model().config
  direct, staged = (CacheShape.of(cfg, override(conf, [f"cache.save={save}"]), 2) for save in ("direct", "staged"))
  largest = 64 * cfg.n_layers  # tokens x layers: a prompt of 32 tokens runs both layers, padded to 64
  assert staged.saving_bytes == 2 * largest * cfg.n_kv_heads * 2 * cfg.head_dim * 4
  assert staged.fixed_bytes - direct.fixed_bytes == staged.saving_bytes and direct.saving_bytes == 0
  assert staged.P < direct.P


@CPU_AND_GPU
@pytest.mark.parametrize("load", sorted(LOADS))
def test_psa_in_rounds_reads_the_same_blocks(device, load):
  """The stop test outside of the attention kernel stops where that inside does, whatever loads a round's misses."""
  psa = ("sparse.policy=psa", "sparse.threshold=0.5", "sparse.group_blocks=2", "sparse.window_tokens=8")
  expected, theirs = serve(small(*psa), tiny_model(), PROMPTS, N)
  tokens, engine = serve(small(*psa, "sparse.stop=host_loop", f"cache.load={load}"), tiny_model(), PROMPTS, N)
  assert tokens == expected
  everything = 4 * sum((len(prompt) + step) // S for prompt in PROMPTS for step in range(N - 1))
  assert engine.usage.blocks_attended == theirs.usage.blocks_attended < 0.9 * everything
  assert 0 < engine.usage.blocks_missed == engine.usage.blocks_loaded <= engine.usage.blocks_attended


@pytest.mark.parametrize("rule", [("last_group", "mean_of_heads"), ("last_two_groups", "every_head")], ids=str)
def test_psa_in_rounds_reads_the_same_blocks_by_every_rule(rule):
  rest, when = rule
  psa = ("sparse.policy=psa", "sparse.threshold=0.45", "sparse.group_blocks=2", "sparse.window_tokens=8")
  psa += f"sparse.rest={rest}", f"sparse.stop_when={when}"
  expected, theirs = serve(small(*psa), tiny_model(), PROMPTS, N)
  tokens, engine = serve(small(*psa, "sparse.stop=host_loop"), tiny_model(), PROMPTS, N)
  assert tokens == expected
  everything = 4 * sum((len(prompt) + step) // S for prompt in PROMPTS for step in range(N - 1))
  assert engine.usage.blocks_attended == theirs.usage.blocks_attended < 0.95 * everything


def test_psa_in_rounds_by_interpreted_kernels():
  psa = ("sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=2", "sparse.stop=host_loop")
  xla, by_xla = serve(small(*psa), tiny_model(), PROMPTS[1:2], 6)
  interpreted, engine = serve(small(*psa, "implementation=interpret"), tiny_model(), PROMPTS[1:2], 6)
  assert interpreted == xla
  for counted in ("blocks_attended", "blocks_missed", "blocks_loaded"):
    assert getattr(engine.usage, counted) == getattr(by_xla.usage, counted) > 0


def test_psa_in_rounds_without_a_stop_is_dense():
  conf = small("sparse.policy=psa", "sparse.threshold=1.0", "sparse.stop=host_loop", "cache.load=gather")
  tokens, _ = serve(conf, tiny_model(), PROMPTS, N)
  assert tokens == [greedy("gqa2", tuple(prompt), N) for prompt in PROMPTS]


@pytest.mark.parametrize("load", AHEAD)
def test_a_stop_test_in_the_kernel_excludes_a_load_before_it(load):
  with pytest.raises(ValueError, match=f"parts exclude each other: cache.load='{load}'.*sparse.stop='host_loop'"):
    config("sparse.policy=psa", f"cache.load={load}")
  with pytest.raises(ValueError, match="cache.save='staged' writes a pool in host memory"):
    config("cache.save=staged", "cache.offload=false")
