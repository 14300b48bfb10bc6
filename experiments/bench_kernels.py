"""Times of the ops at the 8B shape, beside what would be used instead, on one NVIDIA GPU.

  python -m experiments.bench_kernels --out=/tmp/bench --ops=score,attend

A table an op: time (median over calls; ±: their spread), bytes that must move, their floor at rates measured in the
same run, its share of the time, the same work by other means. The last line of stdout is one JSON object, {"op-case":
{"us", "floor_us", "fraction", ...}}; the folder of --out gets kernels.jsonl. `--smoke` is to try it on any machine.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax

import pallas_kernels as kernels
from experiments import timing
from experiments.timing import Ceilings, Effort, Report, Row, Timing
from pallas_kernels import digest as digests
from pallas_kernels.score import box
from sparse_serve_jax import runtime
from sparse_serve_jax.memory import kv_cache

_OUT = flags.DEFINE_string("out", None, "Folder for kernels.jsonl; rows are added to it.")
_OPS = flags.DEFINE_list("ops", None, "Which ops; by default all.")
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation", None, ["xla", "triton", "interpret"], "Of the ops; by default triton on a GPU, else xla."
)
_CALLS = flags.DEFINE_integer("calls", 5, "Timed calls of a case.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 0.05, "Of one call, in which an op is repeated.", lower_bound=0)
_COMMIT = flags.DEFINE_string("commit", None, "What rows are stamped with where there is no git to ask.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny shapes, one repetition: whether it runs, not how fast.")

Rivals = dict[str, Callable[[], Timing]]
Cases = Iterator[tuple[str, Callable[[], Row]]]
STAGING_THREADS = 8  # copy between a pool and a staging array


class Bench:
  """The shapes, the rates and the arrays that cases share. `pick` chooses between a real size and one for --smoke."""

  def __init__(self, smoke: bool, implementation: str, effort: Effort, ceilings: Ceilings):
    self.pick = lambda real, tiny: tiny if smoke else real
    self.effort, self.ceilings = effort, ceilings
    self.kernel, self.xla = dict(implementation=implementation), dict(implementation="xla")
    self.heads, self.group, self.depth, self.size = self.pick((8, 4, 128, 32), (2, 2, 16, 8))  # K, G, D, S
    self.block_bytes = 2 * self.size * self.depth * 2
    self.digest_bytes = 2 * self.depth * 2  # E = 2
    self.n_pool, self.n_slots = self.pick(65536, 64), self.pick(131072, 128)  # M, P: 8 GiB and 2 GiB
    self.n_variants = self.pick(4, 1)
    self.rng = np.random.default_rng(0)
    self.library: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"

  def time(self, op: timing.Op, variants: Any, **kwargs: Any) -> Timing:
    return timing.measure(op, variants, self.effort, **kwargs)[0]

  def row(self, measured: Timing, moved: dict[str, float], rivals: Rivals, **others: float) -> Row:
    moved = {way: float(amount) for way, amount in moved.items()}
    return timing.row(measured, self.ceilings.floor_us(**moved), moved, beside=timing.beside(rivals), **others)

  def row_of_digests(self, op: timing.Op, variants: Any, moved: dict[str, float]) -> Row:
    """A row of an op on the digests [K, 1, M, 2, D] that takes `implementation`."""
    digest = lambda: self.random(self.heads, 1, self.n_pool, 2, self.depth)  # noqa: E731
    time = lambda options: self.time(functools.partial(op, **options), variants, state=digest())  # noqa: E731
    return self.row(time(self.kernel), moved, {"xla": lambda: time(self.xla)})

  def variants(self, make: Callable[[], Any]) -> list[Any]:
    return [jax.device_put(make()) for _ in range(self.n_variants)]

  def random(self, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return timing.normal(jax.random.key(int(self.rng.integers(1 << 31)), impl="rbg"), shape, dtype)

  def distinct(self, limit: int, *shape: int) -> np.ndarray:
    return self.rng.permutation(limit)[: np.prod(shape)].reshape(shape).astype(np.int32)

  def blocks(self, *leading: int) -> jax.Array:
    return self.random(*leading, 2, self.size, self.depth)

  @functools.cached_property
  def pool(self) -> jax.Array:
    """[K, 1, M, 2, S, D] of random blocks, in host memory if this device has one of its own."""
    shape, host = (self.heads, 1, self.n_pool, 2, self.size, self.depth), timing.host_sharding()
    on_host = kv_cache.host_memory_kind() is not None
    make = (lambda: kernels.empty(shape, jnp.bfloat16)) if on_host else (lambda: jnp.zeros(shape, jnp.bfloat16))
    store = jax.jit(functools.partial(kernels.store_blocks, **self.kernel), donate_argnums=0, out_shardings=host)
    pool, n = jax.jit(make, out_shardings=host)(), min(self.n_pool, 4096)
    source, ids = self.blocks(self.heads, 1, n), np.arange(n, dtype=np.int32)
    for start in range(0, self.n_pool, n):
      pool = store(pool, source, 0, ids, start + ids)
    return jax.block_until_ready(pool)


def digest(b: Bench) -> Cases:
  n = b.pick(512, 4)
  ids = jnp.arange(n)

  def op(state, _, inputs, **options):
    source, blocks = inputs
    return digests.store_digests(state, source, 0, ids, blocks, rule=digests.cuboid_mean, **options), ()

  def case():
    variants = b.variants(lambda: (b.blocks(b.heads, 1, n), b.distinct(b.n_pool, n)))
    moved = dict(hbm=b.heads * n * (b.block_bytes / 2 + b.digest_bytes))
    return b.row_of_digests(op, variants, moved)

  yield f"{b.heads}x{n}", case


def score(b: Bench) -> Cases:
  def op(table, _, inputs, **options):
    q, tables = inputs
    full = jnp.full(tables.shape[0], tables.shape[1])
    return table, kernels.score(q, table, jnp.int32(0), tables, full, rule=box, sinks=2, window=2, **options)

  def case(rows, n):
    variants = b.variants(lambda: (b.random(rows, b.heads, b.group, b.depth), b.distinct(b.n_pool, rows, n)))
    moved = dict(hbm=rows * n * (b.heads * (b.digest_bytes + 4) + 4))
    return b.row_of_digests(op, variants, moved)

  for rows, n in b.pick([(32, 1024), (8, 4096)], [(2, 16)]):
    yield f"{rows}x{n}", functools.partial(case, rows, n)


def select(b: Bench) -> Cases:
  def case(rows, n, k):
    variants = b.variants(lambda: b.random(rows, b.heads, n, dtype=jnp.float32))
    time = lambda f: b.time(lambda state, _, scores: (state, f(scores)), variants)  # noqa: E731
    by_sort = lambda x: lax.sort((-x, lax.broadcasted_iota(jnp.int32, x.shape, 2)), num_keys=1)  # noqa: E731
    other, name = (by_sort, "sort") if k == n else (lambda x: lax.approx_max_k(x, k), "approx_max_k")
    rivals = {"top_k": lambda: time(lambda x: lax.top_k(x, k)), name: lambda: time(other)}
    return b.row(time(lambda x: kernels.select(x, k, **b.kernel)), dict(hbm=rows * b.heads * 4 * (n + 2 * k)), rivals)

  for rows, n, k in b.pick([(64, 4096, 64), (20, 1024, 1024)], [(1, 16, 4), (1, 16, 16)]):
    yield f"{rows * b.heads}x{n} k={k}", functools.partial(case, rows, n, k)


def residency(b: Bench) -> Cases:
  """propose and commit of one layer, in steps of 24 of 32 layers, so that a quarter of the slots is there for misses.

  The listed blocks are the same in every step, but for those that miss: they have not been read for 32 steps or have
  been evicted since.
  """
  rows, n, table = b.pick((64, 64, 320), (2, 4, 20))
  n_layers, n_steps = b.pick((32, 32), (4, 8))
  n_used = n_layers * 3 // 4
  n_pool, n_slots = rows * table, rows * b.heads * n * n_layers

  def lists(miss):
    """Blocks [steps, B, K, n], and maps in which those of no step in particular are in slots."""
    ids = np.broadcast_to(np.arange(table), (rows, b.heads, table)) + np.arange(rows)[:, None, None] * table
    ids = b.rng.permuted(ids, axis=-1).astype(np.int32)
    changes = b.rng.random((rows, b.heads, n)) < miss
    step = np.arange(n_steps)[:, None, None, None]
    other = (step * changes.sum(-1, keepdims=True) + np.cumsum(changes, -1) - 1) % (table - n)
    spare = np.broadcast_to(ids[..., n:], (n_steps, rows, b.heads, table - n))
    blocks = np.where(changes, np.take_along_axis(spare, np.maximum(other, 0), -1), ids[..., :n])

    _, head, _ = np.nonzero(~changes)
    kept, layer = ids[..., :n][~changes], np.arange(n_used)[:, None]
    slot = b.distinct(n_slots, n_used, kept.size)
    slot_of = np.full((b.heads, n_layers, n_pool), -1, np.int32)
    block_of, last_used = np.full((2, n_slots), -1, np.int32)
    slot_of[head, layer, kept] = slot
    block_of[slot], last_used[slot] = (head * n_layers + layer) * n_pool + kept, layer
    never = np.full_like(slot_of, kernels.NEVER)
    return jnp.asarray(blocks), kernels.Maps(*map(jnp.asarray, (slot_of, block_of, last_used, never)))

  def step(state, blocks, _, **options):
    maps, clock = state
    now, since = blocks[clock % n_steps], clock * n_layers
    victims = kernels.oldest_first(maps, since)
    used, steps = jnp.full((rows, b.heads), n), jnp.full(rows, clock)

    def layer(i, carry):
      maps, missed = carry
      reads = kernels.propose(maps, victims, i, now, taken=missed, **options)
      return kernels.commit(maps, i, reads, used, since + i, steps, **options), missed + n - reads.hits[..., 0]

    maps, missed = lax.fori_loop(0, n_used, layer, (maps, jnp.zeros_like(used)))
    return (maps, clock + 1), missed

  def order(state, maps, last_used):
    return state, kernels.oldest_first(maps._replace(last_used=last_used), jnp.int32(1)).slots

  def case(miss):
    blocks, maps = lists(miss)
    oldest = b.time(order, [maps.last_used], shared=maps)

    def layer_of(options):
      f, state = functools.partial(step, **options), (jax.tree.map(jnp.copy, maps), jnp.int32(1))
      whole, _, (missed,) = timing.measure(f, [()], b.effort, state=state, shared=blocks)
      alone = Timing((whole.us - oldest.us) / n_used, (whole.best_us - oldest.best_us) / n_used, whole.spread)
      return alone, float(missed.mean()) / n / n_used

    mine, missed = layer_of(b.kernel)
    others = dict(miss_rate=missed, oldest_us=oldest.us, oldest_per_layer_us=oldest.us / n_layers)
    moved = dict(hbm=rows * b.heads * n * (20 + 3 * 32))  # of slot_of, last_used, last_selected a sector each
    return b.row(mine, moved, {"xla": lambda: layer_of(b.xla)[0]}, **others)

  for miss in b.pick((0, 0.02, 0.1), (0.3,)):
    yield f"{rows}x{b.heads}x{n} miss {miss:.0%}", functools.partial(case, miss)


def attend(b: Bench) -> Cases:
  scale, zero = b.depth**-0.5, jnp.int32(0)

  def reads_of(blocks, slot, hits):
    arrays = (np.broadcast_to(x, (*slot.shape[:2], x.shape[2])) for x in (blocks, slot, hits))
    return kernels.Reads(*map(jnp.asarray, arrays))

  def op(slots, shared, inputs, **options):
    (tail, rows, tokens, pool, count), (q, reads) = shared, inputs
    partial, used, slots = kernels.attend(q, tail, rows, tokens, pool, slots, zero, reads, count, **options)
    return slots, (partial.output, used)

  def gathered(slots, shared, inputs, load):
    (_, _, _, pool, _), (q, reads) = shared, inputs
    if load:
      slots = kernels.load_blocks(pool, slots, zero, jnp.where(reads.hit, -1, reads.blocks), reads.slot, **b.kernel)
    kv = slots[reads.slot]  # [B, K, n, 2, S, D]
    s = jnp.einsum("bkgd,bknsd->bkgns", q, kv[..., 0, :, :], preferred_element_type=jnp.float32) * scale
    p = jax.nn.softmax(s, axis=(-2, -1)).astype(q.dtype)
    return slots, jnp.einsum("bkgns,bknsd->bkgd", p, kv[..., 1, :, :], preferred_element_type=jnp.float32)

  def run(rows, variants, slots, pool, count, threshold=None, always=0):
    tail = b.blocks(b.heads, 1, rows)
    tokens = b.rng.integers(1, b.size + 1, rows).astype(np.int32)
    shared = tail, jnp.arange(rows), jnp.asarray(tokens), pool, jnp.full((rows, b.heads), count, jnp.int32)
    f = functools.partial(op, threshold=threshold, always=always, scale=scale, **b.kernel)
    measured, _, results = timing.measure(f, variants, b.effort, state=slots, shared=shared)
    return measured, shared, [np.asarray(used) for _, used in results]

  def sparse(rows, n, miss, threshold=None):
    group, always = (4, 4) if threshold is not None else (n, 0)

    def inputs():
      hits = (group - b.rng.binomial(group, miss, (rows, b.heads, n // group))).astype(np.int32)
      reads = reads_of(b.distinct(b.n_pool, rows, 1, n), b.distinct(b.n_slots, rows, b.heads, n), hits)
      return b.random(rows, b.heads, b.group, b.depth), reads

    variants = b.variants(inputs)
    measured, shared, used = run(rows, variants, b.blocks(b.n_slots), b.pool, n, threshold, always)
    reached = [np.arange(n) < u[..., None] for u in used]
    missed = np.mean([(~np.asarray(reads.hit) & r).sum() for (_, reads), r in zip(variants, reached, strict=True)])
    read = np.mean([u.sum() for u in used])
    moved = dict(hbm=(read + rows * b.heads) * b.block_bytes, h2d=missed * b.block_bytes)
    whole = [(q, reads._replace(hits=reads.hits.sum(-1, keepdims=True))) for q, reads in variants]
    if threshold is None:
      f, name = functools.partial(gathered, load=miss > 0), "load, gather, attend" if miss else "gather, attend"
      rivals = {name: lambda: b.time(f, whole, state=b.blocks(b.n_slots), shared=shared)}
    else:
      rivals = {"all blocks": lambda: run(rows, whole, b.blocks(b.n_slots), b.pool, n)[0]}
    return b.row(measured, moved, rivals, miss_rate=float(missed / read), blocks_read=float(read / rows / b.heads))

  def dense(rows, n):
    """The pool lies in device memory, and there are no slots."""

    def inputs():
      nowhere, no_hits = np.full((rows, b.heads, n), -1, np.int32), np.zeros((rows, b.heads, 1), np.int32)
      return b.random(rows, b.heads, b.group, b.depth), reads_of(b.distinct(rows * n, rows, 1, n), nowhere, no_hits)

    variants = b.variants(inputs)
    measured, _, _ = run(rows, variants, b.blocks(0), b.blocks(b.heads, 1, rows * n), n)

    def contiguous():
      kv = [b.random(rows, n * b.size, b.heads, b.depth) for _ in range(2)]
      queries = [q.reshape(rows, 1, -1, b.depth) for q, _ in variants]
      attention = functools.partial(jax.nn.dot_product_attention, implementation=b.library)
      return b.time(lambda state, kv, q: (state, attention(q, *kv)), queries, shared=kv)

    moved = dict(hbm=rows * b.heads * (n + 1) * b.block_bytes)
    return b.row(measured, moved, {f"{b.library}, contiguous": contiguous})

  for rows, n, miss in b.pick([(64, 64, 0), (8, 64, 0), (64, 64, 0.02), (64, 64, 0.1), (64, 16, 1)], [(2, 8, 0.3)]):
    yield f"{rows}x{n} miss {miss:.0%}", functools.partial(sparse, rows, n, miss)
  for rows, n in b.pick([(8, 512)], [(2, 8)]):
    yield f"dense {rows}x{n * b.size} tokens", functools.partial(dense, rows, n)
  for rows, n, miss, threshold in b.pick([(64, 256, 0, 0.5), (64, 256, 0.02, 0.5)], [(2, 16, 0.3, 0.5)]):
    yield f"psa {threshold} {rows}x{n} miss {miss:.0%}", functools.partial(sparse, rows, n, miss, threshold)


def copy(b: Bench) -> Cases:
  width = b.block_bytes // 2  # bf16 values of a block
  device, host = timing.device_sharding(), timing.host_sharding()
  pages = jax.device_put(jnp.zeros((b.pick(65536, 64), width), jnp.bfloat16), host)

  def writable(x):
    """Pinned memory of an array as numpy, which JAX itself gives out read-only."""
    at = (ctypes.c_uint16 * x.size).from_address(x.unsafe_buffer_pointer())
    return np.frombuffer(at, np.uint16).reshape(x.shape)

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

    def staged(workers):
      memory, parts = writable(pages), np.array_split(np.arange(n), STAGING_THREADS)
      if loads:
        to = writable(staging)
        list(workers.map(lambda i: np.take(memory, chosen[i], 0, out=to[i[0] : i[-1] + 1], mode="clip"), parts))
        return jax.device_put(staging, end)
      got = np.asarray(jax.device_put(staging, end)).view(np.uint16)
      return list(workers.map(lambda i: memory.__setitem__(chosen[i], got[i]), parts))

    with concurrent.futures.ThreadPoolExecutor(STAGING_THREADS) as workers:
      rivals = {
        "one by one": lambda: timing.clock(lambda: jax.device_put(blocks, end), b.effort),
        "staged": lambda: timing.clock(lambda: staged(workers), b.effort),
      }
      return b.row(kernel(loads, n), {"h2d" if loads else "d2h": n * b.block_bytes}, rivals)

  for loads, n in itertools.product((True, False), b.pick((16, 64, 256, 1024), (16,))):
    yield f"{'load' if loads else 'store'} {n}", functools.partial(case, loads, n)


def prefill(b: Bench) -> Cases:
  def case(n, before):
    n_before, queries = before // b.size, b.heads * b.group

    def op(state, shared, inputs):
      (pool, slots), (q, k, v, prefix) = shared, inputs
      return state, kernels.prefill_attention(
        q, k, v, pool, slots, jnp.int32(0), prefix, jnp.int32(before), scale=b.depth**-0.5, **b.kernel
      )

    def inputs():
      slot = b.distinct(b.n_slots, b.heads, n_before)
      prefix = (np.broadcast_to(b.distinct(b.n_pool, n_before), slot.shape), slot) if before else None
      return b.random(n, b.heads, b.group, b.depth), *(b.random(n, b.heads, b.depth) for _ in range(2)), prefix

    def contiguous():
      kv = lambda: b.random(1, before + n, b.heads, b.depth)  # noqa: E731
      variants = b.variants(lambda: (b.random(1, n, queries, b.depth), kv(), kv()))
      attention = functools.partial(jax.nn.dot_product_attention, is_causal=not before, implementation=b.library)
      return b.time(lambda state, _, qkv: (state, attention(*qkv)), variants)

    measured = b.time(op, b.variants(inputs), shared=(b.pool, b.blocks(b.n_slots)))
    name = f"{b.library}, contiguous" + (", unmasked" if before else "")
    hbm = 4 * n * (queries + b.heads) * b.depth + b.heads * n_before * b.block_bytes
    moved = dict(hbm=hbm, flops=4 * n * (before + n / 2) * queries * b.depth)
    return b.row(measured, moved, {name: contiguous})

  for n, before in b.pick([(16384, 0), (2048, 14336), (2048, 30720)], [(32, 0), (16, 16)]):
    yield f"{n} after {before}", functools.partial(case, n, before)


OPS = {f.__name__: f for f in (digest, score, select, residency, attend, copy, prefill)}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  ops = _OPS.value or list(OPS)
  if unknown := [name for name in ops if name not in OPS]:
    raise app.UsageError(f"--ops: no {', '.join(unknown)}; there are {', '.join(OPS)}")
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  effort = timing.SMOKE if _SMOKE.value else Effort(_CALLS.value, _SECONDS.value)
  implementation = _IMPLEMENTATION.value or ("triton" if jax.default_backend() == "gpu" else "xla")
  ceilings = Ceilings.measure(effort)
  report = Report(pathlib.Path(_OUT.value) / "kernels.jsonl" if _OUT.value else None, ceilings, _COMMIT.value)
  bench = Bench(_SMOKE.value, implementation, effort, ceilings)
  for name in ops:
    for case, make in OPS[name](bench):
      report.add(name, case, make)
  report.close()


if __name__ == "__main__":
  app.run(main)
