"""Sizes that are left open: derived from devices by value, said with numbers, and refused with numbers."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.config import (
  CacheConfig,
  EngineConfig,
  ModelConfig,
  find_config,
  load_config,
  override,
  read_config,
  with_fixed_sizes,
)
from sparse_serve_jax.ladder.rungs import read_rungs
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving import budget, sizes
from sparse_serve_jax.serving.sizes import Free

GIB = 1 << 30
H200, LAPTOP = Free(device=104 * GIB, host=110 * GIB), Free(device=None, host=12 * GIB)


def model_of(name: str) -> ModelConfig:
  return read_config(ModelConfig, find_config("models", name))


def resolved(
  name: str, free: Free, *changes: str, rung: str = "sparse_serve"
) -> tuple[EngineConfig, CacheShape, budget.Needs]:
  model = model_of(name)
  left = override(load_config(rung), [*changes])
  conf = sizes.resolve(override(left, "cache.save=direct"), model, free, cudnn=free.device is not None)
  shape = CacheShape.of(model, conf, 2)
  buckets = sizes.Buckets.of(conf, model.n_layers, shape.max_context)
  return conf, shape, budget.Needs.of(model, conf, shape, buckets, free.device is not None)


@pytest.mark.parametrize("name", ["llama3-8b", "llama-3.2-1b"])
@pytest.mark.parametrize("rung", ["dense", "sparse_serve", "psa", "hot_buffer", "per_layer_pools"])
def test_what_is_derived_fits_a_gpu_and_its_host(name: str, rung: str):
  conf, shape, needs = resolved(name, H200, rung=rung)
  taken = needs.weights + needs.activations + needs.kv
  assert 0.5 * H200.device < taken <= H200.device  # pyright: ignore[reportOptionalOperand]
  assert needs.pool <= 0.75 * H200.host
  assert shape.max_context == model_of(name).max_context and shape.fixed_bytes <= shape.hbm_bytes / 2
  assert conf.scheduler.max_context == 0  # it is the model's: nothing had to be lowered
  assert conf.cache.hbm_bytes == shape.hbm_bytes


def test_an_8b_model_on_an_h200_by_hand():
  """64 lanes of 262,144 tokens would take 2 TiB; 0.75 of the host is 82 GiB, and the size below that is 80."""
  conf, shape, needs = resolved("llama3-8b", H200)
  assert conf.cache.dram_bytes == 80 * GIB
  left = 104 * GIB - needs.weights - needs.activations
  assert 0 <= 0.95 * left - conf.cache.size("hbm_bytes") < shape.slot_bytes


def test_weights_that_are_placed_take_nothing_more():
  first, _, needs = resolved("llama3-8b", H200)
  after, _, _ = resolved("llama3-8b", Free(104 * GIB - needs.weights, 110 * GIB, placed=True))
  assert after.cache == first.cache


def test_a_small_device_lowers_the_context():
  conf, shape, needs = resolved("llama3-8b", Free(20 * GIB, 48 * GIB))
  assert conf.scheduler.max_context == shape.max_context in (8192, 16384, 32768)
  assert shape.fixed_bytes <= shape.hbm_bytes / 2
  assert needs.weights + needs.activations + needs.kv <= 20 * GIB
  kept, _, _ = resolved("llama3-8b", Free(20 * GIB, 48 * GIB), "scheduler.max_context=4096")
  assert kept.scheduler.max_context == 4096


def test_two_devices_share_what_each_has():
  one, _, _ = resolved("llama3-8b", Free(40 * GIB, 110 * GIB))
  two, _, needs = resolved("llama3-8b", Free(40 * GIB, 110 * GIB), "tp=2")
  assert two.cache.size("hbm_bytes") > 2 * one.cache.size("hbm_bytes")
  assert needs.weights + needs.activations + needs.kv <= 40 * GIB


def test_a_cpu_gives_a_modest_part_of_its_memory():
  conf, shape, needs = resolved("llama-3.2-1b", LAPTOP)
  left = 12 * GIB - needs.weights - needs.activations
  both = conf.cache.size("hbm_bytes") + conf.cache.size("dram_bytes")
  assert left / 16 < both <= min(left / 4, 2 * GIB)
  assert shape.max_context >= 8192


@pytest.mark.parametrize("rung", ["dense", "sparse_serve", "psa"])
def test_another_process_finds_programs_of_its_sizes(rung: str):
  """What others take of a host's memory changes; 2 % of it change no size, on a laptop and beside a GPU."""
  for free in (LAPTOP, H200):
    less = dataclasses.replace(free, host=int(0.98 * free.host))
    assert resolved("llama-3.2-1b", free, rung=rung)[0] == resolved("llama-3.2-1b", less, rung=rung)[0]


@pytest.mark.parametrize("rung", ["dense", "sparse_serve"])
def test_no_more_than_all_lanes_can_fill(rung: str):
  _, shape, _ = resolved("tiny", H200, rung=rung)
  assert shape.M == 64 * 32768 // 32


@pytest.mark.parametrize(
  ("changes", "on_gpu", "on_cpu"),
  [
    ((), (64, 64), (16, 8)),
    (("scheduler.max_batch=256",), (256, 256), (256, 256)),
    (("cache.lanes=4",), (4, 4), (4, 4)),
    (("cache.lanes=100", "scheduler.max_batch=10"), (100, 10), (100, 10)),
  ],
)
def test_lanes_and_decode_rows_suit_the_device(changes, on_gpu, on_cpu):
  for free, expected in ((H200, on_gpu), (LAPTOP, on_cpu)):
    conf, shape, _ = resolved("llama-3.2-1b", free, *changes)
    assert (conf.cache.lanes, conf.scheduler.max_batch) == expected and expected[0] == shape.R
    sized = {"cache.hbm_bytes": "2GiB", "cache.dram_bytes": "2GiB"}  # also where bytes are given
    conf = sizes.resolve(override(override(load_config("psa"), [*changes]), sized), model_of("llama-3.2-1b"), free)
    assert (conf.cache.lanes, conf.scheduler.max_batch) == expected and conf.scheduler.max_context == 0


def test_a_size_that_is_given_stays():
  conf, shape, _ = resolved("llama3-8b", H200, "cache.hbm_bytes=4GiB")
  assert conf.cache.hbm_bytes == 4 * GIB
  maps = shape.M * shape.per_pool_block_bytes  # DRAM is not more than its maps leave room for
  assert 0.9 * GIB < maps <= GIB
  conf, shape, _ = resolved("llama3-8b", H200, "cache.dram_bytes=8GiB")
  assert conf.cache.dram_bytes == 8 * GIB == shape.pool_bytes
  given = override(EngineConfig(), ["cache.hbm_bytes=1GiB", "cache.dram_bytes=1GiB"])
  assert not sizes.is_open(given) and sizes.resolve(given, model_of("tiny"), Free(0, 0)) is given


def test_what_cannot_be_derived_is_refused_with_numbers():
  numbers = (
    r"14.96 GiB weights \+ \d+\.\d\d GiB activations \(pieces of .*\) on each of 1 devices, and each has 10.00 GiB "
    r"free; the weights alone do not fit$"
  )
  with pytest.raises(ValueError, match=numbers):
    resolved("llama3-8b", Free(10 * GIB, 48 * GIB))
  with pytest.raises(
    ValueError, match=r"the host has 15.00 GiB free; lower scheduler.max_context, scheduler.max_batch or"
  ):
    resolved("llama3-8b", Free(None, 15 * GIB))
  with pytest.raises(ValueError, match="cache.hbm_bytes='auto' is derived where an engine is made"):
    CacheShape.of(model_of("tiny"), EngineConfig(CacheConfig(offload=False)), 2)
  with pytest.raises(ValueError, match="cache.lanes=0 and scheduler.max_batch=0: 0 is derived where an engine is made"):
    CacheShape.of(model_of("tiny"), load_config("dense"), 2)


def test_an_engine_says_what_it_derived_and_keeps_it(monkeypatch, caplog):
  monkeypatch.setattr(budget, "host_bytes_free", lambda: 256 << 20)
  with caplog.at_level(logging.WARNING):
    llm = LLM("random:tiny", overrides="scheduler.max_context=2048")
  (line,) = [record.getMessage() for record in caplog.records if "=auto" in record.getMessage()]
  hbm, dram, free = map(float, re.findall(r"(\d+\.\d\d) GiB", line))
  assert free == 0.25 and llm.config.cache.dram_bytes == pytest.approx(dram * GIB, abs=0.01 * GIB)
  assert llm.config.cache.hbm_bytes == pytest.approx(hbm * GIB, abs=0.01 * GIB)
  assert line.endswith("requests of up to 2,048; 16 at a time, of which 8 decode")
  monkeypatch.setattr(budget, "host_bytes_free", lambda: 1 << 40)
  kept = llm.config
  del llm.engine
  assert llm.engine.config == kept  # the next engine's sizes are the first one's
  assert len(llm.generate([1, 2, 3], max_tokens=2)[0].token_ids) == 2


def test_what_is_compared_has_sizes_that_are_no_machines():
  for conf in read_rungs(["dense", "psa"]).values():
    assert (conf.cache.hbm_bytes, conf.cache.dram_bytes) == (256 << 20, 1 << 30)
  given = override(EngineConfig(), "cache.hbm_bytes=1GiB")
  assert with_fixed_sizes(given) == override(given, "cache.dram_bytes=1GiB")


def test_a_containers_limit_counts(tmp_path: Path):
  assert budget.group_bytes_free(tmp_path) == []
  for name, told in {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 9\ninactive_file 100"}.items():
    (tmp_path / name).write_text(told + "\n")
  assert budget.group_bytes_free(tmp_path) == []
  (tmp_path / "memory.max").write_text("1000\n")
  assert budget.group_bytes_free(tmp_path) == [400]


@pytest.mark.parametrize("value", ["automatic", "auto:3", "0B"])
def test_a_wrong_size_is_refused(value: str):
  with pytest.raises(ValueError, match="hbm_bytes"):
    override(EngineConfig(), {"cache.hbm_bytes": value})


def test_auto_round_trips():
  auto = override(EngineConfig(), ["cache.hbm_bytes=auto", "cache.dram_bytes=8GiB"])
  assert (auto.cache.hbm_bytes, auto.cache.dram_bytes) == ("auto", 8 * GIB)
