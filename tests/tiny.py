"""Random tiny models, small configurations and the oracle that the tests of the whole engine share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax.config import EngineConfig, ModelConfig, override
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import ByteTokenizer, Model, forward, init_params
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor

_BASE = ModelConfig(
  vocab_size=96,
  d_model=32,
  n_layers=2,
  n_heads=4,
  n_kv_heads=2,
  head_dim=16,
  d_ff=48,
  max_context=512,
  dtype="float32",
)
SHAPES = {
  "gqa2": _BASE,
  "gqa4-bias": dataclasses.replace(_BASE, n_heads=8, qkv_bias=True),
  "gqa3-tied": dataclasses.replace(_BASE, n_heads=6, tie_embeddings=True),
  "mha-qknorm": dataclasses.replace(_BASE, n_kv_heads=4, qk_norm=True),
}


# Overrides of a configuration of configs/serving, for random:tiny: requests of up to 384 tokens, all of them read, and
# slots for an eighth of what the lanes can hold.
SMALL_SERVING = [
  "cache.block_tokens=8",
  "cache.lanes=4",
  "cache.dram_bytes=2MiB",
  "cache.hbm_bytes=560KB",
  "sparse.token_budget=384",
  "sparse.sink_tokens=8",
  "sparse.window_tokens=16",
  "scheduler.max_batch=4",
  "scheduler.max_context=384",
  "scheduler.batch_control=none",
]


@functools.cache
def tiny_model(shape: str = "gqa2", seed: int = 0) -> Model:
  cfg = SHAPES[shape]
  return Model(config=cfg, params=init_params(cfg, seed), tokenizer=ByteTokenizer(), eos_token_ids=(), name=shape)


def often(names: Iterable[str], *chosen: str) -> list[Any]:
  """Names of settings that a test has: all with `make soak`, and with `make test` those which are `chosen`. Each thing
  that the others set is then set by another test."""
  names = list(names)
  assert {*chosen} < {*names}
  return [name if name in chosen else pytest.param(name, marks=pytest.mark.soak) for name in names]


def prompt_of(n: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(0, _BASE.vocab_size, n).tolist()


@functools.cache
def greedy(shape: str, prompt: tuple[int, ...], n: int) -> list[int]:
  """The oracle: n greedy tokens by forward passes over the whole sequence, without any cache, on the CPU."""
  ids = list(prompt)
  for _ in range(n):
    ids.append(int(logits_after(shape, ids).argmax()))
  return ids[len(prompt) :]


def logits_after(shape: str, ids: Sequence[int]) -> np.ndarray:
  """The oracle's logits [V] of the token that follows."""
  padded = np.zeros(256, np.int32)  # causal: what follows changes nothing
  padded[: len(ids)] = ids
  with jax.default_device(jax.devices("cpu")[0]):
    return np.array(_forward(shape)(tiny_model(shape).params, padded)[len(ids) - 1])


@functools.cache
def _forward(shape: str):
  return jax.jit(lambda params, tokens: forward(SHAPES[shape], params, tokens))


def config(*assignments: str, block_tokens: int = 8, base: EngineConfig | None = None) -> EngineConfig:
  """A small configuration whose budget is the whole context; `assignments` override it."""
  small = [
    f"cache.block_tokens={block_tokens}",
    "cache.dram_bytes=1MiB",
    "cache.hbm_bytes=2MiB",
    "cache.lanes=6",
    "sparse.token_budget=512",
    f"sparse.sink_tokens={block_tokens}",
    f"sparse.window_tokens={2 * block_tokens}",
    "scheduler.max_batch=4",
    "scheduler.max_context=256",
  ]
  return override(base or EngineConfig(), [*([] if base else small), *assignments])


def with_slots(conf: EngineConfig, slots: int, model: Model) -> EngineConfig:
  """The same configuration with an HBM budget of exactly `slots` slots over all devices."""
  conf = host_pool.chosen(conf)  # slabs of staged saves take HBM too
  probe = CacheShape.of(model.config, override(conf, ["cache.hbm_bytes=1GiB"]), 2)
  conf = override(conf, [f"cache.hbm_bytes={probe.fixed_bytes + slots * probe.slot_bytes}"])
  made = CacheShape.of(model.config, conf, 2)
  assert slots == made.P
  return conf


def poisoned(executor: JaxExecutor) -> JaxExecutor:
  """Every array of an empty cache that holds KV or digests, filled with NaN: nothing of it may be read."""
  nan = lambda a: jax.device_put(jnp.full(a.shape, jnp.nan, a.dtype), a.sharding)  # noqa: E731
  hot = executor.cache.hot
  hot = hot.replace(slots=nan(hot.slots), digest=nan(hot.digest), tail=nan(hot.tail))
  executor.cache = KVCache(nan(executor.cache.pool), hot)
  return executor


def new_engine(conf: EngineConfig, model: Model, **options) -> Engine:
  """An engine over a poisoned cache. Its pool's blocks are given out in a random order, so no block table ascends."""
  engine = Engine(poisoned(JaxExecutor(conf, model)), **options)
  np.random.default_rng(0).shuffle(engine._scheduler._allocator._free)
  return engine


def check_nothing_is_held(engine: Engine) -> None:
  """After the end every block can be had, when saves have landed; slots hold kept blocks alone, each at most once."""
  scheduler, maps = engine._scheduler, engine._executor.cache.hot.maps  # type: ignore[attr-defined]
  allocator, shape = scheduler._allocator, engine._executor.shape
  assert (allocator.in_use, allocator.available + allocator.returning) == (0, shape.M)
  assert not allocator.returning or engine.config.cache.save == "staged"
  assert sorted(scheduler._lanes) == list(range(shape.R))
  slot_of, block_of = np.asarray(maps.slot_of), np.asarray(maps.block_of)
  assert {int(block) for block in np.argwhere(slot_of >= 0)[:, 2]} <= {*allocator._idle}
  assert {int(block) % shape.M for block in block_of[block_of >= 0]} <= {*allocator._idle}
  assert len(set(slot_of[slot_of >= 0].tolist())) == (slot_of >= 0).sum() or engine.config.tp > 1


def serve(conf: EngineConfig, model: Model, prompts: Sequence[Sequence[int]], n: int, **options):
  """Greedy tokens of all prompts served at once, and the engine."""
  engine = new_engine(conf, model)
  requests = [engine.add_request(p, n, **options) for p in prompts]
  engine.run()
  return [r.output_tokens for r in requests], engine
