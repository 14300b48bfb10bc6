"""Short prompts that go through prefill as one piece: what is packed, and that nobody can tell from the tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, override
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Plan, StepStats
from sparse_serve_jax.serving.request import Request, State
from sparse_serve_jax.simulation.cost import work_of
from tests.test_buckets import planned, sizes
from tests.tiny import config, greedy, often, poisoned, prompt_of, tiny_model, with_slots

LENGTHS = (5, 16, 33, 64, 100, 31, 1, 57)


class Recording:
  """An executor, and the plans that it has run."""

  def __init__(self, executor: JaxExecutor):
    self.executor, self.plans = executor, []

  def __getattr__(self, name: str) -> Any:
    return getattr(self.executor, name)

  def submit(self, plan: Plan):
    self.plans.append(plan)
    return self.executor.submit(plan)

  @property
  def packs(self) -> list[list[str]]:
    """Names of the requests of each pack."""
    found = [works for plan in self.plans for _, works in plan.prefill]
    return [[work.request_id for work in works] for works in found if len(works) > 1]


def make(conf: EngineConfig) -> Recording:
  """An executor whose cache begins full of NaN."""
  return Recording(poisoned(JaxExecutor(conf, tiny_model())))


def run(executor: Recording) -> list[Request]:
  """Requests of LENGTHS, some of which draw, tell log probabilities or must not stop."""
  engine = Engine(executor)
  kinds = [{}, {"temperature": 0.8, "seed": 3}, {"logprobs": 2}, {"stop_token_ids": [*range(8)], "min_tokens": 3}]
  requests = [engine.add_request(prompt_of(n, seed=n), 7, **kinds[i % 4]) for i, n in enumerate(LENGTHS)]
  engine.run()
  return requests


@functools.cache
def alone(policy: str) -> list[Request]:
  """The same, none of them packed: how blocks move changes no token."""
  with pytest.MonkeyPatch.context() as patch:
    made = Buckets.of
    patch.setattr(Buckets, "of", lambda *of: dataclasses.replace(made(*of), packed=0))
    executor = make(config("sparse.token_budget=64", "sparse.group_blocks=4", f"sparse.policy={policy}"))
    requests = run(executor)
  assert not executor.packs
  return requests


RUNGS = {
  "fused": [],
  "per block, zones of lanes": ["cache.load=per_block", "cache.save=per_block", "cache.zones=lane"],
  "chunked": ["scheduler.prefill=chunked", "scheduler.chunk_tokens=128"],
  "dense in HBM": ["cache.offload=false", "sparse.policy=dense", "scheduler.prefill=chunked", "cache.prefix=false"],
  "psa": ["sparse.policy=psa"],
  "staged, on two devices": ["cache.save=staged", "tp=2"],
  "kernels": ["implementation=interpret"],
}


@pytest.mark.parametrize("rung", often(RUNGS, "kernels", "psa", "chunked"))
def test_tokens_are_those_of_prompts_alone(rung: str):
  """In float32, with a budget that some rungs exceed, from a cache full of NaN."""
  conf = config("sparse.token_budget=64", "sparse.group_blocks=4", *RUNGS[rung])
  if conf.cache.offload:
    conf = with_slots(conf, 36, tiny_model())
  executor = make(conf)
  packed = run(executor)
  rows = executor.buckets.packed_rows
  assert len(executor.packs) >= 2 and max(map(len, executor.packs)) == rows
  for request, other in zip(packed, alone(conf.sparse.policy), strict=True):
    assert request.output_tokens == other.output_tokens and request.output_tokens
    assert [of.top.keys() for of in request.logprobs] == [of.top.keys() for of in other.logprobs]
    for of, of_other in zip(request.logprobs, other.logprobs, strict=True):
      assert of.logprob == pytest.approx(of_other.logprob, abs=1e-5)


def test_where_prefill_is_sparse_prompts_that_read_all_are_packed():
  """Those of up to 24 tokens, which sinks and window hold: their tokens are a dense forward pass's."""
  conf = config("sparse.prefill=top_k", "sparse.prefill_share=0.2")
  executor = make(conf)
  engine = Engine(executor)
  prompts = [tuple(prompt_of(n, seed=n)) for n in (24, 10, 3, 25, 50)]
  requests = [engine.add_request(list(prompt), 4) for prompt in prompts]
  engine.run()
  assert executor.packs == [[request.id for request in requests[:3]]]
  assert [request.output_tokens for request in requests[:3]] == [greedy("gqa2", prompt, 4) for prompt in prompts[:3]]


def test_what_is_packed():
  """Prompts in a row that are whole, as many as fit; none that goes on after blocks that it shares, and none alone."""
  conf = config("cache.lanes=12", "scheduler.max_batch=12")
  executor = make(conf)
  engine = Engine(executor)
  first = prompt_of(64, seed=1)
  lengths = {"a": 64, "same": 70, "b": 100, "c": 90, "d": 56, "e": 200, "f": 9}
  for name, n in lengths.items():
    prompt = first + prompt_of(n - 64, seed=2) if name == "same" else prompt_of(n, seed=n)
    engine.add_request(first if name == "a" else prompt, 2, request_id=name)
  engine.run()
  whole = [[work.request_id for work in works] for plan in executor.plans for _, works in plan.prefill]
  assert whole == [["a"], ["same"], ["b", "c", "d"], ["e", "f"]]
  assert executor.buckets.packed == 256 and executor.buckets.packed_rows == 4


def test_which_prompts_a_pack_is_for():
  """And is made where they take more one by one."""
  buckets = Buckets.of(EngineConfig(), 32, 131072)
  assert buckets.packed == 2048 and buckets.packed_rows == 32
  assert buckets.packable(1024) and not buckets.packable(1025)
  assert not buckets.packing_pays([1] * 4) and buckets.packing_pays([1] * 5)  # none takes less than 512 tokens
  assert not buckets.packing_pays([1000, 1000]) and buckets.packing_pays([513, 513, 30])


def test_a_request_that_ends_or_fails_leaves_the_others_of_its_pack():
  """One is cancelled while its pack runs, and one has a token whose embedding is not finite."""
  model = tiny_model()
  embed = np.array(model.params["embed"])
  embed[95] = np.nan
  broken = dataclasses.replace(model, params={**model.params, "embed": embed})
  conf = config("cache.prefix=false")
  executor = Recording(poisoned(JaxExecutor(conf, broken)))
  engine = Engine(executor)
  prompts = [[token % 95 for token in prompt_of(n, seed=n)] for n in (30, 20, 45, 61)]
  prompts[1][7] = 95
  requests = [engine.add_request(prompt, 6) for prompt in prompts]
  engine.step()
  engine.cancel(requests[2].id)
  engine.run()
  assert executor.packs == [[request.id for request in requests]]
  assert [of.state for of in requests] == [State.FINISHED, State.FAILED, State.CANCELLED, State.FINISHED]
  for i in (0, 3):
    assert requests[i].output_tokens == greedy("gqa2", tuple(prompts[i]), 6)


@pytest.mark.parametrize("prefill", ["layer_segmented", "chunked"])
def test_64_short_prompts_take_a_few_pieces(prefill: str):
  """64 x 200 tokens beside 12,800 of one prompt, as an 8B model pads them."""
  conf = override(EngineConfig(), [f"scheduler.prefill={prefill}", "cache.lanes=64", "cache.prefix=false"])
  shape = dataclasses.replace(sizes(32, 131072, 32, lanes=64), M=65536)
  buckets = Buckets.of(conf, shape.L, shape.max_context)

  def token_layers(prompts: list[int]) -> int:
    plans = planned(conf, shape, prompts)
    return sum(work_of(plan, StepStats(), shape, buckets).prefill_tokens for plan in plans)

  assert token_layers([200] * 64) == 32 * (7 * 2048 + buckets.padded(200, 0, 32))
  assert 12800 <= token_layers([12800]) / 32 <= 1.125 * 12800
  assert token_layers([200] * 63) <= 1.15 * token_layers([12600])
