"""The equivalences that carry the project: in float32, greedy tokens are identical whatever the memory and the
schedule.

Every cache starts full of NaN (`tiny.poisoned`), so whatever is read without having been written shows. The same cases
run on a GPU with `-m gpu`, there by the Triton kernels with the pool in pinned host memory.
"""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Plan
from sparse_serve_jax.serving.request import State
from tests.tiny import SHAPES, config, greedy, poisoned, prompt_of, serve, tiny_model, with_slots

N = 24  # tokens decoded: three blocks of 8 fill meanwhile
PROMPTS = [
  prompt_of(n, seed=n) for n in (150, 37, 96, 7)
]  # ragged; one a multiple of the block; one without a full block
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def oracle(shape="gqa2", prompts=PROMPTS, n=N):
  return [greedy(shape, tuple(p), n) for p in prompts]


@CPU_AND_GPU
@pytest.mark.parametrize("block_tokens", [8, 16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_of_the_whole_context_is_dense(device, shape, block_tokens):
  if block_tokens != 8 and shape != "gqa2":
    pytest.skip("one shape covers the larger blocks")
  model = tiny_model(shape)
  tokens, _ = serve(config(block_tokens=block_tokens), model, PROMPTS, N)
  assert tokens == oracle(shape)


@CPU_AND_GPU
def test_dense_over_a_pool_in_hbm(device):
  conf = config("cache.offload=false", "sparse.policy=dense", "scheduler.batch_control=none")
  tokens, engine = serve(conf, tiny_model(), PROMPTS, N)
  assert tokens == oracle()
  assert engine._executor.capacity.slots == 0
  assert engine.usage.blocks_loaded == 0


@CPU_AND_GPU
@pytest.mark.parametrize("slots", [1, 13])
def test_few_slots_are_exact_and_really_load(device, slots):
  model = tiny_model()
  tokens, engine = serve(with_slots(config("scheduler.batch_control=none"), slots, model), model, PROMPTS, N)
  assert tokens == oracle()
  kv_blocks = model.config.n_layers * model.config.n_kv_heads * sum(len(p) // 8 for p in PROMPTS)
  assert slots <= kv_blocks / 8
  assert engine.usage.blocks_loaded > kv_blocks


@CPU_AND_GPU
def test_a_sparse_selection_does_not_depend_on_residency(device):
  """Budget below the context, so that a wrong selection or a stale slot changes tokens."""
  model = tiny_model()
  sparse = config("sparse.token_budget=48", "scheduler.batch_control=none")
  roomy, engine = serve(sparse, model, PROMPTS, N)
  assert roomy != oracle()  # it bites: blocks are left out
  tight, tight_engine = serve(with_slots(sparse, 9, model), model, PROMPTS, N)
  in_hbm, _ = serve(config("cache.offload=false", base=sparse), model, PROMPTS, N)
  assert roomy == tight == in_hbm
  assert tight_engine.usage.blocks_loaded > engine.usage.blocks_loaded


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
def test_hybrid_prefill_from_few_slots(device):
  """Earlier chunks are read back from slots or from the pool, wherever they are."""
  model = tiny_model()
  conf = with_slots(config("scheduler.max_inject_tokens=64", "sparse.token_budget=96"), 11, model)
  whole = with_slots(config("sparse.token_budget=96"), 11, model)
  assert serve(conf, model, PROMPTS, N)[0] == serve(whole, model, PROMPTS, N)[0]


@CPU_AND_GPU
def test_alone_equals_in_a_batch(device):
  """Arrivals, pauses, ends and cancellations around a request change nothing for it; freed blocks are reused."""
  model = tiny_model()
  # 40 pool blocks hold two of these requests; 60 slots hold the working set of one.
  sparse = config("sparse.token_budget=64", "cache.dram_bytes=160KiB")
  sparse = with_slots(sparse, 60, model)
  prompts = [prompt_of(n, seed=100 + n) for n in (90, 61, 120, 33, 75, 48, 110, 20)]
  alone = [serve(sparse, model, [p], N)[0][0] for p in prompts]

  executor = poisoned(JaxExecutor(sparse, model))
  assert executor.capacity.pool_blocks == 40
  plans: list[Plan] = []
  engine = Engine(sparse, model, executor, observer=lambda plan, result: plans.append(plan))
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
  assert not engine.has_work
  cache = executor.cache  # everything is freed
  assert (np.asarray(cache.maps.slot_of) == -1).all() and (np.asarray(cache.maps.block_of) == -1).all()


@CPU_AND_GPU
def test_psa_with_threshold_1_reads_every_block(device):
  tokens, _ = serve(config("sparse.policy=psa", "sparse.threshold=1.0"), tiny_model(), PROMPTS, N)
  assert tokens == oracle()


@CPU_AND_GPU
def test_psa_stops_early_and_alike_whatever_the_memory(device):
  model = tiny_model()
  conf = config("sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=2", "scheduler.batch_control=none")
  roomy, engine = serve(conf, model, PROMPTS, N)
  tight, tight_engine = serve(with_slots(conf, 9, model), model, PROMPTS, N)
  _, whole = serve(config("sparse.threshold=1.0", base=conf), model, PROMPTS, N)
  assert roomy == tight
  assert engine.usage.blocks_attended == tight_engine.usage.blocks_attended < whole.usage.blocks_attended


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
  import jax

  if jax.device_count() < 2:
    pytest.skip(f"needs two devices, there is {jax.device_count()}")
  model = tiny_model()
  conf = config(
    f"sparse.policy={policy}", "sparse.token_budget=64", "sparse.threshold=0.8", "scheduler.max_inject_tokens=64"
  )
  one, engine = serve(with_slots(conf, 10, model), model, PROMPTS, N)
  two, engine2 = serve(config("tp=2", base=with_slots(conf, 10, model)), model, PROMPTS, N)
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
  engine = Engine(conf, model, executor)
  pointers = lambda: [  # noqa: E731
    getattr(executor.cache, name).addressable_data(0).unsafe_buffer_pointer()
    for name in ("pool", "slots", "digest", "tail")
  ]
  before = pointers()
  assert executor.cache.pool.sharding.memory_kind == "pinned_host"
  engine.add_request(PROMPTS[0], N)
  engine.run()
  assert engine.usage.blocks_loaded > 0
  assert executor.cache.pool.sharding.memory_kind == "pinned_host"
  assert pointers() == before
