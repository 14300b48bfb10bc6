"""How far prompts are padded, how many programs that takes, and that no other is ever compiled."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.buckets import Buckets, DecodeProgram, PrefillProgram, Program
from sparse_serve_jax.config import (
  CacheConfig,
  EngineConfig,
  ModelConfig,
  SchedulerConfig,
  SparseConfig,
  find_config,
  read_config,
)
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Plan, Sampling, StepResult, StepStats
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.scheduler import Scheduler
from tests.tiny import config, often, prompt_of, tiny_model, with_slots

LONGEST = 131072
MOST_PADDING = 0.125  # of what prompts of any length hold
WORST_PADDING = 0.35  # of what one prompt beyond 2k holds
MODES = {  # prefill, max_inject_tokens, chunk_tokens
  "whole": ("layer_segmented", 0, 2048),  # 2048 x layers: SparseServe's setting
  "whole or hybrid": ("layer_segmented", 16384, 2048),
  "hybrid": ("layer_segmented", 2048, 2048),
  "odd hybrid": ("layer_segmented", 3000, 2048),
  "chunked": ("chunked", 0, 2048),
  "short chunks": ("chunked", 0, 512),
  "long chunks": ("chunked", 0, 12288),
}


def engine_config(mode: str, S: int = 32, max_batch: int = 64, prefix: bool = True) -> EngineConfig:
  prefill, inject, chunk = MODES[mode]
  scheduler = SchedulerConfig(prefill=prefill, max_inject_tokens=inject, chunk_tokens=chunk, max_batch=max_batch)
  return EngineConfig(CacheConfig(block_tokens=S, prefix=prefix), SparseConfig(token_budget=4096), scheduler)


def sizes(n_layers: int, max_context: int, S: int, lanes: int = 8) -> CacheShape:
  blocks = lanes * -(-max_context // S)
  return CacheShape(
    K=8, L=n_layers, M=blocks, P=0, R=lanes, S=S, D=4, E=0, dtype="float32", offload=True,
    max_context=max_context, slab_tokens=0,
  )  # fmt: skip


def planned(conf: EngineConfig, shape: CacheShape, prompts: list[int], n_output: int = 1) -> list[Plan]:
  """Every plan of the scheduler for prompts of these lengths that are all there from the start."""
  scheduler = Scheduler(conf, shape)
  for i, n in enumerate(prompts):
    scheduler.add(Request(str(i), np.zeros(n, np.int32), n_output, arrival_time=0.0))
  plans = []
  while scheduler.has_work:
    plan = scheduler.schedule(0.0)
    if not plan.empty:
      plans.append(plan)
      scheduler.update(result_of(plan), 0.0)
  return plans


def result_of(plan: Plan) -> StepResult:
  names = [row.request_id for row in plan.decode] + [work.request_id for work in plan.works if work.last]
  return StepResult(dict.fromkeys(names, 1), {row.request_id: 0 for row in plan.measure}, StepStats())


def first_layer(plans: list[Plan]) -> list[tuple[int, int]]:
  """Tokens and start of the pieces that a prompt's first layer comes in."""
  return [(len(work.tokens), work.start) for plan in plans for work in plan.works if work.first_layer == 0]


def limit_and_piece(conf: EngineConfig, n_layers: int) -> tuple[int, int]:
  """Tokens of the longest prompt that comes whole, and of a full piece of a longer one."""
  if conf.scheduler.prefill == "chunked":
    return conf.scheduler.chunk_tokens, conf.scheduler.chunk_tokens
  limit, eight_blocks = conf.scheduler.max_inject_tokens or 2048 * n_layers, 8 * conf.cache.block_tokens
  return limit, limit // eight_blocks * eight_blocks


def pieces_alone(conf: EngineConfig, n_layers: int, n: int) -> list[tuple[int, int]]:
  """What `first_layer` gives for one prompt by itself: full pieces and a remainder."""
  limit, piece = limit_and_piece(conf, n_layers)
  return [(n, 0)] if n <= limit else [(min(piece, n - start), start) for start in range(0, n, piece)]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("n_layers", [16, 32, 80])
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_an_eighth_at_most_on_average(mode: str, n_layers: int, prefix: bool):
  """Over lengths up to 128k, and of any octave from 2k on; all pieces of a prompt together."""
  conf = engine_config(mode, prefix=prefix)
  buckets = Buckets.of(conf, n_layers, LONGEST)
  limit, piece = limit_and_piece(conf, n_layers)
  lengths = np.arange(1, LONGEST + 1, 13)
  padded = []
  for n in lengths.tolist():
    n_full, rest = divmod(n, piece) if n > limit else (0, n)
    L = n_layers if buckets.chunked or n <= limit else 1
    of_full = buckets.padded(piece, 0, L) + (n_full - 1) * buckets.padded(piece, piece, L) if n_full else 0
    padded.append(of_full + (buckets.padded(rest, n_full * piece, L) if rest else 0))
  padding = np.array(padded) - lengths
  assert padding.min() >= 0
  for octave in (lengths > 0, *((lengths > n) & (lengths <= 2 * n) for n in 2048 << np.arange(6))):
    assert 0 < padding[octave].sum() <= MOST_PADDING * lengths[octave].sum()
  assert (padding / lengths)[lengths > 2048].max() <= WORST_PADDING


@pytest.mark.parametrize("mode", MODES)
def test_pieces_are_the_schedulers(mode: str):
  conf, n_layers = engine_config(mode), 16
  shape = sizes(n_layers, LONGEST, 32)
  for n in (1, 31, 2048, 2049, 2816, 2817, 3000, 3001, 12289, 16384, 16385, 32768, 32769, 50001, LONGEST - 1):
    assert first_layer(planned(conf, shape, [n])) == pieces_alone(conf, n_layers, n)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("S", [8, 32, 128])
def test_no_more_than_48_programs(mode: str, S: int):
  """For models of 1 to 80 layers and any context up to 256k; sizes ascend and are whole blocks."""
  for n_layers in (1, 16, 22, 28, 32, 36, 40, 48, 60, 64, 80):
    for max_context in (2048, 4096, 8192, 20000, 32768, 65536, 100_000, LONGEST, 2 * LONGEST):
      for max_batch, prefix in itertools.product((1, 8, 64), (False, True)):
        buckets = Buckets.of(engine_config(mode, S, max_batch, prefix), n_layers, max_context)
        programs = buckets.programs()
        assert len(set(programs)) == len(programs) <= buckets.n_programs <= 48
        for sizes in (buckets.first_pieces, buckets.later_pieces, buckets.tables, buckets.batches):
          assert list(sizes) == sorted(set(sizes)) and all(size > 0 for size in sizes)
        assert not any(size % S for size in (*buckets.first_pieces, *buckets.later_pieces, buckets.packed))
        assert not buckets.shares or set(buckets.tables) >= set(buckets.tables_before) > set()


@pytest.mark.parametrize(
  ("changes", "unit", "full"),
  [
    (["scheduler.prefill=chunked"], 256, 2048),
    (["scheduler.prefill=chunked", "scheduler.chunk_tokens=512"], 128, 512),  # 64 in dense prefill
    (["scheduler.prefill=chunked", "scheduler.max_tokens=2000"], 256, 1792),
    (["scheduler.prefill=chunked", "scheduler.max_tokens=200", "scheduler.max_batch=64"], 128, 128),
    (["scheduler.prefill=chunked", "scheduler.max_tokens=180", "scheduler.max_batch=64"], 16, 128),  # 116 are left
    (["scheduler.prefill=chunked", "scheduler.chunk_tokens=64"], 8, 64),
    (["scheduler.prefill=chunked", "scheduler.chunk_tokens=1280"], 256, 1280),
    (["scheduler.prefill=chunked", "scheduler.max_tokens=2048", "scheduler.max_batch=1900"], 128, 2048),  # 148 are left
    (["scheduler.max_inject_tokens=200"], 128, 128),
  ],
)
def test_a_sparse_prompt_is_cut_where_tiles_end(changes: list[str], unit: int, full: int):
  sparse = ["sparse.prefill=top_k", "sparse.prefill_share=0.25"]
  buckets = Buckets.of(config(*sparse, *changes, block_tokens=8), 16, LONGEST)
  assert (buckets.unit, buckets.full) == (unit, full)


def programs_of(buckets: Buckets, plan: Plan) -> set[Program]:
  """The programs that a plan runs."""
  used: set[Program] = set()
  for program, works in plan.prefill:
    used.add(program)
    assert program.packed == (len(works) > 1)
  if plan.decode:
    longest = max(row.position // buckets.block_tokens + 1 for row in plan.decode)
    sampled = not all(row.sampling.plain for row in plan.decode)
    used.add(buckets.decode(len(plan.decode), longest, sampled))
  return used


@given(
  prefill=st.sampled_from(["layer_segmented", "chunked"]),
  inject=st.integers(0, 6000),
  chunk_blocks=st.integers(1, 8) | st.integers(1, 8).map(lambda i: 8 * i),
  S=st.sampled_from([8, 32, 128]),
  n_layers=st.integers(1, 4),
  max_context=st.integers(8, 6000),
  max_tokens=st.just(0) | st.integers(128, 3000),
  save=st.sampled_from(["direct", "staged"]),
  prefix=st.booleans(),
  data=st.data(),
)
def test_every_plan_has_its_programs(
  prefill, inject, chunk_blocks, S, n_layers, max_context, max_tokens, save, prefix, data
):
  """Prompts that share an iteration make pieces of any size: each fits a bucket, and only listed programs run.

  A piece is small, or padded by a half at most; what is left of a prompt that begins like another is padded more.
  """
  scheduler = SchedulerConfig(prefill=prefill, max_inject_tokens=inject, chunk_tokens=chunk_blocks * S, max_batch=3)
  scheduler = dataclasses.replace(scheduler, max_tokens=max_tokens)
  conf = EngineConfig(CacheConfig(block_tokens=S, save=save, prefix=prefix), SparseConfig(token_budget=4096), scheduler)
  prompts = data.draw(st.lists(st.integers(1, max_context - 2), min_size=1, max_size=5))
  buckets = Buckets.of(conf, n_layers, max_context)
  assert buckets.n_programs <= 48
  listed = set(buckets.programs()) & set(buckets.programs_of(prompts))
  kept: dict[str, dict[int, range]] = {}  # by request, and where a piece begins in its prompt
  for plan in planned(conf, sizes(n_layers, max_context, S), prompts, n_output=2):
    assert programs_of(buckets, plan) <= listed
    for program, work in ((of.program, work) for of in plan.prefill for work in of.works):
      assert len(work.tokens) <= program.tokens and work.start // S <= program.table
      assert prefix or program.packed or program.tokens <= 2048 or program.tokens <= 1.5 * len(work.tokens) + S
      assert work.n_layers == program.n_layers if program.static else work.n_layers <= program.n_layers
      if work.n_layers < n_layers:
        place = range(at := buckets.hidden_at(work.start), at + program.tokens)
        others = kept.setdefault(work.request_id, {})
        assert place.stop <= math.prod(buckets.hidden) and others.setdefault(work.start, place) == place
        assert all(start == work.start or at >= of.stop or place.stop <= of.start for start, of in others.items())


def test_decode_programs_have_three_numbers_of_rows():
  """Beyond eight, rows are padded by equal ratios; between the least and the most there is one width of tables."""
  for max_batch, rows in ((1, {8}), (8, {8}), (9, {8, 16}), (32, {8, 16, 32}), (64, {8, 24, 64}), (256, {8, 48, 256})):
    buckets = Buckets.of(engine_config("whole", 32, max_batch), 32, 32768)
    decode = [program for program in buckets.programs() if isinstance(program, DecodeProgram) and not program.sampled]
    assert {program.rows for program in decode} == rows
    assert [program.table for program in decode if program.rows in sorted(rows)[1:-1]] == [1024] * (len(rows) - 2)
    for n_rows, n_blocks in itertools.product(range(1, max_batch + 1), (1, 128, 129, 1024)):
      assert (program := buckets.decode(n_rows, n_blocks)) in decode
      assert n_rows <= program.rows <= max(8, 6 * n_rows) and n_blocks <= program.table


def test_a_full_chunk_that_another_follows_may_come_after_a_small_one():
  """Which took what another prompt had left of its iteration."""
  scheduler = SchedulerConfig(prefill="chunked", chunk_tokens=256)
  conf = EngineConfig(CacheConfig(save="staged", prefix=False), SparseConfig(token_budget=4096), scheduler)
  buckets, prompts = Buckets.of(conf, 2, max_context=320), [224, 32 + 256 + 1]
  plans = planned(conf, sizes(2, 320, 32), prompts)
  works = [(len(work.tokens), work.start, of.unstaged) for plan in plans for of, (work,) in plan.prefill]
  assert works == [(224, 0, False), (32, 0, False), (256, 32, True), (1, 288, False)]
  reached = set().union(*(programs_of(buckets, plan) for plan in plans))
  assert reached <= set(buckets.programs()) & set(buckets.programs_of(prompts, shared=False))


def test_chunked_every_program_knows_its_layers():
  """Also where rows of decode count against a chunk: so no time goes into compiling others."""
  scheduler = SchedulerConfig(prefill="chunked", chunk_tokens=1792, max_tokens=2485)
  conf = EngineConfig(CacheConfig(save="staged"), SparseConfig(token_budget=4096), scheduler)
  buckets = Buckets.of(conf, 1, max_context=7646)
  prefill = [program for program in buckets.programs() if isinstance(program, PrefillProgram)]
  assert all(program.static and program.n_layers == 1 for program in prefill) and buckets.n_programs <= 48


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("prefill", ["layer_segmented", "chunked"])
def test_a_workload_of_any_lengths_reaches_48_programs_at_most(prefill: str, prefix: bool):
  """By default, for an 8B model: prompts of up to 128k tokens, some of which begin alike, some outputs drawn."""
  conf = EngineConfig(CacheConfig(prefix=prefix), scheduler=SchedulerConfig(prefill=prefill))
  cfg = read_config(ModelConfig, find_config("models", "llama3-8b"))
  shape = sizes(cfg.n_layers, LONGEST, conf.cache.block_tokens, lanes=64)
  buckets, rng = Buckets.of(conf, cfg.n_layers, LONGEST), np.random.default_rng(0)
  scheduler, reached = Scheduler(conf, shape), set()
  document = rng.integers(0, 1 << 30, LONGEST, dtype=np.int32)
  for i in range(600):
    n = int(np.exp(rng.uniform(0, np.log(LONGEST - 64))))
    same = int(rng.uniform(0, n)) if i % 2 else 0
    prompt = np.concatenate([document[:same], rng.integers(0, 1 << 30, n - same, dtype=np.int32)])
    drawn = Sampling(temperature=float(i % 3 == 0))
    scheduler.add(Request(str(i), prompt, int(rng.integers(1, 64)), arrival_time=0.0, sampling=drawn))
  while scheduler.has_work:
    plan = scheduler.schedule(0.0)
    reached |= programs_of(buckets, plan)
    if not plan.empty:
      scheduler.update(result_of(plan), 0.0)
  others = buckets.n_programs - len(buckets.programs())
  assert reached <= set(buckets.programs()) and len(reached) > 20 and len(reached) + others <= 48


# ------------------------------------------------------------------------------------------------------------ compiling


def test_nothing_is_compiled_in_steady_state():
  """The first pass compiles one program for each bucket it meets and no other; the second none of any kind."""
  conf = config(
    "scheduler.max_context=1024", "scheduler.max_batch=9", "cache.lanes=10", "cache.dram_bytes=4MiB",
    "cache.hbm_bytes=4MiB", "scheduler.max_inject_tokens=512", "scheduler.working_set_steps=4",
  )  # fmt: skip
  model = tiny_model()
  model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_context=1024))
  executor = JaxExecutor(conf, model)
  submit, used = executor.submit, collections.Counter()

  def recorded(plan: Plan):
    used.update(programs_of(executor.buckets, plan))
    return submit(plan)

  executor.submit = recorded
  compiled = []

  def listener(event: str, duration: float, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration)

  def serve_all(lengths: list[int], seed: int):
    """All greedy, then one row drawn, then one that must not stop."""
    serve(lengths, seed)
    serve(lengths, seed, temperature=0.5)
    serve(lengths, seed, stop_token_ids=[3, 4], min_tokens=6)

  def serve(lengths: list[int], seed: int, **first):
    engine = Engine(executor)
    options = [first, *[{}] * (len(lengths) - 1)]
    requests = [engine.add_request(prompt_of(n, seed + n), 6, **o) for n, o in zip(lengths, options, strict=True)]
    cancelled = engine.add_request(prompt_of(700), 6)
    for _ in range(4):
      engine.step()
    engine.cancel(cancelled.id)
    engine.run()
    assert all(len(request.output_tokens) == 6 for request in requests)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    serve_all([900, 600, 100, *range(20, 27)], seed=0)
    assert compiled
    names = "decode", "prefill", "release_and_admit"
    count = {name: getattr(executor.programs, name)._cache_size() for name in names}
    assert len(compiled) == sum(count.values())
    programs = set(used)
    assert programs <= set(executor.buckets.programs())
    assert count == {
      "decode": sum(isinstance(program, DecodeProgram) for program in programs),
      "prefill": sum(isinstance(program, PrefillProgram) for program in programs),
      "release_and_admit": 1,
    }
    assert count["decode"] >= 2 and count["prefill"] >= 3
    compiled.clear()
    serve_all([899, 610, 130, *range(30, 37)], seed=1)
    assert set(used) == programs
    assert not compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def large_cache(*assignments: str) -> EngineConfig:
  """A configuration whose pool, slots, digests and tails are each far larger than what a step needs beside them."""
  conf = config(
    "sparse.token_budget=64", "sparse.group_blocks=4", "scheduler.max_batch=2", "scheduler.max_context=128",
    "cache.lanes=1024", "cache.dram_bytes=64MiB", "cache.hbm_bytes=128MiB", *assignments,
  )  # fmt: skip
  return with_slots(conf, 8192, tiny_model()) if conf.cache.offload else conf


def watched(conf: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[JaxExecutor, dict]:
  """An executor, and what its programs are compiled to, as they come: by name, rows, width and shapes."""
  executor, compiled = JaxExecutor(conf, tiny_model()), {}

  def spied(program, name: str):
    def run(*args):
      *arrays, width = args  # the last is static
      leaves, structure = jax.tree.flatten(arrays)
      key = name, len(arrays[-1].lanes), width, structure, tuple(x.shape for x in leaves)
      if key not in compiled:
        compiled[key] = program.lower(*args).compile()
      return compiled[key](*arrays)

    return run

  for name in ("decode", "prefill"):
    monkeypatch.setattr(executor.programs, name, spied(getattr(executor.programs, name), name))
  return executor, compiled


def check_in_place(executor: JaxExecutor, program, device: str):
  """All arrays of the cache alias a result, and no temporary is as large as the large ones of them."""
  cache, hot, memory = executor.cache, executor.cache.hot, program.memory_analysis()
  large = [x.nbytes for x in (cache.pool, hot.slots, hot.digest, hot.tail) if x.size]
  workspace = (32 << 20) * (device == "gpu")  # of cuBLAS, whatever it multiplies
  assert memory.temp_size_in_bytes - workspace + memory.host_temp_size_in_bytes < min(large) / 2
  aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
  assert aliased >= sum(x.nbytes for x in jax.tree.leaves(cache))


@DEVICES
@pytest.mark.parametrize("segments", [False, True])  # of one layer; otherwise of all, by a program that knows it
@pytest.mark.parametrize("dense_layers", [0, 1])  # 1: the last loop over layers has one trip, and is none to XLA
@pytest.mark.parametrize("policy", ["topk", "audited psa"])
def test_programs_hold_no_second_cache(policy: str, dense_layers: int, segments: bool, device: str, monkeypatch):
  """Pool, slots, digests and tails are updated in place.

  A run with audits has the program of a step without one too: at first nothing has been attended to.
  """
  conf = large_cache(
    f"sparse.policy={policy.split()[-1]}",
    f"sparse.dense_layers={dense_layers}",
    f"scheduler.max_inject_tokens={128 * segments}",
    f"sparse.audit={0.1 * (policy == 'audited psa')}",
  )
  executor, compiled = watched(conf, monkeypatch)
  engine = Engine(executor)
  audited = engine.audits is not None
  engine.add_request(prompt_of(100), 26 if audited else 3)
  while engine.has_work and not (audited and engine.audits.summary().audit_blocks):
    engine.step()
  assert sorted(name for name, *_ in compiled) == ["decode", *["decode"] * audited, "prefill"]
  for program in compiled.values():
    check_in_place(executor, program, device)


# Kinds of prefill programs: how they are told to come; the prompts, those of a list at once; rows and blocks before the
# piece of each program. Prompts begin with the same 64 tokens. (8, 16) is a decode step that follows.
CHUNKED, HYBRID = ["scheduler.prefill=chunked", "scheduler.chunk_tokens=32"], ["scheduler.max_inject_tokens=64"]
SPARSE = ["sparse.prefill=threshold", "sparse.prefill_share=0.9", "sparse.dense_layers=1"]
SEGMENTS = ["scheduler.max_inject_tokens=256", "sparse.prefill=top_k", "scheduler.max_context=256", "cache.lanes=2048"]
CUT, DECODED = {(1, 0), (1, 16)}, {(1, 0), (1, 16), (8, 16)}
PIECES = {
  "chunks": (CHUNKED, [[96]], CUT),
  "chunks without offload": ([*CHUNKED, "cache.offload=false"], [[96]], CUT),
  "chunks, staged": ([*CHUNKED, "cache.save=staged", "cache.load=staged"], [[96]], DECODED),
  "chunks, sparse": ([*CHUNKED, *SPARSE], [[96]], CUT),
  "hybrid": ([*HYBRID, "cache.load=gather"], [[96]], DECODED),
  "hybrid, zones of layers": ([*HYBRID, "cache.zones=layer"], [[96]], CUT),
  "hybrid, a copy a block": ([*HYBRID, "cache.save=per_block", "cache.load=per_block"], [[96]], DECODED),
  "hybrid, sparse": ([*HYBRID, *SPARSE], [[96]], CUT),
  "after what is shared": ([], [[96], [90]], CUT),
  "segments after what is shared": (SEGMENTS, [[192], [180]], {(1, 0), (1, 32)}),  # a tile of 128 tokens
  "packed": (["cache.prefix=false"], [[30, 40]], {(2, 0)}),
  "whole without offload": (["cache.offload=false"], [[96]], {(1, 0), (8, 16)}),
  "dense": (["cache.offload=false", "sparse.policy=dense"], [[96]], {(1, 0), (8, 16)}),
}


@DEVICES
@pytest.mark.parametrize(
  "kind",
  often(
    PIECES,
    *("chunks, staged", "chunks, sparse", "hybrid, a copy a block"),
    *("segments after what is shared", "packed", "dense"),
  ),
)
def test_pieces_of_prompts_hold_no_second_cache(kind: str, device: str, monkeypatch):
  """Nor does a piece that reads what comes before it from pool and slots, to which the same layer writes."""
  assignments, prompts, programs = PIECES[kind]
  executor, compiled = watched(large_cache(*assignments), monkeypatch)
  engine = Engine(executor)
  for at_once in prompts:
    for n in at_once:
      n_alike = 128 if n > 128 else 64
      prompt = prompt_of(n_alike)[:n] + prompt_of(max(0, n - n_alike), n)
      engine.add_request(prompt, 1 + ((8, 16) in programs))
    engine.run()
  assert {(rows, width) for _, rows, width, *_ in compiled} == programs
  for program in compiled.values():
    check_in_place(executor, program, device)
