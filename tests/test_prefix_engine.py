"""Prompts that begin alike, through the whole engine: tokens are those that each request gets alone.

The last cases run on a GPU with `-m gpu`, there by the Triton kernels with the pool in pinned host memory.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.config import EngineConfig, SchedulerConfig, override
from sparse_serve_jax.memory.kv_cache import working_sets
from sparse_serve_jax.memory.prefix import hash_chain
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import Request, State
from tests.fake_engine import EOS, S, Ticks, continuation, fake_engine
from tests.tiny import check_nothing_is_held, config, greedy, new_engine, often, prompt_of, tiny_model, with_slots

# ----------------------------------------------------------------------------------------- a device computed by hand


@dataclasses.dataclass(frozen=True)
class Asked:
  stem: int  # which beginning
  n_stem: int
  own: int  # tokens of its own after that
  n_output: int
  when: int  # step of the engine
  salt: str | None
  follows: bool  # its prompt begins with all that the first request before it asked and got


@st.composite
def workloads(draw):
  scheduler = SchedulerConfig(
    max_batch=draw(st.integers(1, 4)),
    prefill=draw(st.sampled_from(["layer_segmented", "chunked"])),
    chunk_tokens=S * draw(st.integers(1, 6)),
    max_inject_tokens=draw(st.integers(1, 120)),
    batch_control=draw(st.sampled_from(["working_set", "none"])),
  )
  asked = st.builds(
    Asked,
    stem=st.integers(0, 1),
    n_stem=st.integers(0, 40),
    own=st.integers(0, 9),
    n_output=st.integers(1, 14),
    when=st.integers(0, 12),
    salt=st.sampled_from([None, None, None, "s"]),
    follows=st.booleans(),
  )
  sizes = {"M": draw(st.integers(8, 22)), "R": draw(st.integers(1, 5)), "P": draw(st.sampled_from([0, 3, 40]))}
  wanted = sorted(draw(st.lists(asked, min_size=2, max_size=9)), key=lambda each: each.when)
  cancels = draw(st.dictionaries(st.integers(0, 8), st.integers(0, 25), max_size=2))
  return scheduler, sizes, wanted, cancels, draw(st.sets(st.integers(0, 8), max_size=1))


STEMS = [np.random.default_rng(i).integers(0, EOS, 40).tolist() for i in range(2)]


def prompts_of(wanted: list[Asked]) -> list[list[int]]:
  prompts: list[list[int]] = []
  for i, each in enumerate(wanted):
    begin = STEMS[each.stem][: each.n_stem]
    if each.follows and prompts:
      begin = prompts[0] + continuation(prompts[0], wanted[0].n_output)
    prompts.append((begin + [90 + i % 5] * each.own or [1])[: 64 - each.n_output])
  return prompts


@given(workloads())
def test_shared_beginnings_change_no_token(workload):
  """Also when there is no room, requests are cancelled, and one has no finite logits."""
  scheduler, sizes, wanted, cancels, not_finite = workload
  engine, executor = fake_engine(scheduler, **sizes)
  executor.not_finite = {str(i) for i in not_finite}
  prompts, requests = prompts_of(wanted), dict[int, Request]()
  step = 0
  while len(requests) < len(wanted) or engine.has_work:
    for i, each in enumerate(wanted):
      if i not in requests and each.when <= step:
        requests[i] = engine.add_request(prompts[i], each.n_output, request_id=str(i), cache_salt=each.salt)
    for i, when in cancels.items():
      if when == step:
        engine.cancel(str(i))
    engine.step()
    step += 1
    assert step < 2000
  for i, request in requests.items():
    expected = continuation(prompts[i], wanted[i].n_output)
    assert request.output_tokens == expected[: len(request.output_tokens)]
    assert request.cached_tokens % S == 0 and request.cached_tokens < len(prompts[i])
    if request.state is State.FINISHED:
      assert request.output_tokens == expected
    else:
      assert i in cancels or request.id in executor.not_finite
  assert engine._scheduler.pool_blocks_in_use == 0
  assert engine._scheduler._allocator.available == sizes["M"]


@pytest.mark.parametrize("inject", [0, 20])
def test_samples_share_a_prefill(inject: int):
  engine, executor = fake_engine(SchedulerConfig(max_inject_tokens=inject))
  prompt = STEMS[0][:37]
  requests = [engine.add_request(prompt, 5, temperature=1.0, seed=seed) for seed in range(4)]
  engine.run()
  for request in requests:
    assert request.output_tokens == continuation(prompt, 5, request.sampling)
  assert [request.cached_tokens for request in requests] == [0, 32, 32, 32]
  tokens = sum(len(work.tokens) * work.n_layers for plan in executor.plans for work in plan.works)
  assert tokens == (37 + 3 * 5) * executor.shape.L


def test_a_new_engine_over_a_used_executor_knows_nothing_of_the_cache():
  engine, executor = fake_engine()
  engine.add_request(STEMS[0][:37], 5)
  engine.run()
  engine = Engine(executor, clock=Ticks())
  again = engine.add_request(STEMS[0][:37], 5)
  engine.run()
  assert again.cached_tokens == 0 and again.output_tokens == continuation(STEMS[0][:37], 5)


def test_a_shared_block_counts_in_the_working_set_of_who_selected_it_last():
  """Steps 3 and 40 of two requests in a window of four: block 2 is the first's, 5 the second's, 7 nobody's any more."""
  last_selected = np.full((1, 1, 9), -(1 << 30), np.int32)
  last_selected[0, 0, [2, 5, 7]] = [1, 39, 20]
  maps = types.SimpleNamespace(last_selected=jnp.asarray(last_selected))
  hot: Any = types.SimpleNamespace(tables=jnp.array([[2, 5, 7], [2, 5, 7]]), maps=maps)
  counts = working_sets(hot, jnp.arange(2), jnp.full(2, 3), steps=jnp.array([3, 40]), width=3, w=4)
  assert counts.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------------- a model


CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
A, B = prompt_of(44, seed=1), prompt_of(33, seed=2)


def small(*assignments: str) -> EngineConfig:
  """A pool for two or three requests, slots for two blocks in all layers and heads, pieces of prompts in few sizes."""
  conf = config(
    "scheduler.batch_control=none", "scheduler.max_context=64", "scheduler.chunk_tokens=16",
    "scheduler.max_inject_tokens=128", "cache.dram_bytes=160KiB", "cache.lanes=4", *assignments,
  )  # fmt: skip
  return with_slots(conf, 8, tiny_model()) if conf.cache.offload else conf


def served(conf: EngineConfig) -> tuple[list[Request], Engine]:
  """Prompts that begin alike come together, later, and after outputs; some are cancelled."""
  engine = new_engine(conf, tiny_model())
  prompts = [A, A, [*A[:40], 7], B, [*A, 3, 4], B[:17], [*prompt_of(30, seed=5)], [*A[:24], *B[:20]], A]
  requests = [engine.add_request(prompt, 12) for prompt in prompts[:5]]
  doomed = engine.add_request([*A[:32], 5, 6], 12)
  for step in range(200):
    engine.step()
    if step == 6:
      engine.cancel(doomed.id)
      requests += [engine.add_request(prompt, 12) for prompt in prompts[5:]]
  assert not engine.has_work
  follow = [*requests[3].prompt, *requests[3].output_tokens, 9]
  requests.append(engine.add_request(follow, 12))
  requests += [engine.add_request(A, 12), engine.add_request(prompt_of(50, seed=8), 12)]
  engine.run()
  return requests, engine


# fmt: off
RUNGS = {
  "hybrid": [
    "scheduler.max_inject_tokens=16", "cache.load=staged", "cache.save=staged", "cache.zones=lane", "tp=2",
  ],
  "chunked": ["scheduler.prefill=chunked", "cache.load=per_block", "cache.save=per_block", "cache.zones=layer"],
  "in_hbm": ["cache.offload=false", "sparse.policy=dense", "cache.hbm_bytes=900KB"],
  "psa": ["sparse.policy=psa", "sparse.threshold=1", "cache.eviction=fifo"],
}
# fmt: on


@CPU_AND_GPU
@pytest.mark.parametrize("rung", RUNGS)
def test_tokens_over_shared_blocks_are_those_of_the_model(device, rung: str):
  conf = small(*RUNGS[rung])
  if jax.device_count() < conf.tp:
    pytest.skip(f"needs {conf.tp} devices, there is {jax.device_count()}")
  requests, engine = served(conf)
  for request in requests:
    assert request.output_tokens == greedy("gqa2", tuple(request.prompt.tolist()), 12)
  cached = [request.cached_tokens for request in requests]
  assert cached[1:3] == [40, 40] and cached[0] == 0 and cached[6] == 0
  assert sum(cached) > 200
  assert cached[-3] == (32 if rung == "psa" else 40)  # 33 tokens of a prompt, and of its output's first eleven
  check_nothing_is_held(engine)


@CPU_AND_GPU
def test_a_sparse_selection_gives_the_same_tokens_with_and_without(device):
  conf = small("sparse.token_budget=32", "cache.load=gather")
  alone, _ = served(override(conf, ["cache.prefix=false"]))
  requests, _ = served(conf)
  tokens = [request.output_tokens for request in requests]
  assert tokens == [request.output_tokens for request in alone]
  assert tokens != [greedy("gqa2", tuple(request.prompt.tolist()), 12) for request in requests]  # it bites
  assert sum(request.cached_tokens for request in requests) > 200 and not any(of.cached_tokens for of in alone)


@CPU_AND_GPU
def test_what_is_hot_stays_hot(device):
  """Slots for everything: after its request has ended a prompt is read from slots, by a prefill and by decode steps."""
  engine = new_engine(config("scheduler.max_context=64", "scheduler.max_inject_tokens=128"), tiny_model())
  for cached in (0, 40):
    request = engine.add_request(A, 12)
    engine.run()
    assert request.output_tokens == greedy("gqa2", tuple(A), 12) and request.cached_tokens == cached
  assert engine.usage.blocks_attended > 300 and engine.usage.blocks_loaded == 0


# fmt: off
KEEPING = {
  "one program": [],
  "segments": ["scheduler.max_inject_tokens=128", "cache.load=staged", "cache.save=staged", "cache.eviction=fifo"],
  "layers": ["scheduler.max_inject_tokens=128", "cache.zones=layer", "cache.save=per_block", "cache.load=per_block"],
  "split": ["tp=2", "sparse.policy=psa"],
  "kernels": ["scheduler.max_inject_tokens=128", "implementation=interpret"],
}
# fmt: on


@CPU_AND_GPU
@pytest.mark.parametrize("rung", often(KEEPING, "segments", "split", "kernels"))
def test_what_a_prompt_shares_is_read_once_and_then_hot(device, rung: str):
  """Slots hold one prompt and half of another, and what enters besides the budget is read from them by later prompts.

  Every prefill reads what no slot has, once, and brings it where nobody needs the slot. Another prompt drives some out.
  """
  conf = config("scheduler.max_context=128", "sparse.token_budget=32", "cache.dram_bytes=256KiB", *KEEPING[rung])
  if jax.device_count() < conf.tp or (device == "gpu" and conf.implementation == "interpret"):
    pytest.skip(f"needs {conf.tp} devices, there is {jax.device_count()}; kernels run there as they are")
  engine = new_engine(with_slots(conf, 72, tiny_model()), tiny_model())
  prompts = [[*prompt_of(92, seed=1), i] for i in range(4)]
  read = []
  for prompt in (*prompts[:2], prompt_of(93, seed=2), *prompts[2:]):
    shared = engine._scheduler._prefix.find(hash_chain(np.array(prompt, np.int32), 8))
    slot_of = np.asarray(engine._executor.cache.hot.maps.slot_of)  # type: ignore[attr-defined]
    missing, before = int((slot_of[:, :, shared] < 0).sum()), engine.usage.blocks_loaded
    request = engine.add_request(prompt, 1)
    engine.run()
    assert request.output_tokens == greedy("gqa2", tuple(prompt), 1) and request.cached_tokens == 8 * len(shared)
    read.append(engine.usage.blocks_loaded - before)
    assert read[-1] == missing
  # Of a layer's slots half stay for the misses of the next step.
  assert len(shared) == 11 and read[:3] == [0, 8 if rung == "layers" else 0, 0]
  assert 44 > read[3] > read[4]
  check_nothing_is_held(engine)


@pytest.mark.parametrize("control", ["none", "working_set"])
def test_what_a_prompt_keeps_costs_no_step_a_block(control: str):
  """With prompts beside them that fill all spare slots, rows that decode miss no more than where prompts keep none."""

  def missed(prefix: str) -> int:
    conf = config(
      "sparse.token_budget=32", "scheduler.max_context=128", f"cache.prefix={prefix}", "cache.dram_bytes=512KiB",
      f"scheduler.batch_control={control}",
    )  # fmt: skip
    engine = new_engine(with_slots(conf, 60, tiny_model()), tiny_model())
    rows = [engine.add_request(prompt_of(60, seed=i), 40) for i in range(2)]
    for step in range(30):
      engine.step()
      if step % 6 == 2:
        engine.add_request(prompt_of(90, seed=10 + step), 1)
    engine.run()
    assert all(row.state is State.FINISHED for row in rows)
    return engine.usage.blocks_missed

  assert 0 < missed("true") <= missed("false")
