"""Times of whole decode steps of a model with random weights, against what their bytes need, on one NVIDIA GPU.

  python -m experiments.bench_step --out=/tmp/bench --cases=64x10240,20x32768

A case is <requests>x<tokens of each>. The same step is repeated, so that all it selects is in slots, and before each
repetition a share of the slots it used is emptied: what misses is random, how much is known. The floor of a step is
weights + digests + the sum over layers of the slower of HBM and PCIe. Further rows: a progressive step, and the layers
without attention. The last line of stdout is one JSON object; the folder of --out gets step.jsonl, a row a case.
"""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
import tempfile
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as kernels
from experiments import timing
from experiments.timing import Ceilings, Effort, Report, Row, Timing
from sparse_serve_jax import runtime
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.config import ModelConfig, find_config, load_config, override, read_config
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.kv_cache import CacheShape, KVCache
from sparse_serve_jax.models import llama
from sparse_serve_jax.step import DecodeBatch, SamplingRows, Setup, programs

_OUT = flags.DEFINE_string("out", None, "Folder for step.jsonl; rows are added to it.")
_MODEL = flags.DEFINE_string("model", "llama3-8b", "A name in configs/models, or a JSON file.")
_CASES = flags.DEFINE_list("cases", ["64x10240", "20x32768"], "Requests x tokens of each.")
_MISSES = flags.DEFINE_list("misses", ["0", "0.02", "0.1"], "Shares of the slots in use that are emptied.")
_DENSE = flags.DEFINE_list("dense_batches", ["1", "8", "32", "64"], "Rows of the layers without attention.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "psa; by default token_budget / tokens, which reads about as much.")
_HBM = flags.DEFINE_float("hbm_gib", 20, "cache.hbm_bytes.", lower_bound=0)
_DRAM = flags.DEFINE_float("dram_gib", None, "cache.dram_bytes; by default what the case needs.", lower_bound=0)
_SET = flags.DEFINE_multi_string("set", [], "Further overrides of configs/serving/sparse_serve.json.")
_STEPS = flags.DEFINE_integer("steps", 20, "Of a call.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Also the time of every kernel, us a layer.")
_COMMIT = flags.DEFINE_string("commit", None, "What rows are stamped with where there is no git to ask.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny model and few steps, on any machine: whether it runs.")

_SMOKE_SET = ["cache.block_tokens=8", "sparse.token_budget=64", "sparse.sink_tokens=8", "sparse.window_tokens=8"]


def random_params(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> llama.Params:
  """Weights made on the device, a layer at a time, of the sizes that `llama.init_params` gives them."""
  fan_in = {"wo": cfg.n_heads * cfg.head_dim, "w_down": cfg.d_ff, "embed": 1}
  dtype = llama.dtype_of(cfg)

  def leaf(path, shape, spec):
    name = path[-1].key
    if name.endswith("norm"):
      return jax.device_put(jnp.ones(shape, dtype), NamedSharding(mesh, spec))
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), zlib.crc32(name.encode()))
    std = fan_in.get(name, cfg.d_model) ** -0.5
    one = lambda key, dims: jax.random.normal(key, dims, dtype) * jnp.asarray(std, dtype)  # noqa: E731
    if len(path) == 1:
      make = lambda: one(key, shape)  # noqa: E731
    else:
      make = lambda: lax.map(lambda key: one(key, shape[1:]), jax.random.split(key, shape[0]))  # noqa: E731
    return jax.jit(make, out_shardings=NamedSharding(mesh, spec))()

  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  shapes, specs = llama.param_shapes(cfg), llama.param_specs(cfg, mesh.size)
  return jax.tree_util.tree_map_with_path(leaf, shapes, specs, is_leaf=is_shape)


def filled_cache(shape: CacheShape, mesh: jax.sharding.Mesh, implementation: str) -> KVCache:
  """An empty cache but for random digests and tails, and a pool in which random blocks repeat."""
  cache, shardings = kv_cache.create(shape, mesh), kv_cache.cache_shardings(mesh, shape.offload)
  part = 64 if shape.M >= 64 else shape.M
  source = timing.normal(jax.random.key(1, impl="rbg"), (shape.K, shape.L, part, 2, shape.S, shape.D), cache.pool.dtype)
  store = functools.partial(kernels.store_blocks, implementation=implementation)
  specs = P("tp"), P("tp"), P(), P(), P()
  mapped = jax.shard_map(store, mesh=mesh, in_specs=specs, out_specs=P("tp"), check_vma=False)
  store = jax.jit(mapped, donate_argnums=0, out_shardings=shardings.pool)
  pool = cache.pool
  for start in range(0, shape.M, part):
    ids = start + np.arange(part, dtype=np.int32)
    pool = store(pool, source, np.int32(0), np.arange(part, dtype=np.int32), np.where(ids < shape.M, ids, -1))

  def fill(key, dims):
    """One layer of one head at a time."""
    keys = jax.random.split(key, dims[:2])
    return lax.map(lambda k: lax.map(lambda k: jax.random.normal(k, dims[2:], cache.pool.dtype), k), keys)

  digest, tail = cache.digest.shape, cache.tail.shape
  cache = cache.replace(pool=pool, digest=None, tail=None)
  make = functools.partial(jax.jit(fill, static_argnums=1, out_shardings=shardings.tail), jax.random.key(2, impl="rbg"))
  return cache.replace(digest=make(digest), tail=make(tail))


def evict(maps: kernels.Maps, clock: jax.Array, share: jax.Array, first: jax.Array, *, n_layers: int):
  """The maps without about that share of the slots that the last step used, and a copy of `first`."""
  heads, layers, n_pool = maps.slot_of.shape
  used = maps.last_used >= (clock - 1) * n_layers
  drop = used & (jax.random.uniform(jax.random.fold_in(jax.random.key(3), clock), used.shape) < share)
  block = jnp.where(drop & (maps.block_of >= 0), maps.block_of, heads * layers * n_pool)
  slot_of = maps.slot_of.ravel().at[block].set(-1, mode="drop").reshape(maps.slot_of.shape)
  block_of, last_used = (jnp.where(drop, -1, x) for x in (maps.block_of, maps.last_used))
  return maps._replace(slot_of=slot_of, block_of=block_of, last_used=last_used), jnp.copy(first)


class Case:
  """Requests of equal length, their cache, and the steps of two policies."""

  def __init__(self, cfg: ModelConfig, params: llama.Params, mesh: jax.sharding.Mesh, n_rows: int, n_tokens: int):
    self.cfg, self.params, self.mesh, self.n_rows = cfg, params, mesh, n_rows
    self.implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    small = _SMOKE_SET if _SMOKE.value else []
    rows = [f"cache.rows={n_rows}", f"scheduler.max_batch={n_rows}", f"scheduler.max_context={n_tokens}"]
    config = override(load_config("sparse_serve"), [*small, *rows, *_SET.value])
    size = config.cache.block_tokens
    self.n_blocks = n_tokens // size
    block_bytes = 2 * size * cfg.head_dim * llama.dtype_of(cfg).itemsize
    dram = self.n_rows * self.n_blocks * cfg.n_kv_heads * cfg.n_layers * block_bytes
    dram = dram if _DRAM.value is None else int(_DRAM.value * 2**30)
    hbm = 2 * dram if _SMOKE.value else int(_HBM.value * 2**30)
    threshold = _THRESHOLD.value or min(1.0, config.sparse.token_budget / n_tokens)
    sizes = [f"cache.dram_bytes={dram}", f"cache.hbm_bytes={hbm}", f"sparse.threshold={threshold}"]
    self.configs = {policy: override(config, [*sizes, f"sparse.policy={policy}"]) for policy in ("topk", "psa")}
    self.shape = CacheShape.of(cfg, self.configs["topk"], get_method(config.sparse.method).vectors)
    if n_rows * self.n_blocks > self.shape.M:
      raise ValueError(f"{n_rows} requests of {self.n_blocks} blocks do not fit {self.shape.M}: raise --dram_gib")

    rng, whole = np.random.default_rng(0), NamedSharding(mesh, P())
    tables = rng.permutation(self.shape.M)[: n_rows * self.n_blocks].reshape(n_rows, self.n_blocks)
    column = lambda value, dtype: np.full(n_rows, value, dtype)  # noqa: E731
    self.batch = DecodeBatch(
      rows=np.arange(n_rows, dtype=np.int32),
      positions=column(self.n_blocks * size - size // 2, np.int32),  # no tail fills
      steps=column(1, np.int32),
      tables=tables.astype(np.int32),
      sampling=SamplingRows(column(0, np.float32), column(1, np.float32), column(0, np.uint32)),
    )
    self.first = jax.device_put(rng.integers(0, cfg.vocab_size, n_rows).astype(np.int32), whole)
    placed = kv_cache.cache_shardings(mesh, True).maps, whole
    self.evict = jax.jit(evict, static_argnames="n_layers", out_shardings=placed)
    self.cache: Any = None
    self.kernels: dict[str, int] = {}  # of a layer

  def run(self, policy: str, share: float, ceilings: Ceilings, effort: Effort) -> Row:
    """Times steps by difference: evictions and steps, less evictions alone; and one by one by the host's clock."""
    cache = self.cache or filled_cache(self.shape, self.mesh, self.implementation)
    self.cache = None  # until it is whole again
    steps, counts = _STEPS.value, []
    program: Any = programs(Setup.of(self.cfg, self.configs[policy], self.implementation), self.mesh).decode
    if policy not in self.kernels:
      self.kernels[policy] = timing.kernels_in_loop(program.lower(self.params, cache, self.batch).compile().as_text())

    def prepared(cache: KVCache) -> KVCache:
      maps, last_token = self.evict(cache.maps, cache.clock, share, self.first, n_layers=self.cfg.n_layers)
      return cache.replace(maps=maps, last_token=last_token)

    def repeat(n: int) -> float:
      nonlocal cache
      start = time.perf_counter()
      for _ in range(n):
        cache, _, count = program(self.params, prepared(cache), self.batch)
        counts.append(count)
      jax.block_until_ready(cache)
      return time.perf_counter() - start

    def without_steps(n: int) -> float:
      start, last = time.perf_counter(), None
      for _ in range(n):  # each of the same maps
        last = self.evict(cache.maps, cache.clock, share, self.first, n_layers=self.cfg.n_layers)
      jax.block_until_ready(last)
      return time.perf_counter() - start

    repeat(4)  # compiles and fills slots, then settles
    without_steps(1)
    compiled = program._cache_size()
    counts.clear()
    timed = Timing.of([repeat(steps) - without_steps(steps) for _ in range(effort.calls)], steps)
    alone, dispatch = [], []
    for _ in range(steps):
      cache = jax.block_until_ready(prepared(cache))
      start = time.perf_counter()
      cache, _, count = program(self.params, cache, self.batch)
      dispatch.append(time.perf_counter() - start)
      jax.block_until_ready((cache, count))
      alone.append(time.perf_counter() - start)
    kernels_of = _profiled(repeat, steps, self.cfg.n_layers) if _PROFILE.value else {}
    attended, missed, in_use = (float(x) for x in np.mean([np.asarray(count) for count in counts], 0))
    self.cache = cache
    parts = self.parts(attended, missed)
    floors = {name: ceilings.floor_us(**part) for name, part in parts.items()}
    moved = {way: sum(part.get(way, 0) for part in parts.values()) for way in ("hbm", "h2d")}
    return timing.row(
      timed,
      sum(floors.values()),
      moved,
      floors_us=floors,
      miss_rate=missed / attended,
      blocks_attended=attended,
      slots_in_use=in_use,
      host_clock_us=Timing.of(alone, 1).us,
      dispatch_us=Timing.of(dispatch, 1).us,
      recompiled=program._cache_size() - compiled,
      kernels_a_layer=self.kernels[policy],
      kernels_us_a_layer=kernels_of,
    )

  def parts(self, attended: float, missed: float) -> dict[str, dict[str, float]]:
    """Bytes of a step by what follows what: HBM and PCIe overlap within a part. Misses are also written to HBM."""
    lists, shape = self.n_rows * self.cfg.n_kv_heads * self.cfg.n_layers, self.shape
    digest = shape.E * shape.D * jnp.dtype(shape.dtype).itemsize
    return {
      "weights": {"hbm": weight_bytes(self.cfg, self.params, self.n_rows)},
      "digests": {"hbm": lists * (self.n_blocks - 1) * digest},
      "kv": {"hbm": (attended + lists) * shape.block_bytes, "h2d": missed * shape.block_bytes},  # layers are alike
    }


def weight_bytes(cfg: ModelConfig, params: llama.Params, n_rows: int) -> float:
  """What a step of `n_rows` tokens reads; of an embedding that is not the head, one row a token."""
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return whole if cfg.tie_embeddings else whole - params["embed"].nbytes * (1 - n_rows / cfg.vocab_size)


def dense_part(cfg: ModelConfig, params: llama.Params, n_rows: int, ceilings: Ceilings, effort: Effort) -> Row:
  """The layers and the head as `decode_step` runs them, with the sum of q, k and v for attention's result."""
  turns = llama.rope(cfg, jnp.arange(n_rows))

  def op(state, params, tokens):
    def layer(i, x):
      lp = llama.layer_params(params, i)
      q, k, v = llama.qkv(cfg, lp, x, turns)
      return llama.mlp(cfg, lp, llama.attention_out(lp, x, q + (k + v)[:, :, None], None), None)

    x = lax.fori_loop(0, cfg.n_layers, layer, llama.embed(params, tokens))
    return state, llama.logits(cfg, params, x, None).argmax(-1)

  measured, _, _ = timing.measure(op, [jnp.arange(n_rows) + i for i in range(2)], effort, shared=params)
  moved = {"hbm": weight_bytes(cfg, params, n_rows)}
  return timing.row(measured, ceilings.floor_us(**moved), moved)


def _profiled(repeat: Any, steps: int, n_layers: int) -> dict[str, float]:
  """us a layer of each kernel of some steps, printed."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      repeat(steps)
    files = pathlib.Path(folder).rglob("*.trace.json.gz")
    traces = [json.loads(gzip.decompress(file.read_bytes())) for file in files]
  times = {
    name: us / steps / n_layers for trace in traces for name, us in timing.kernel_times(trace, without="evict").items()
  }
  for name, us in list(times.items())[:30]:
    print(f"    {us:8.2f} us a layer  {name}")
  return times


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  smoke = _SMOKE.value
  cases, batches = (["2x128"], [2]) if smoke else (_CASES.value, [int(n) for n in _DENSE.value])
  sizes = [tuple(int(n) for n in case.split("x")) for case in cases]
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  effort = timing.SMOKE if smoke else Effort()
  ceilings = Ceilings.measure(effort)
  report = Report(pathlib.Path(_OUT.value) / "step.jsonl" if _OUT.value else None, ceilings, _COMMIT.value)
  cfg = read_config(ModelConfig, find_config("models", "tiny" if smoke else _MODEL.value))
  mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  params = random_params(cfg, mesh)
  for n in batches:
    report.add("dense part", f"batch {n}", functools.partial(dense_part, cfg, params, n, ceilings, effort))
  for n_rows, n_tokens in sizes:
    case = Case(cfg, params, mesh, n_rows, n_tokens)
    for policy, misses in (("topk", [float(miss) for miss in _MISSES.value]), ("psa", [0.0])):
      for miss in misses:
        name = f"{policy} {n_rows}x{n_tokens} miss {miss:.0%}"
        report.add("step", name, functools.partial(case.run, policy, miss, ceilings, effort))
    del case
  report.close()


if __name__ == "__main__":
  app.run(main)
