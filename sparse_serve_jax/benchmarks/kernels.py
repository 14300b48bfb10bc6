"""Times of the ops at the 8B shape, beside what would be used instead, on one NVIDIA GPU.

An op is a function of `OPS`, which yields cases: a name, and what makes a row of it (`timing.row`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as kernels
from pallas_kernels.digest import cuboid_mean
from pallas_kernels.score import REDUCTIONS, box
from sparse_serve_jax.benchmarks import timing
from sparse_serve_jax.benchmarks.bench import Bench, Cases
from sparse_serve_jax.benchmarks.tiles import prefill_tiles, tile_lists
from sparse_serve_jax.benchmarks.timing import Report, Row, Timing
from sparse_serve_jax.memory.kv_cache import Hot
from sparse_serve_jax.memory.loads import LOADS
from sparse_serve_jax.memory.saves import SAVES, NewBlocks
from sparse_serve_jax.memory.writer import Writer

# PSA's, and those whose code differs from it and from each other.
STOP_RULES = [
  kernels.StopRule("least"),
  kernels.StopRule("last_group"),
  kernels.StopRule("last_two_groups"),
  kernels.StopRule("last_two_groups", "mean_of_heads"),
]
STOPS = [*itertools.product(STOP_RULES, [16]), (kernels.StopRule(), 4), (kernels.StopRule(), 8)]  # with their groups


def digest(b: Bench) -> Cases:
  def op(state, _, inputs, **options):
    source, ids, blocks = inputs
    return kernels.store_digests(state, source, 0, ids, blocks, rule=cuboid_mean, **options), ()

  def case(n):
    variants = b.variants(lambda: (b.blocks(b.heads, 1, n), jnp.arange(n), b.distinct(b.n_pool, n)))
    moved = dict(hbm=b.heads * n * (b.block_bytes / 2 + b.digest_bytes))
    return b.row_of_digests(op, variants, moved)

  for n in b.pick([512, 4096], [4]):
    yield f"{b.heads}x{n}", functools.partial(case, n)


def score(b: Bench) -> Cases:
  def op(ranking, table, _, inputs, **options):
    q, tables = inputs
    full = jnp.full(tables.shape[0], tables.shape[1])
    return table, kernels.score(q, table, jnp.int32(0), tables, full, ranking, **options)

  def case(rows, n, reduce):
    variants = b.variants(lambda: (b.random(rows, b.heads, b.group, b.depth), b.distinct(b.n_pool, rows, n)))
    moved = dict(hbm=rows * n * (b.heads * (b.digest_bytes + 4) + 4))
    ranking = kernels.Ranking(box, reduce, sinks=2, window=2)
    return b.row_of_digests(functools.partial(op, ranking), variants, moved)

  for rows, n in b.pick([(32, 1024), (8, 4096)], [(2, 16)]):
    for reduce in REDUCTIONS:
      yield f"{reduce} {rows}x{n}", functools.partial(case, rows, n, reduce)


def select(b: Bench) -> Cases:
  def case(rows, n, k):
    variants = b.variants(lambda: b.random(rows, b.heads, n, dtype=jnp.float32))

    def time(f):
      return b.time(lambda state, _, scores: (state, f(scores)), variants)

    def by_sort(x):
      return lax.sort((-x, lax.broadcasted_iota(jnp.int32, x.shape, 2)), num_keys=1)

    other, name = (by_sort, "sort") if k == n else (lambda x: lax.approx_max_k(x, k), "approx_max_k")
    baselines = {"top_k": lambda: time(lambda x: lax.top_k(x, k)), name: lambda: time(other)}
    moved = dict(hbm=rows * b.heads * 4 * (n + 2 * k))
    return b.row(time(lambda x: kernels.select(x, k, **b.kernel)), moved, baselines)

  for rows, n, k in b.pick([(64, 4096, 64), (20, 1024, 1024)], [(1, 16, 4), (1, 16, 16)]):
    yield f"{rows * b.heads}x{n} k={k}", functools.partial(case, rows, n, k)


def residency(b: Bench) -> Cases:
  """propose and commit of one layer, in steps of 24 of 32 layers, so that a quarter of the slots is there for misses.

  The listed blocks are the same in every step, but for those that miss: they have not been read for a dozen steps
  and have been evicted since. The first step, which only warms up, fills the slots, in random order.
  """
  rows, n, table = b.pick((64, 64, 320), (2, 4, 20))
  n_layers, n_steps = b.pick(32, 4), table - n  # then the turns of `lists` go on from the last step to the first
  n_used = n_layers * 3 // 4
  n_pool, n_slots = rows * table, rows * b.heads * n * n_layers

  def lists(miss):
    """Blocks [steps, B, K, n]: those that change in every step take turns among the rest of the row's table."""
    tables = np.arange(n_pool, dtype=np.int32).reshape(rows, 1, table).repeat(b.heads, 1)
    kept, rest = np.split(b.rng.permuted(tables, axis=-1), [n], -1)
    changes = b.rng.random(kept.shape) < miss
    step = np.arange(n_steps)[:, None, None, None]
    turn = (step * changes.sum(-1, keepdims=True) + changes.cumsum(-1) - 1) % (table - n)
    return jnp.asarray(np.where(changes, np.take_along_axis(rest[None], turn, -1), kept))

  def empty():
    maps = kernels.Maps.empty(b.heads, n_layers, n_pool, n_slots)
    return maps._replace(last_used=jnp.asarray(-1 - b.distinct(n_slots, n_slots)))

  def step(state, blocks, _, **options):
    maps, clock = state
    now, since = blocks[clock % n_steps], clock * n_layers
    victims = kernels.victims(kernels.ages(maps, since), since)
    whole, steps = jnp.full((rows, b.heads), n), jnp.full(rows, clock)

    def layer(i, carry):
      maps, missed = carry
      located = kernels.propose(maps, victims, i, now, whole, given=missed, **options)
      return kernels.commit(maps, i, located, whole, since + i, steps, **options), missed + located.missed(whole)

    maps, missed = lax.fori_loop(0, n_used, layer, (maps, jnp.zeros_like(whole)))
    return (maps, clock + 1), missed

  def sort(state, maps, last_used):
    since = jnp.int32(1)
    return state, kernels.victims(kernels.ages(maps._replace(last_used=last_used), since), since).slots

  def case(miss):
    blocks, maps = lists(miss), empty()
    sorting = b.time(sort, [maps.last_used], shared=maps)

    def layer_of(options):
      f, state = functools.partial(step, **options), (empty(), jnp.int32(1))
      whole, _, (missed,) = timing.measure(f, [()], b.effort, state=state, shared=blocks)
      us, best = ((x - sorting.us) / n_used for x in (whole.us, whole.best_us))
      alone = dataclasses.replace(whole, us=us, best_us=best, spread=whole.spread * whole.us / (us * n_used))
      return alone, float(missed.mean()) / n / n_used

    mine, missed = layer_of(b.kernel)
    others = dict(miss_rate=missed, sort_us=sorting.us, sort_per_layer_us=sorting.us / n_layers)
    moved = dict(hbm=rows * b.heads * n * (20 + 3 * 32))  # of slot_of, last_used, last_selected a sector each
    return b.row(mine, moved, {"xla": lambda: layer_of(b.xla)[0]}, **others)

  for miss in b.pick((0, 0.02, 0.1), (0.3,)):
    yield f"{rows}x{b.heads}x{n} miss {miss:.0%}", functools.partial(case, miss)


def locate(blocks: np.ndarray, at: np.ndarray, n_hits: np.ndarray) -> kernels.Located:
  """Lists of whole groups; `at` are the slots of hits and of misses."""
  n, group = blocks.shape[-1], blocks.shape[-1] // n_hits.shape[-1]
  hit = np.arange(n) % group < np.repeat(n_hits, group, -1)
  length = np.full(blocks.shape[:2], n, np.int32)
  lists = blocks, np.where(hit, at, -1), np.where(hit, -1, at), n_hits, length
  return kernels.Located(*map(jnp.asarray, lists))


def as_one_group(located: kernels.Located) -> kernels.Located:
  at = np.maximum(located.slot, located.place)
  return locate(np.asarray(located.blocks), at, np.sum(located.n_hits, -1, keepdims=True))


# Blocks of rows that 20 GiB of KV hold: some are longer than others, and some have none.
RAGGED = [[1064, 530, 420, 350, *[200] * 12, *[0] * 48], [4000, *[0] * 7]]


def dense_attend(b: Bench, run: Callable[..., Any], inputs_of: Callable[..., Any], lengths: Sequence[int]) -> Row:
  """A case of `attend`, whose functions it takes: the pool lies in device memory, and there are no slots."""
  rows, n, total = len(lengths), max(lengths), sum(lengths)
  nowhere, no_hits = np.full((rows, b.heads, n), -1, np.int32), np.zeros((rows, b.heads, 1), np.int32)
  length = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32)[:, None], (rows, b.heads))

  def inputs():
    q, located = inputs_of(rows, n, rows * n, nowhere, no_hits)
    return q, located._replace(length=length)

  variants = b.variants(inputs)
  measured, _, _ = run(rows, variants, b.blocks(0), b.blocks(b.heads, 1, rows * n))

  def contiguous():
    kv = [b.random(rows, n * b.size, b.heads, b.depth) for _ in range(2)]
    queries = [q.reshape(rows, 1, -1, b.depth) for q, _ in variants]
    attention = functools.partial(jax.nn.dot_product_attention, implementation=b.attention)
    return b.time(lambda state, kv, q: (state, attention(q, *kv)), queries, shared=kv)

  moved = dict(hbm=b.heads * (total + rows) * b.block_bytes)
  alike = min(lengths) == n
  return b.row(measured, moved, {f"{b.attention}, contiguous": contiguous} if alike else {})


def dense_cases(b: Bench, run: Callable[..., Any], inputs_of: Callable[..., Any]) -> Cases:
  """Lists of equal and of any lengths."""
  for rows, n in b.pick([(8, 512)], [(2, 8)]):
    yield f"dense {rows}x{n * b.size} tokens", functools.partial(dense_attend, b, run, inputs_of, [n] * rows)
  for lengths in b.pick(RAGGED, [[8, 3, 0]]):
    name = f"dense, {sum(map(bool, lengths))} of {len(lengths)} rows, longest {max(lengths) * b.size} tokens"
    yield name, functools.partial(dense_attend, b, run, inputs_of, lengths)


def attend(b: Bench) -> Cases:
  scale, zero = b.depth**-0.5, jnp.int32(0)

  def op(slots, shared, inputs, **options):
    (tails, pool), (q, located) = shared, inputs
    partial, attended, slots = kernels.attend(q, tails, pool, slots, zero, located, **options)
    return slots, (partial.output, attended)

  def gathered(slots, shared, inputs, load):
    (_, pool), (q, located) = shared, inputs
    if load:
      slots = kernels.load_blocks(pool, slots, zero, located.blocks, located.place, **b.kernel)
    kv = slots[jnp.maximum(located.slot, located.place)]  # [B, K, n, 2, S, D]
    s = jnp.einsum("bkgd,bknsd->bkgns", q, kv[..., 0, :, :], preferred_element_type=jnp.float32) * scale
    p = jax.nn.softmax(s, axis=(-2, -1)).astype(q.dtype)
    return slots, jnp.einsum("bkgns,bknsd->bkgd", p, kv[..., 1, :, :], preferred_element_type=jnp.float32)

  def inputs_of(rows, n, n_pool, at, n_hits):
    """Queries, and a list of blocks that is the same for all heads of a row."""
    blocks = np.broadcast_to(b.distinct(n_pool, rows, 1, n), at.shape)
    return b.random(rows, b.heads, b.group, b.depth), locate(blocks, at, n_hits)

  def run(rows, variants, slots, pool, stop=None):
    tail = b.blocks(b.heads, 1, rows)
    tokens = b.rng.integers(1, b.size + 1, rows).astype(np.int32)
    shared = kernels.Tails(tail, jnp.arange(rows), jnp.asarray(tokens)), pool
    f = functools.partial(op, stop=stop, **b.kernel)
    measured, _, results = timing.measure(f, variants, b.effort, state=slots, shared=shared)
    return measured, shared, [attended for _, attended in results]

  def sparse(rows, n, miss, stop=None, group=None):
    group = group or n

    def inputs():
      n_hits = (group - b.rng.binomial(group, miss, (rows, b.heads, n // group))).astype(np.int32)
      return inputs_of(rows, n, b.n_pool, b.distinct(b.n_slots, rows, b.heads, n), n_hits)

    variants = b.variants(inputs)
    measured, shared, attended = run(rows, variants, b.blocks(b.n_slots), b.pool, stop)
    missed = np.mean([located.missed(n).sum() for (_, located), n in zip(variants, attended, strict=True)])
    read = np.mean([n.sum() for n in attended])
    if stop is None:
      f, name = functools.partial(gathered, load=miss > 0), "load, gather, attend" if miss else "gather, attend"
      baselines = {name: lambda: b.time(f, variants, state=b.blocks(b.n_slots), shared=shared)}
    else:
      whole = [(q, as_one_group(located)) for q, located in variants]
      baselines = {"all blocks": lambda: run(rows, whole, b.blocks(b.n_slots), b.pool)[0]}
    moved = dict(hbm=(read + rows * b.heads) * b.block_bytes, h2d=missed * b.block_bytes)
    rates = dict(miss_rate=float(missed / read), blocks_read=float(read / rows / b.heads))
    return b.row(measured, moved, baselines, **rates)

  for rows, n, miss in b.pick([(64, 64, 0), (8, 64, 0), (64, 64, 0.02), (64, 64, 0.1), (64, 16, 1)], [(2, 8, 0.3)]):
    yield f"{rows}x{n} miss {miss:.0%}", functools.partial(sparse, rows, n, miss)
  yield from dense_cases(b, run, inputs_of)
  for rows, n, miss, threshold in b.pick([(64, 256, 0, 0.5), (64, 256, 0.02, 0.5)], [(2, 16, 0.3, 0.5)]):
    for rule, group in b.pick(STOPS, [(STOP_RULES[-1], 4)]):
      name = f"psa {rule.rest} {rule.when} groups of {group}"
      stop = kernels.Stop(threshold, untested=group, rule=rule)
      yield f"{name} {threshold} {rows}x{n} miss {miss:.0%}", functools.partial(sparse, rows, n, miss, stop, group)


def copy(b: Bench) -> Cases:
  width = b.block_bytes // 2  # bf16 values of a block
  device, host = timing.device_sharding(), timing.host_sharding()
  pages = jax.device_put(jnp.zeros((b.pick(65536, 64), width), jnp.bfloat16), host)

  def rows_of(x):
    return timing.writable(x).reshape(x.shape[0], -1)

  def load(slots, pool, inputs):
    return kernels.load_blocks(pool, slots, jnp.int32(0), *inputs, **b.kernel), ()

  def store(pool, source, inputs):
    return kernels.store_blocks(pool, source, 0, *inputs, **b.kernel), ()

  def kernel(loads, n):
    shape = 1, b.heads, n // b.heads
    if loads:
      variants = b.variants(lambda: (b.distinct(b.n_pool, *shape), b.distinct(b.n_slots, *shape)))
      return b.time(load, variants, state=b.blocks(b.n_slots), shared=b.pool)
    n_source = b.pick(4096, 16)
    variants = b.variants(lambda: (b.distinct(n_source, shape[2]), b.distinct(b.n_pool, shape[2])))
    pool = b.pool
    del b.pool  # so that a failure, which loses it, leaves no pool rather than a dead one
    source = b.blocks(b.heads, 1, n_source)
    measured, b.pool, _ = timing.measure(store, variants, b.effort, state=pool, shared=source)
    return measured

  def case(loads, n):
    start, end = (host, device) if loads else (device, host)
    blocks = jax.device_put([np.ones(width, jnp.bfloat16)] * n, start)
    chosen, staging = b.distinct(pages.shape[0], n), jax.device_put(jnp.zeros((n, width), jnp.bfloat16), start)

    def memcpy_each():
      slots, to = b.blocks(b.n_slots), b.distinct(b.n_slots, n)
      return timing.clock(timing.memcpy_each(loads, pages, chosen, slots, to, b.block_bytes), b.effort)

    def staged(workers):
      memory, parts = rows_of(pages), np.array_split(np.arange(n), timing.COPY_THREADS)
      if loads:
        to = rows_of(staging)
        list(workers.map(lambda i: np.take(memory, chosen[i], 0, out=to[i[0] : i[-1] + 1], mode="clip"), parts))
        return jax.device_put(staging, end)
      got = np.asarray(jax.device_put(staging, end)).view(np.uint8)
      return list(workers.map(lambda i: memory.__setitem__(chosen[i], got[i]), parts))

    with concurrent.futures.ThreadPoolExecutor(timing.COPY_THREADS) as workers:
      baselines = {
        "memcpy each": memcpy_each,
        "device_put each": lambda: timing.clock(lambda: jax.device_put(blocks, end), b.effort),
        "staged": lambda: timing.clock(lambda: staged(workers), b.effort),
      }
      return b.row(kernel(loads, n), {"h2d" if loads else "d2h": n * b.block_bytes}, baselines)

  for loads, n in itertools.product((True, False), b.pick((16, 64, 256, 1024), (16,))):
    yield f"{'load' if loads else 'store'} {n}", functools.partial(case, loads, n)


def time_load(b: Bench, way: str, variants: list[Any]) -> Timing:
  nothing: Any = None
  host = timing.following(b.pool)

  def op(slots, shared, located):
    pool, number = shared
    hot = Hot(slots, *[nothing] * 6, pool_id=number)
    return LOADS[way](pool, hot, jnp.int32(0), located, b.kernel["implementation"])[0], ()

  return b.time(op, variants, state=b.blocks(b.n_slots), shared=(b.pool, jnp.asarray(host.numbers)))


def time_save(b: Bench, way: str, source: jax.Array, variants: list[Any]) -> Timing:
  if way == "staged":
    host, (_, blocks) = timing.following(b.pool), variants[0]
    writer = Writer(host, source.nbytes)

    def once():
      writer.save(1, source, range(1), np.asarray(blocks), host)
      writer.landed(1, wait=True)

    return timing.clock(once, b.effort)

  def op(pool, source, inputs):
    return SAVES[way](pool, NewBlocks(source, 0, *inputs), b.kernel["implementation"]), ()

  pool = b.pool
  del b.pool  # as in `copy`
  measured, b.pool, _ = timing.measure(op, variants, b.effort, state=pool, shared=source)
  return measured


def moves(b: Bench) -> Cases:
  """n blocks by each load and save of the configuration, and as many by the CUDA driver: a call a block, then one wait.

  The driver copies between the same pool and slots; its calls are made from Python, whose time is in its figure. What a
  load does besides copying, to the lists that attention reads, is left out. The save `staged` is timed alone, from a
  slab on the device to blocks in the pool: in an engine it runs beside the next program.
  """

  def case(direction, way, n):
    loads, shape, n_bytes = direction == "load", (1, b.heads, n // b.heads), n * b.block_bytes
    if loads:
      no_hits = np.zeros((1, b.heads, 1), np.int32)
      variants = b.variants(lambda: locate(b.distinct(b.n_pool, *shape), b.distinct(b.n_slots, *shape), no_hits))
      measured, blocks = time_load(b, way, variants), variants[0].blocks[0]
    else:
      variants = b.variants(lambda: (jnp.arange(shape[2]), b.distinct(b.n_pool, shape[2])))
      measured = time_save(b, way, b.blocks(b.heads, 1, shape[2]), variants)
      blocks = jnp.broadcast_to(variants[0][1], shape[1:])

    def driver():
      ids, slots = np.arange(b.heads)[:, None] * b.n_pool + np.asarray(blocks), b.blocks(b.n_slots)
      copies = timing.memcpy_each(loads, b.pool, ids.ravel(), slots, b.distinct(b.n_slots, n), b.block_bytes)
      return timing.clock(copies, b.effort)

    row = b.row(measured, {"h2d" if loads else "d2h": n_bytes}, {"driver": driver}, gb_s=n_bytes / measured.us / 1e3)
    if not isinstance(us := row["baselines"]["driver"], str):  # a text says why there is none
      row |= {"driver_gb_s": n_bytes / us / 1e3, "times_driver": measured.us / us}
    return row

  ways = {"load": ("gather", "staged", "per_block"), "save": ("direct", "staged", "per_block")}
  for direction, n in itertools.product(ways, b.pick((16, 64, 256, 1024), (16,))):
    for way in ways[direction]:
      yield f"{direction} {n} {way}", functools.partial(case, direction, way, n)


def prefill(b: Bench) -> Cases:
  def inputs(n, before):
    slot = b.distinct(b.n_slots, b.heads, before // b.size)
    at = np.broadcast_to(b.distinct(b.n_pool, before // b.size), slot.shape), slot
    return (b.random(n, b.heads, b.group, b.depth), *(b.random(n, b.heads, b.depth) for _ in range(2))), at

  def attention(shared, qkv, at, before):
    (pool, slots), (blocks, slot), (q, k, v) = shared, at, qkv
    prefix = kernels.Prefix(pool, slots, jnp.int32(0), blocks, slot, jnp.int32(before)) if before else None
    return kernels.prefill_attention(q, k, v, prefix, **b.kernel)

  def in_chunks(n, chunk):
    """A whole prompt, chunk by chunk, each over what came before it in slots; beside the prompt in one piece."""

    def op(state, shared, inputs):
      qkv, at = inputs
      return state, [
        attention(shared, [x[i : i + chunk] for x in qkv], [x[:, : i // b.size] for x in at], i)
        for i in range(0, n, chunk)
      ]

    variants, shared = b.variants(lambda: inputs(n, n)), (b.pool, b.blocks(b.n_slots))
    measured = b.time(op, variants, shared=shared)

    def whole():
      return b.time(lambda state, shared, of: (state, attention(shared, of[0], of[1], 0)), variants, shared=shared)

    row = b.row(measured, dict(flops=2 * n * n * b.heads * b.group * b.depth), {"whole": whole})
    return row | {"times_whole": measured.us / row["baselines"]["whole"]}

  def case(n, before):
    n_before, queries = before // b.size, b.heads * b.group

    def op(state, shared, inputs):
      return state, attention(shared, inputs[0], inputs[1], before)

    def contiguous():
      def kv(n):
        return [b.random(1, n, b.heads, b.depth) for _ in range(2)]

      variants = b.variants(lambda: (b.random(1, n, queries, b.depth), kv(n), kv(before) if before else None))
      dot = functools.partial(jax.nn.dot_product_attention, implementation=b.attention)

      def calls(state, _, inputs):
        q, piece, prefix = inputs
        return state, (dot(q, *piece, is_causal=True), dot(q, *prefix) if before else None)

      return b.time(calls, variants)

    measured = b.time(op, b.variants(lambda: inputs(n, before)), shared=(b.pool, b.blocks(b.n_slots)))
    name = f"{b.attention}, contiguous" + (", two calls" if before else "")
    hbm = 4 * n * (queries + b.heads) * b.depth + b.heads * n_before * b.block_bytes
    moved = dict(hbm=hbm, flops=4 * n * (before + n / 2) * queries * b.depth)
    return b.row(measured, moved, {name: contiguous})

  for n, before in b.pick([(16384, 0), (2048, 14336), (2048, 30720)], [(32, 0), (16, 16)]):
    yield f"{n} after {before}", functools.partial(case, n, before)
  for n, chunk in b.pick([(16384, 512), (16384, 2048)], [(32, 16)]):
    yield f"{n} in chunks of {chunk}", functools.partial(in_chunks, n, chunk)


EVERY = digest, score, select, residency, attend, copy, moves, prefill, prefill_tiles, tile_lists
OPS = {f.__name__: f for f in EVERY}


def measure(report: Report, ops: Iterable[str]) -> None:
  """Adds the rows of every case of these ops to the report."""
  bench = Bench(report)
  for name in ops:
    for case, make in OPS[name](bench):
      report.add(name, case, make)
