"""What cannot fit is refused before anything is placed, with all numbers; and memory that was taken is given back."""

from __future__ import annotations

import functools
import gc
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax.attention import get_method
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, ModelConfig, find_config, override, read_config
from sparse_serve_jax.memory import pinned
from sparse_serve_jax.memory.create import empty_hot
from sparse_serve_jax.memory.kv_cache import KVCache, cache_shardings
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import llama, load_model, place_params
from sparse_serve_jax.programs import programs
from sparse_serve_jax.serving import budget
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.step import PrefillBatch, SamplingRows, Setup
from tests.tiny import config, tiny_model

NUMBERS = (
  r"(\d+\.\d\d) GiB weights \+ (\d+\.\d\d) GiB KV \(cache.hbm_bytes\) \+ (\d+\.\d\d) GiB activations \(pieces of"
)


def needs_of(cfg: ModelConfig, conf: EngineConfig, cudnn: bool) -> budget.Needs:
  shape = CacheShape.of(cfg, conf, get_method(conf.sparse.method).vectors)
  return budget.Needs.of(cfg, conf, shape, Buckets.of(conf, cfg.n_layers, shape.max_context), cudnn)


def test_needs_of_an_8b_model():
  """Weights by hand: 8.03e9 parameters in bf16; KV is what the budget says, less what does not divide."""
  cfg = read_config(ModelConfig, find_config("models", "llama3-8b"))
  conf = override(EngineConfig(), ["cache.hbm_bytes=20GiB", "cache.dram_bytes=80GiB", "scheduler.max_context=32768"])
  needs = needs_of(cfg, conf, cudnn=True)
  assert needs.weights == 2 * 8_030_261_248
  assert 0.999 * 20 * 2**30 < needs.kv <= 20 * 2**30 and needs.pool == 80 * 2**30
  assert 1 << 30 < needs.activations < 4 << 30
  half = needs_of(cfg, override(conf, ["tp=2"]), cudnn=True)
  assert needs.weights / 2 < half.weights < 0.6 * needs.weights and half.kv == pytest.approx(needs.kv / 2, rel=0.01)


@pytest.mark.parametrize("hbm", ["auto", "8MiB"])
def test_a_pool_beyond_the_host_is_told_first(hbm, monkeypatch):
  """And not that HBM is too small for its maps."""
  model = load_model("random:tiny", dtype="float32")
  monkeypatch.setattr(budget, "host_bytes_free", lambda: 21 << 30)
  wanted = "cache.dram_bytes asks for 102400.00 GiB of the host, which has 21.00 GiB free: set it to less, or to auto"
  with pytest.raises(ValueError, match=f"^{wanted}$"):
    JaxExecutor(config(f"cache.hbm_bytes={hbm}", "cache.dram_bytes=100TiB"), model)


def test_a_budget_beyond_the_device_is_refused_at_once(monkeypatch):
  model = load_model("random:tiny", dtype="float32")
  monkeypatch.setattr(budget, "device_bytes_free", lambda: 3 << 20)
  with pytest.raises(ValueError, match=NUMBERS + r".* = \d+\.\d\d GiB, and 0.00 GiB are free of what JAX may use"):
    JaxExecutor(config("cache.hbm_bytes=512MiB", "cache.dram_bytes=900MiB"), model)
  assert not any(leaf.placed for leaf in jax.tree.leaves(model.params))  # pyright: ignore
  monkeypatch.undo()
  JaxExecutor(config(), model)


def test_a_pool_beyond_the_host_is_refused_at_once(monkeypatch):
  monkeypatch.setattr(budget, "host_bytes_free", lambda: 1 << 30)
  conf = config("cache.dram_bytes=1023MiB", "cache.hbm_bytes=512MiB")
  message = r"does not fit the host: .* \+ 1.00 GiB the pool \(cache.dram_bytes\) = .*, and 1.00 GiB are free"
  with pytest.raises(ValueError, match=message):
    JaxExecutor(conf, tiny_model())


def test_weights_that_are_there_take_nothing_more(monkeypatch):
  model = load_model("random:tiny", dtype="float32")
  weights = budget.weight_bytes(model.config, 1)
  free = [weights - 1]
  monkeypatch.setattr(budget, "host_bytes_free", lambda: free[0])
  none = budget.Needs(weights, 0, 0, 0, "nothing")
  with pytest.raises(ValueError, match="does not fit the host"):
    budget.check(none, model, make_mesh(1))
  held = place_params(model)
  free[0] = 0
  budget.check(none, model, make_mesh(1))
  del held


SIZES = [(name, context) for name in ("llama-3.2-1b", "llama3-8b") for context in (2048, 32768)]
SPARSE = "threshold", "top_k", "top_k", "threshold"  # both ways of both models, and of short and long pieces


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("name", "context", "prefill"),
  [*((*size, "dense") for size in SIZES), *((*size, way) for size, way in zip(SIZES, SPARSE, strict=True))],
)
def test_activations_are_what_programs_take(name: str, context: int, prefill: str):
  """The estimate is not below what XLA plans for the longest piece of a prompt, nor far above it."""
  cfg, mesh = read_config(ModelConfig, find_config("models", name)), make_mesh(1)
  conf = override(
    EngineConfig(), ["cache.hbm_bytes=8GiB", "cache.dram_bytes=16GiB", f"scheduler.max_context={context}"]
  )
  conf = override(conf, f"sparse.prefill={prefill}")
  shape = CacheShape.of(cfg, conf, 2)

  def array(dims, dtype, sharding=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding or NamedSharding(mesh, P()))

  params = llama.map_shapes(lambda _, dims: array(dims, jnp.bfloat16), cfg)
  shardings = cache_shardings(mesh, True)
  hot = jax.eval_shape(functools.partial(empty_hot, shape))
  hot = jax.tree.map(lambda x, sharding: array(x.shape, x.dtype, sharding), hot, shardings.hot.replace(pool_id=None))
  pool = array(shape.pool_shape, jnp.bfloat16, shardings.pool)
  zero, row, one = np.int32(0), np.zeros(1, np.int32), np.zeros(1, np.float32)
  sampling = SamplingRows(one, one, np.zeros(1, np.uint32), np.zeros((1, 8), np.int32), np.zeros(1, np.int32), one)
  batch = PrefillBatch(np.zeros(context, np.int32), zero, row, row, zero, zero, zero, row, sampling)
  x = array((2 * context, cfg.d_model), jnp.bfloat16)  # of two pieces, which no program may copy
  lowered = programs(Setup.of(cfg, conf, "triton"), mesh).prefill.lower(params, KVCache(pool, hot), x, batch, 0)
  taken = lowered.compile().memory_analysis().temp_size_in_bytes
  estimate = needs_of(cfg, conf, cudnn=True).activations
  print(name, context, f"XLA {taken / 2**30:.2f} GiB, estimate {estimate / 2**30:.2f} GiB")
  assert taken <= estimate <= 2.5 * taken + (512 << 20)


def resident_bytes() -> int:
  status = Path("/proc/self/status").read_text()
  found = re.search(r"VmRSS:\s+(\d+) kB", status)
  assert found
  return 1024 * int(found[1])


@pytest.mark.gpu
def test_a_pool_takes_what_it_holds_and_gives_it_back():
  """Sizes at which a doubling allocator would take nearly twice as much; one after another, then two at once."""
  model = load_model("random:tiny")

  def engine(gib: float) -> JaxExecutor:
    hbm = "cache.hbm_bytes=2GiB"
    made = JaxExecutor(override(EngineConfig(), [f"cache.dram_bytes={int(gib * 2**30)}", hbm]), model)
    jax.block_until_ready(made.cache)
    return made

  engine(0.1)  # programs and libraries are loaded
  gc.collect()
  before, held = resident_bytes(), []
  for sizes in ((2.2,), (4.4,), (1.1, 2.2)):
    held = [engine(gib) for gib in sizes]
    taken, wanted = resident_bytes() - before, sum(of.shape.pool_bytes for of in held)
    # What the process had needed to compile is given back meanwhile, or more of it is taken.
    assert 0.99 * wanted - (32 << 20) < taken < 1.02 * wanted + (32 << 20)
    held.clear()
    gc.collect()
    pinned.give_back()  # as whoever asks what is free does
    assert resident_bytes() - before < 64 << 20
