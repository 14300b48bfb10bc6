"""A prompt whose beginning is in the pool already: its prefill begins later, over blocks with several owners."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, SchedulerConfig
from sparse_serve_jax.memory.allocator import BlockAllocator
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.scheduler import Scheduler
from tests import test_scheduler
from tests.test_scheduler import S, pieces, request, shape_of
from tests.tiny import config, greedy, new_engine, prompt_of, tiny_model


def test_a_shared_block_is_free_when_its_last_owner_frees_it():
  allocator = BlockAllocator(4)
  blocks = allocator.allocate(3)
  assert blocks is not None
  allocator.share(blocks[:2])
  allocator.free(blocks, after=0)
  assert allocator.take_release().tolist() == blocks[2:].tolist() and allocator.in_use == 2
  with pytest.raises(ValueError, match=r"blocks \[2\] are freed but have no owner"):
    allocator.free(blocks[2:], after=0)
  with pytest.raises(ValueError, match=r"blocks \[2\] are shared but have no owner"):
    allocator.share(blocks[1:])
  allocator.free(blocks[:2], after=0)
  assert sorted(allocator.take_release()) == sorted(blocks[:2]) and allocator.available == 4


@pytest.mark.parametrize(
  ("scheduler", "expected"),
  [
    # 40 of 64 tokens are left: all layers at once, layer by layer, in chunks of a layer, in chunks of all layers
    (SchedulerConfig(max_inject_tokens=200), [(24, 40, 0, 3, True)]),
    (SchedulerConfig(max_inject_tokens=45), [(24, 40, layer, 1, layer == 2) for layer in range(3)]),
    (
      SchedulerConfig(max_inject_tokens=3 * S),
      [(start, n, layer, 1, start > 24 and layer == 2) for layer in range(3) for start, n in ((24, 24), (48, 16))],
    ),
    (SchedulerConfig(prefill="chunked", chunk_tokens=4 * S), [(24, 32, 0, 3, False), (56, 8, 0, 3, True)]),
  ],
)
def test_a_piece_begins_after_what_is_cached_and_has_a_program(scheduler: SchedulerConfig, expected):
  engine_config, shape = test_scheduler.config(scheduler), shape_of()
  made = Scheduler(engine_config, shape, cached=lambda of: np.arange(3, dtype=np.int32))
  made._allocator.allocate(8)  # blocks 0 to 7 belong to somebody
  made.add(request("a", 64))
  found, admitted = [], []
  for _ in range(20):
    plan = made.schedule(0.0)
    admitted += plan.admit
    found += [piece[1:] for piece in pieces(plan)]
  assert found == expected
  (admission,) = admitted
  assert admission.table[:3].tolist() == [0, 1, 2] and admission.table[3:].min() >= 8
  buckets = Buckets.of(engine_config, shape.L, shape.max_context, resumes=True)
  programs = set(buckets.programs())
  for start, n, *_ in expected:
    assert ("prefill", buckets.piece(n, start), buckets.table(start // S)) in programs


def test_the_last_token_is_never_cached():
  """Its logits are needed: a prompt that is cached to its end begins a block earlier."""
  made = Scheduler(test_scheduler.config(), shape_of(), cached=lambda of: np.arange(9, dtype=np.int32))
  made._allocator.allocate(9)
  made.add(request("a", 64))
  assert pieces(made.schedule(0.0)) == [("a", 56, 8, 0, 3, True)]


@pytest.mark.parametrize("inject", [0, 64])
def test_tokens_over_shared_blocks_are_those_of_the_model(inject: int):
  """The first request's blocks serve the others, also after it has ended, from few slots."""
  conf: EngineConfig = config(f"scheduler.max_inject_tokens={inject}", "cache.hbm_bytes=400KiB")
  model, prefix = tiny_model(), prompt_of(100, seed=5)
  engine = new_engine(conf, model)
  tables: dict[str, np.ndarray] = {}

  def cached(of: Request) -> np.ndarray:
    return tables["first"][:11] if tables else np.zeros(0, np.int32)  # of 12 full blocks

  executor = engine._executor
  executor.buckets = Buckets.of(conf, executor.shape.L, executor.shape.max_context, resumes=True)
  engine._scheduler = Scheduler(conf, executor.shape, cached)
  engine._observer = lambda plan, result: tables.update({of.request_id: of.table for of in plan.admit})
  prompts = {"first": prefix, "second": [*prefix[:90], *prompt_of(40, seed=6)], "third": [*prefix[:88], 7]}
  requests = [engine.add_request(prompts["first"], 24, request_id="first")]
  engine.step(), engine.step()
  assert "first" in tables
  requests += [engine.add_request(prompts[name], 24, request_id=name) for name in ("second", "third")]
  engine.run()
  for made in requests:
    assert made.output_tokens == greedy("gqa2", tuple(prompts[made.id]), 24)
  assert tables["second"][:11].tolist() == tables["third"][:11].tolist() == tables["first"][:11].tolist()
  assert engine._scheduler.pool_blocks_in_use == 0
