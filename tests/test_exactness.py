"""The equivalences that carry the project: in float32, greedy tokens are identical whatever the memory and the
schedule.

Every cache starts full of NaN (`tiny.poisoned`), so whatever is read without having been written shows. The same cases
run on a GPU with `-m gpu`, there by the Triton kernels with the pool in pinned host memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.models import ByteTokenizer, Model, forward, init_params
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Plan
from sparse_serve_jax.serving.request import State
from tests.tiny import (
  SHAPES,
  check_nothing_is_held,
  config,
  greedy,
  new_engine,
  prompt_of,
  serve,
  tiny_model,
  with_slots,
)

TIGHT = 10  # slots: few, and as many for each of two devices
N = 24  # tokens decoded: three blocks of 8 fill meanwhile
PROMPTS = [
  prompt_of(n, seed=n) for n in (150, 37, 96, 7)
]  # ragged; one a multiple of the block; one without a full block


class Setting(NamedTuple):
  """A shape and a block size, with lengths and a budget that leave a selection something to choose."""

  shape: str
  block_tokens: int
  lengths: tuple[int, ...]  # of the prompts
  budget_blocks: int  # three are sink and window; the longest prompts have more than these

  @property
  def model(self) -> Model:
    return tiny_model(self.shape)

  @property
  def prompts(self) -> list[list[int]]:
    return [prompt_of(n, seed=n) for n in self.lengths]

  @property
  def oracle(self) -> list[list[int]]:
    return oracle(self.shape, self.prompts)

  def full_blocks(self, step: int = 0) -> int:
    """Of all prompts, layers and KV heads, before that decode step."""
    cfg = self.model.config
    return cfg.n_layers * cfg.n_kv_heads * sum((n + step) // self.block_tokens for n in self.lengths)

  def config(self, *assignments: str) -> EngineConfig:
    return config("scheduler.batch_control=none", *assignments, block_tokens=self.block_tokens)

  def sparse(self, *assignments: str) -> EngineConfig:
    return self.config(f"sparse.token_budget={self.budget_blocks * self.block_tokens}", *assignments)

  def serve(self, conf: EngineConfig, slots: int = 0) -> tuple[list[list[int]], Engine]:
    return serve(with_slots(conf, slots, self.model) if slots else conf, self.model, self.prompts, N)


SMALL, MIDDLE, LARGE = (
  Setting("gqa2", 8, (150, 37, 88, 7), 6),
  Setting("gqa3-tied", 16, (150, 37, 96, 7), 5),
  Setting("mha-qknorm", 32, (230, 40, 192, 7), 4),
)


def settings(*chosen: Any) -> pytest.MarkDecorator:
  return pytest.mark.parametrize("setting", chosen, ids=lambda s: f"{s.shape}-{s.block_tokens}")


CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def oracle(shape="gqa2", prompts=PROMPTS, n=N):
  return [greedy(shape, tuple(p), n) for p in prompts]


@CPU_AND_GPU
@pytest.mark.parametrize(("shape", "block_tokens"), [("gqa2", 8), ("gqa4-bias", 8)])  # the others with few slots below
def test_a_budget_of_the_whole_context_is_dense(device, shape, block_tokens):
  model = tiny_model(shape)
  tokens, _ = serve(config(block_tokens=block_tokens), model, PROMPTS, N)
  assert tokens == oracle(shape)


@CPU_AND_GPU
def test_dense_over_a_pool_in_hbm(device):
  conf = config("cache.offload=false", "sparse.policy=dense", "scheduler.batch_control=none")
  tokens, engine = serve(conf, tiny_model(), PROMPTS, N)
  assert tokens == oracle()
  assert engine._executor.shape.P == 0
  assert engine.usage.blocks_loaded == 0


@CPU_AND_GPU
@pytest.mark.parametrize(
  ("setting", "slots"), [(SMALL, 1), (SMALL, 13), (MIDDLE, 8), (LARGE, 13)], ids=lambda p: getattr(p, "shape", p)
)
def test_few_slots_are_exact_and_really_load(device, setting, slots):
  tokens, engine = setting.serve(setting.config(), slots)
  assert tokens == setting.oracle
  assert slots <= setting.full_blocks() / 8
  assert engine.usage.blocks_loaded > setting.full_blocks()


@CPU_AND_GPU
@settings(SMALL, MIDDLE, LARGE)
def test_a_sparse_selection_does_not_depend_on_residency(device, setting):
  """Budget below the context, so that a wrong selection or a stale slot changes tokens."""
  in_hbm, engine = setting.serve(setting.sparse("cache.offload=false"))
  assert in_hbm != setting.oracle  # it bites: blocks are left out
  tight, tight_engine = setting.serve(setting.sparse(), slots=TIGHT)
  assert tight == in_hbm
  assert tight_engine.usage.blocks_attended == engine.usage.blocks_attended
  loaded = tight_engine.usage.blocks_loaded
  assert loaded > engine.usage.blocks_attended / 4
  if setting is SMALL:
    roomy, roomy_engine = setting.serve(setting.sparse())
    assert roomy == in_hbm
    assert roomy_engine.usage.blocks_loaded < loaded / 10


@pytest.mark.parametrize(
  "pieces",
  [
    "scheduler.max_inject_tokens=160",  # one layer of the longest prompt an iteration
    "scheduler.max_inject_tokens=64",  # not even one: chunks within a layer
    "scheduler.max_inject_tokens=8",
    "scheduler.prefill=chunked",
  ],
)
def test_prefill_in_segments_or_chunks(pieces):
  conf = config(pieces, "scheduler.chunk_tokens=40")
  tokens, _ = serve(conf, tiny_model(), PROMPTS, N)
  assert tokens == oracle()


@CPU_AND_GPU
@settings(SMALL, pytest.param(MIDDLE, marks=pytest.mark.soak), LARGE)
def test_hybrid_prefill_from_few_slots(device, setting):
  """Earlier chunks are read back from slots or from the pool, wherever they are."""
  whole, engine = setting.serve(setting.sparse(), slots=TIGHT)
  cut, cut_engine = setting.serve(setting.sparse("scheduler.max_inject_tokens=64"), slots=TIGHT)
  assert cut == whole
  assert engine.usage.blocks_loaded == engine.usage.blocks_missed  # by decode steps alone
  assert cut_engine.usage.blocks_loaded > cut_engine.usage.blocks_missed


@CPU_AND_GPU
def test_bfloat16(device):
  """Few slots, many slots and a pass without a cache agree until two logits are close.

  They cannot agree beyond: attention reads hits first, so where blocks lie decides in which order they are summed, and
  a tensor core takes probabilities in bfloat16. Close is 1 % of the largest logit, 0.14 here: as far as this model's
  logits in bfloat16 lie from those in float32.
  """
  cfg = dataclasses.replace(SHAPES["gqa2"], dtype="bfloat16")
  model = Model(config=cfg, params=init_params(cfg, 0), tokenizer=ByteTokenizer(), eos_token_ids=(), name="bfloat16")
  conf = config("scheduler.batch_control=none")
  roomy, _ = serve(conf, model, PROMPTS, N)
  tight, engine = serve(with_slots(conf, 13, model), model, PROMPTS, N)
  assert engine.usage.blocks_loaded > SMALL.full_blocks()

  logits_of = jax.jit(lambda params, tokens: forward(cfg, params, tokens))
  compared = 0
  for prompt, tokens in zip(PROMPTS * 2, roomy + tight, strict=True):
    with jax.default_device(jax.devices("cpu")[0]):
      padded = np.zeros(256, np.int32)
      padded[: len(prompt) + N] = prompt + tokens
      logits = np.asarray(logits_of(model.params, padded))[len(prompt) - 1 :][:N]
    second, first = np.sort(logits, -1)[:, -2:].T
    clear = int(
      np.append(first - second < 1e-2 * np.abs(logits).max(), True).argmax()
    )  # steps before the first close one
    assert tokens[:clear] == logits.argmax(-1)[:clear].tolist()
    compared += clear
  assert compared > 2 * N


@CPU_AND_GPU
def test_alone_equals_in_a_batch(device):
  """Arrivals, pauses, ends and cancellations around a request change nothing for it; freed blocks are reused."""
  model = tiny_model()
  # 40 pool blocks hold two of these requests; 60 slots hold the working set of one.
  sparse = config("sparse.token_budget=64", "cache.dram_bytes=160KiB")
  sparse = with_slots(sparse, 60, model)
  prompts = [prompt_of(n, seed=100 + n) for n in (90, 61, 120, 33, 75, 48, 110, 20)]
  alone = [serve(sparse, model, [p], N)[0][0] for p in prompts]

  plans: list[Plan] = []
  engine = new_engine(sparse, model, observer=lambda seen: plans.append(seen.plan))
  executor = engine._executor
  assert isinstance(executor, JaxExecutor) and executor.shape.M == 40
  requests = [engine.add_request(p, N) for p in prompts[:4]]
  doomed, started, paused = [], 4, 0
  for step in range(10_000):
    if not engine.has_work:
      break
    could_run = sum(r.state is State.DECODING for r in requests + doomed)
    engine.step()
    paused += bool(plans) and could_run > len(plans[-1].decode)
    if step % 9 == 4:
      doomed.append(engine.add_request(prompt_of(50 + step, seed=step), 30))
    if step % 9 == 8 and doomed:
      engine.cancel(doomed.pop(0).id)
    if step % 20 == 10 and started < len(prompts):
      requests.append(engine.add_request(prompts[started], N))
      started += 1
    if step > 150:
      for request in doomed:
        engine.cancel(request.id)
      doomed = []
  assert [r.output_tokens for r in requests] == alone
  assert paused > 20
  tables = {admission.request_id: admission.table for plan in plans for admission in plan.admit}
  assert len(tables) > len(prompts) and all((np.diff(table) < 0).any() for table in tables.values())  # none ascends
  assert not engine.has_work
  check_nothing_is_held(engine)


@CPU_AND_GPU
@pytest.mark.parametrize("rule", [(), ("sparse.rest=last_two_groups", "sparse.stop_when=mean_of_heads")], ids=str)
def test_psa_with_threshold_1_reads_every_block(device, rule):
  tokens, _ = serve(config("sparse.policy=psa", "sparse.threshold=1.0", *rule), tiny_model(), PROMPTS, N)
  assert tokens == oracle()


@CPU_AND_GPU
@settings(SMALL, LARGE)
def test_psa_stops_early_and_alike_whatever_the_memory(device, setting):
  conf = setting.config("sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=2")
  roomy, engine = setting.serve(conf)
  tight, tight_engine = setting.serve(conf, slots=TIGHT)
  assert roomy == tight
  everything = sum(setting.full_blocks(step) for step in range(N - 1))
  assert engine.usage.blocks_attended == tight_engine.usage.blocks_attended < everything
  assert tight_engine.usage.blocks_loaded > engine.usage.blocks_loaded


def test_dense_first_layers():
  """All layers dense is dense, whatever the budget; the first alone is neither dense nor as sparse."""
  model = tiny_model()
  sparse = ["sparse.token_budget=32"]
  none, one, both = (serve(config(*sparse, f"sparse.dense_layers={n}"), model, PROMPTS, N)[0] for n in (0, 1, 2))
  assert both == oracle()
  assert none != one != both


@CPU_AND_GPU
@pytest.mark.parametrize("policy", ["topk", "psa"])
def test_two_devices_equal_one(device, policy):
  if jax.device_count() < 2:
    pytest.skip(f"needs two devices, there is {jax.device_count()}")
  conf = SMALL.sparse(f"sparse.policy={policy}", "sparse.threshold=0.8", "scheduler.max_inject_tokens=64")
  conf = with_slots(conf, TIGHT, SMALL.model)
  (one, engine), (two, engine2) = (SMALL.serve(config(f"tp={n}", base=conf)) for n in (1, 2))
  assert one == two
  assert engine.usage.blocks_attended == engine2.usage.blocks_attended
  assert engine2.usage.blocks_loaded > 0


@pytest.mark.parametrize("policy", ["topk", "psa"])
def test_interpreted_kernels_equal_xla(policy):
  model = tiny_model("gqa3-tied")
  conf = config(
    f"sparse.policy={policy}", "sparse.token_budget=64", "sparse.threshold=0.8", "scheduler.max_inject_tokens=64"
  )
  conf = with_slots(conf, 16, model)
  prompts = PROMPTS[1:]
  assert (
    serve(conf, model, prompts, 10)[0] == serve(config("implementation=interpret", base=conf), model, prompts, 10)[0]
  )


@CPU_AND_GPU
def test_sampling_does_not_depend_on_neighbours(device):
  model = tiny_model()
  drawn, _ = serve(config(), model, PROMPTS, N, temperature=1.0, top_p=0.9, seed=7)
  alone = [serve(config(), model, [p], N, temperature=1.0, top_p=0.9, seed=7)[0][0] for p in PROMPTS]
  assert drawn == alone
  assert drawn != serve(config(), model, PROMPTS, N, temperature=1.0, top_p=0.9, seed=8)[0]


@pytest.mark.gpu
def test_the_pool_is_pinned_host_memory_and_written_in_place():
  """Prefill and decode, with misses from the pool and finished tails, leave every array where it was."""
  model = tiny_model()
  conf = with_slots(config("sparse.token_budget=64"), 9, model)
  executor = JaxExecutor(conf, model)
  engine = Engine(executor)

  def pointers() -> list[int]:
    cache, hot = executor.cache, executor.cache.hot
    arrays = cache.pool, hot.slots, hot.digest, hot.tail, hot.tables
    return [array.addressable_data(0).unsafe_buffer_pointer() for array in arrays]

  before = pointers()
  assert executor.cache.pool.sharding.memory_kind == "pinned_host"
  engine.add_request(PROMPTS[0], N)
  engine.run()
  assert engine.usage.blocks_loaded > 0
  assert executor.cache.pool.sharding.memory_kind == "pinned_host"
  assert pointers() == before


@pytest.mark.gpu
def test_making_the_pool_takes_no_device_memory():
  """A pool may be larger than the device's memory."""
  model, device = tiny_model(), jax.devices()[0]
  peak = lambda: (device.memory_stats() or {})["peak_bytes_in_use"]  # noqa: E731
  before = peak()
  n_bytes = 4 * before + (256 << 20)  # were it on the device, the peak would grow by three quarters of it
  pool = JaxExecutor(config(f"cache.dram_bytes={n_bytes}", f"cache.hbm_bytes={n_bytes // 2}"), model).cache.pool
  jax.block_until_ready(pool)
  assert pool.nbytes > n_bytes - (1 << 20) and peak() - before < 0.75 * n_bytes
