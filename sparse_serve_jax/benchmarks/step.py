"""Times of whole decode steps of a model with random weights, against what their bytes need, on one NVIDIA GPU.

Batches have the shapes that an engine for just that case dispatches: rows and block tables padded. The same step is
repeated, so that all it selects is in slots, and before each repetition a share of the slots it used is emptied: what
misses is random, how much is known. The floor of a step is weights + digests + the sum over layers of the slower of HBM
and PCIe, of the requests alone. Further rows: a progressive step, the layers without attention, the same steps by other
loads, and with dense attention over a pool that lies in HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as kernels
from sparse_serve_jax.attention import drawn, get_method  # noqa: F401  benchmarks may name its methods
from sparse_serve_jax.attention.decode import Selector
from sparse_serve_jax.benchmarks import timing
from sparse_serve_jax.benchmarks.timing import Report, Row, Timing
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.create import create
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.memory.layout import ITEM_BYTES
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import llama
from sparse_serve_jax.programs import programs
from sparse_serve_jax.serving.budget import kv_bytes, weight_bytes
from sparse_serve_jax.step import DecodeBatch, Setup, StepCounts

_FIXED = {  # what may not be overridden, and why
  "sparse.policy": "every row has its own",
  "cache.load": "--loads chooses it",
  "implementation": "it is the device's",
  "tp": "one device is timed",
}
# Whether it runs, with the model "tiny".
SMOKE_SIZES = {"2x128": (2, 128), "1x256": (1, 256)}
SMOKE_CHANGES = [
  *("cache.block_tokens=8", "cache.hbm_bytes=512KiB"),
  *("sparse.token_budget=64", "sparse.sink_tokens=8", "sparse.window_tokens=8"),
]


@dataclasses.dataclass(frozen=True)
class Case:
  """Requests of equal length."""

  n_rows: int
  n_tokens: int  # of each; the last block is half full, in the tail
  config: EngineConfig  # its own, but for the cache

  @property
  def n_blocks(self) -> int:
    return self.n_tokens // self.config.cache.block_tokens

  def padded(self, cfg: ModelConfig) -> tuple[int, int]:
    """Rows and table width of the batch that an engine makes of it."""
    buckets = Buckets.of(self.config, cfg.n_layers, self.config.scheduler.max_context or cfg.max_context)
    program = buckets.decode(self.n_rows, self.n_blocks)
    return program.rows, program.table

  @classmethod
  def all_of(cls, cfg: ModelConfig, sizes: Mapping[str, tuple[int, int]], given: Sequence[str]) -> dict[str, Self]:
    """From requests and tokens of each. One cache serves them all: 20 GiB of HBM, a pool that just holds the largest.

    A psa reads about as much as topk. `given` overrides that.

    Raises:
      ValueError: `given` is wrong, or a case has no full block.
    """
    keys = [assignment.partition("=")[0].strip() for assignment in given]
    if fixed := [key for key in keys if key in _FIXED]:
      raise ValueError(f"{fixed[0]} cannot be set: {_FIXED[fixed[0]]}")
    base = override(load_config("sparse_serve"), given)
    if base.sparse.dense_layers:
      raise ValueError("sparse.dense_layers cannot be set: floors take all layers to be alike")
    if not sizes:
      return {}
    size, rows = base.cache.block_tokens, max(n for n, _ in sizes.values())
    if short := [name for name, (_, tokens) in sizes.items() if tokens < 2 * size]:
      raise ValueError(f"{short[0]} has no full block of {size} tokens before its tail")
    defaults = [
      f"cache.lanes={rows}",
      f"cache.dram_bytes={max(n * (tokens // size) for n, tokens in sizes.values()) * size * kv_bytes(cfg)}",
      "cache.hbm_bytes=20GiB",
    ]

    def config(n: int, tokens: int) -> EngineConfig:
      threshold = f"sparse.threshold={min(1.0, base.sparse.token_budget / tokens)}"
      limits = f"scheduler.max_batch={n}", f"scheduler.max_context={tokens}"
      return override(base, [*defaults, *limits, threshold, *given, "sparse.policy=topk"])

    return {name: cls(n, tokens, config(n, tokens)) for name, (n, tokens) in sizes.items()}

  def densely(self) -> Case:
    """The same step with dense attention, and with all KV in HBM."""
    changes = ["sparse.policy=dense", "cache.offload=false", "cache.load=fused", "cache.save=direct"]
    return dataclasses.replace(self, config=override(self.config, changes))

  def fits(self, cfg: ModelConfig) -> bool:
    """Whether a cache of its own holds it."""
    shape = CacheShape.of(cfg, self.config, get_method(self.config.sparse.method).vectors)
    return self.n_rows * self.n_blocks <= shape.M and self.n_tokens <= shape.max_context


def cache_shape(cfg: ModelConfig, cases: Mapping[str, Case]) -> CacheShape | None:
  """Of the one cache that serves all cases; None if there are none.

  Raises:
    ValueError: a case does not fit it.
  """
  if not cases:
    return None
  configs = [case.config for case in cases.values()]
  shapes = [CacheShape.of(cfg, config, get_method(config.sparse.method).vectors) for config in configs]
  shape = max(shapes, key=lambda shape: shape.slab_tokens)
  for name, case in cases.items():
    case.padded(cfg)
    if case.n_rows > shape.R or case.n_rows * case.n_blocks > shape.M:
      needed, there = f"{case.n_rows} requests of {case.n_blocks} blocks", f"{shape.R} lanes and {shape.M} blocks"
      raise ValueError(f"{name}: {needed} do not fit {there}")
  return shape


def random(
  seed: int, shape: Sequence[int], dtype: Any, sharding: Any, scale: float = 1, *, stacked: int = 1
) -> jax.Array:
  """Normal values; stacks are made one of the first `stacked` axes at a time, as that takes more memory than they."""
  n, one_of = (math.prod(shape[:stacked]), shape[stacked:]) if len(shape) > 2 else (1, shape)

  def one(key):
    return jax.random.normal(key, one_of, dtype) * jnp.asarray(scale, dtype)

  def make(key):
    return lax.map(one, jax.random.split(key, n)).reshape(shape)

  return jax.jit(make, out_shardings=sharding)(jax.random.key(seed, impl="rbg"))


def random_params(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> llama.Params:
  """Weights made on the device, of a scale at which activations stay finite."""
  seeds = itertools.count()

  def leaf(path, shape, spec):
    name, dtype, sharding = path[-1].key, llama.dtype_of(cfg), NamedSharding(mesh, spec)
    if name.endswith("norm"):
      return jax.device_put(jnp.ones(shape, dtype), sharding)
    return random(next(seeds), shape, dtype, sharding, 1 if name == "embed" else cfg.d_model**-0.5)

  shapes, specs = llama.param_shapes(cfg), llama.param_specs(cfg, mesh.size)
  return jax.tree_util.tree_map_with_path(leaf, shapes, specs, is_leaf=lambda x: isinstance(x, tuple))


def filled_cache(shape: CacheShape, mesh: jax.sharding.Mesh) -> KVCache:
  """An empty cache but for random digests and tails, and a random pool: in host memory, random blocks repeat."""
  shardings, pool = kv_cache.cache_shardings(mesh, shape.offload), None
  if not shape.offload:
    # First, and once: freed and made anew it may find no gap of its size among the other arrays.
    pool = random(0, shape.pool_shape, shape.dtype, shardings.pool, stacked=2)
  cache = create(shape, mesh, pool)
  pool, hot = cache.pool, cache.hot
  del cache  # frees what is made anew
  if shape.offload:
    timing.fill_pool(pool)
  digest, tail = hot.digest.shape, hot.tail.shape
  hot = hot.replace(digest=None, tail=None)
  make = functools.partial(random, dtype=shape.dtype, sharding=shardings.hot.tail)  # digests are split like tails
  return KVCache(pool, hot.replace(digest=make(1, digest), tail=make(2, tail)))


def evict(maps: kernels.Maps, clock: jax.Array, *, share: jax.Array, first: jax.Array, n_layers: int):
  """The maps without about that share of the slots that the last step used, and a copy of `first`."""
  heads, layers, n_pool = maps.slot_of.shape
  used = maps.last_used >= (clock - 1) * n_layers
  drop = used & (jax.random.uniform(jax.random.fold_in(jax.random.key(3), clock), used.shape) < share)
  block = jnp.where(drop & (maps.block_of >= 0), maps.block_of, heads * layers * n_pool)
  slot_of = maps.slot_of.ravel().at[block].set(-1, mode="drop").reshape(maps.slot_of.shape)
  block_of, last_used = (jnp.where(drop, -1, x) for x in (maps.block_of, maps.last_used))
  return maps._replace(slot_of=slot_of, block_of=block_of, last_used=last_used), jnp.copy(first)


def seconds(f: Callable[[], Any], n: int) -> float:
  """Of `n` calls, dispatched without waiting for results."""
  start, last = time.perf_counter(), None
  for _ in range(n):
    last = f()
  jax.block_until_ready(last)
  return time.perf_counter() - start


class Steps:
  """Repeats a step. Before each, `evict` empties a share of the slots that the last one used."""

  def __init__(self, program: Callable[[KVCache], Any], evict: Callable[..., Any], cache: KVCache):
    self.program, self.evict, self.cache = program, evict, cache
    self.counts: list[jax.Array] = []  # StepCounts of every step

  def evicted(self) -> KVCache:
    hot = self.cache.hot
    maps, last_token = self.evict(hot.maps, hot.clock)
    return self.cache.replace(hot=hot.replace(maps=maps, last_token=last_token))

  def step(self, cache: KVCache | None = None) -> Any:
    """A step, by default after an eviction. Returns what to wait for."""
    self.cache, output = self.program(self.evicted() if cache is None else cache)
    self.counts.append(output.counts)
    return self.cache, output

  def one_by_one(self, n: int) -> tuple[Timing, Timing]:
    """Steps by the host's clock, until one is dispatched and until its results are there."""
    dispatched, done = [], []
    for _ in range(n):
      cache = jax.block_until_ready(self.evicted())
      start = time.perf_counter()
      results = self.step(cache)
      dispatched.append(time.perf_counter() - start)
      jax.block_until_ready(results)
      done.append(time.perf_counter() - start)
    return Timing.of(dispatched, 1), Timing.of(done, 1)

  def profile(self, n: int, n_layers: int) -> dict[str, dict[str, float]]:
    """Launches and us a layer of every kernel; prints the longest."""
    layers = n * n_layers
    times = timing.profile(lambda: seconds(self.step, n), without="evict")
    found = {name: {"count": count / layers, "us": us / layers} for name, (count, us) in times.items()}
    print(f"    {sum(kernel['count'] for kernel in found.values()):.1f} kernels a layer; count and us of each:")
    for name, kernel in itertools.islice(found.items(), 30):
      print(f"    {kernel['count']:8.2f} {kernel['us']:8.2f}  {name}")
    return found


class Bench:
  """The cases' steps over one cache, which is made when it is first used."""

  def __init__(
    self, cfg: ModelConfig, params: llama.Params, mesh: jax.sharding.Mesh, shape: CacheShape, report: Report
  ):
    self.cfg, self.params, self.mesh, self.shape, self.report = cfg, params, mesh, shape, report
    self.cache: Any = None

  def inputs(self, case: Case) -> tuple[DecodeBatch, jax.Array, Callable[..., Any]]:
    """The batch of every step, the tables of all lanes, and `evict` with its tokens."""
    rng, n, size = np.random.default_rng(0), case.n_rows, self.shape.S
    n_rows, _ = case.padded(self.cfg)
    real = np.arange(n_rows) < n

    def column(values, fill=0):
      return np.where(real, values, fill).astype(np.int32)

    tables = np.full((self.shape.R, self.shape.N), -1, np.int32)
    tables[:n, : case.n_blocks] = rng.permutation(self.shape.M)[: n * case.n_blocks].reshape(n, -1)
    batch = DecodeBatch(
      lanes=column(np.arange(n_rows), self.shape.R),
      positions=column(case.n_blocks * size - size // 2),  # no tail fills
      steps=column(1),
      fills=column(-1, -1),
      tokens=column(-1, -1),
      sampling=None,
      threshold=np.float32(case.config.sparse.fixed_threshold),
    )
    whole = NamedSharding(self.mesh, P())
    tokens = np.zeros(self.shape.R, np.int32)  # the last token of every lane
    tokens[:n] = rng.integers(0, self.cfg.vocab_size, n)
    placed = kv_cache.cache_shardings(self.mesh, self.shape.offload).hot.maps, whole
    jitted = jax.jit(evict, static_argnames="n_layers", out_shardings=placed)
    evict_some = functools.partial(jitted, first=jax.device_put(tokens, whole), n_layers=self.cfg.n_layers)
    return batch, jax.device_put(tables, whole), evict_some

  def run(self, case: Case, changes: Sequence[str], share: float, n: int, profile: bool) -> Row:
    """Times n steps by difference: evictions and steps, less evictions alone; and one by one by the host's clock."""
    case = dataclasses.replace(case, config=(config := override(case.config, changes)))
    decode: Any = programs(Setup.of(self.cfg, config, self.report.implementation), self.mesh).decode
    cache, (batch, tables, evict) = self.cache or filled_cache(self.shape, self.mesh), self.inputs(case)
    self.cache = None  # until it is whole again
    maps = kernels.Maps.empty(self.shape.K, self.shape.L, self.shape.M, self.shape.P)
    host, number = timing.following(cache.pool) if config.cache.load == "staged" else None, None
    if host is not None:
      number = jax.device_put(host.numbers, kv_cache.cache_shardings(self.mesh, self.shape.offload).hot.pool_id)
    cache = cache.replace(hot=cache.hot.replace(maps=maps, tables=tables, pool_id=number))
    n_rows, width = case.padded(self.cfg)

    def program(cache: KVCache):
      return decode(self.params, cache, batch, width)

    steps = Steps(program, functools.partial(evict, share=share), cache)
    del cache
    seconds(steps.step, 4)  # compiles and fills slots, then settles
    seconds(steps.evicted, 1)
    steps.counts.clear()
    compiled = decode._cache_size()  # private to jax, which has no public count of the programs of a jit
    timed = Timing.of([seconds(steps.step, n) - seconds(steps.evicted, n) for _ in range(self.report.effort.calls)], n)
    dispatched, alone = steps.one_by_one(n)
    others = {
      "padded_rows": n_rows,
      "padded_blocks": width,
      "host_clock_us": alone.us,
      "dispatch_us": dispatched.us,
      "recompiled": decode._cache_size() - compiled,
      "kernels_a_layer": steps.profile(n, self.cfg.n_layers) if profile else {},
    }
    self.cache = steps.cache
    counts = StepCounts(*np.mean([np.asarray(counts) for counts in steps.counts], 0).tolist())
    return self.row(case, timed, counts.attended, counts.missed) | {"slots_in_use": counts.slots_used} | others

  def row(self, case: Case, timed: Timing, attended: float, missed: float) -> Row:
    """With the floor of what has to move. HBM and PCIe overlap within a part; misses are also written to HBM."""
    (_, width), of = case.padded(self.cfg), Selector.of(case.config)
    # Digests are read where tables are ranked: `Selector.select`.
    unranked = of.limit is None or (of.limit >= width and not of.progressive and of.method.budget is None)
    full_blocks = 0 if unranked else case.n_rows * (case.n_blocks - 1)
    parts = step_bytes(self.cfg, self.shape, case.n_rows, full_blocks, attended, missed)
    floors = {name: self.report.ceilings.floor_us(**part) for name, part in parts.items()}
    moved = {way: sum(part.get(way, 0) for part in parts.values()) for way in ("hbm", "h2d")}
    others = dict(floors_us=floors, miss_rate=missed / attended, blocks_attended=attended)
    return timing.row(timed, sum(floors.values()), moved, **others)


@dataclasses.dataclass(frozen=True)
class Runs:
  """What of each case is timed."""

  steps: int  # of a call
  profile: bool  # also launches and time of every kernel, a layer
  loads: Sequence[str]  # names in LOADS
  dense: bool  # also with dense attention over a pool in HBM

  @property
  def ways(self) -> dict[str, list[str]]:
    """Overrides of a case by the name of its rows, which is "topk" where nothing is said of the load: fused."""
    ways = {
      "topk" if load == "fused" else f"topk by {load}": ["sparse.policy=topk", f"cache.load={load}"]
      for load in self.loads
    }
    return ways | {"psa": ["sparse.policy=psa", "cache.load=fused"]}


def step_bytes(
  cfg: ModelConfig, shape: CacheShape, n_rows: int, full_blocks: int, attended: float, missed: float
) -> dict[str, dict[str, float]]:
  """What a decode step has to move, by part and way. Within a part HBM and PCIe overlap: layers are taken to be alike.

  Args:
    cfg: the model.
    shape: of its cache.
    n_rows: tokens.
    full_blocks: of these rows together, of one layer and head.
    attended: blocks that they attend to besides their tails, over layers and heads.
    missed: of these, those that are not in HBM.
  """
  lists = shape.K * shape.L
  return {
    "weights": {"hbm": weights_read(cfg, n_rows)},
    "digests": {"hbm": full_blocks * lists * shape.E * shape.layout.vector_bytes},
    "kv": {"hbm": (attended + n_rows * lists) * shape.block_bytes, "h2d": missed * shape.block_bytes},
  }


def weights_read(cfg: ModelConfig, n_rows: int) -> int:
  """Bytes, by a step of `n_rows` tokens; of an embedding that is not the head, one row a token."""
  left = 0 if cfg.tie_embeddings else (cfg.vocab_size - n_rows) * cfg.d_model * ITEM_BYTES[cfg.dtype]
  return weight_bytes(cfg, 1) - left


def dense_part(cfg: ModelConfig, params: llama.Params, n_rows: int, report: Report) -> Row:
  """The layers and the head as `decode_step` runs them, with the sum of q, k and v for attention's result."""
  cos_sin = llama.rope(cfg, jnp.arange(n_rows))

  def op(state, params, tokens):
    def layer(i, x):
      lp = llama.layer_params(params, i)
      q, k, v = llama.qkv(cfg, lp, x, cos_sin)
      return llama.mlp(cfg, lp, llama.attention_out(lp, x, q + (k + v)[:, :, None], None), None)

    x = lax.fori_loop(0, cfg.n_layers, layer, llama.embed(params, tokens))
    return state, llama.logits(cfg, params, x, None).argmax(-1)

  measured, _, _ = timing.measure(op, [jnp.arange(n_rows) + i for i in range(2)], report.effort, shared=params)
  moved = {"hbm": weights_read(cfg, n_rows)}
  return timing.row(measured, report.ceilings.floor_us(**moved), moved)


def measure(
  report: Report,
  cfg: ModelConfig,
  cases: Mapping[str, Case],
  misses: Mapping[str, float],
  batches: Sequence[int],
  runs: Runs,
) -> None:
  """Adds the rows of all cases to the report.

  Args:
    report: what it goes to.
    cfg: the model.
    cases: what steps are of; they fit one cache.
    misses: shares of the slots in use that are emptied, by how they are called.
    batches: rows of the layers without attention.
    runs: what of the cases is timed, and how.
  """
  mesh = make_mesh(1)
  params = random_params(cfg, mesh)
  for n in batches:
    report.add("dense part", f"batch {n}", functools.partial(dense_part, cfg, params, n, report))
  if shape := cache_shape(cfg, cases):
    bench = Bench(cfg, params, mesh, shape, report)
    for name, case in cases.items():
      for by, changes in runs.ways.items():
        for percent, share in misses.items() if by != "psa" else [("0%", 0.0)]:
          row = functools.partial(bench.run, case, changes, share, runs.steps, runs.profile)
          report.add("step", f"{by} {name} miss {percent}", functools.partial(_beside_none, report, by, name, row))
    bench.cache = None  # the pool of the others lies in HBM
    _dense(report, cfg, cases if runs.dense else {}, functools.partial(Bench, cfg, params, mesh), runs)


def _beside_none(report: Report, by: str, name: str, make: Callable[[], Row]) -> Row:
  """A row with the share of its time that misses cost, if the step without misses was timed."""
  row = make()
  without = report.results.get(f"step-{by} {name} miss 0%", {}).get("us")
  return row | ({} if without is None else {"loading_share": 1 - without / row["us"]})


def _dense(
  report: Report, cfg: ModelConfig, cases: Mapping[str, Case], make: Callable[[CacheShape, Report], Bench], runs: Runs
) -> None:
  """Rows of the same steps with dense attention, of those that fit HBM, beside the first way without misses."""
  dense = {name: of for name, case in cases.items() if (of := case.densely()).fits(cfg)}
  if told := [name for name in cases if name not in dense]:
    print(f"dense: {', '.join(told)} do not fit cache.hbm_bytes", file=sys.stderr)
  if not (shape := cache_shape(cfg, dense)):
    return
  bench = make(shape, report)

  def row(name: str, case: Case) -> Row:
    row = bench.run(case, (), 0.0, runs.steps, runs.profile)
    sparse = report.results.get(f"step-{next(iter(runs.ways))} {name} miss 0%", {}).get("us")
    return row | ({} if sparse is None else {"times_sparse": row["us"] / sparse})

  for name, case in dense.items():
    report.add("step", f"dense {name}", functools.partial(row, name, case))
