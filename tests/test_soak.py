"""A long run with everything going wrong: cancellations, a device that fails, memory for few.

Nothing may be left over, and every output that survives is what its request gets alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.serving.engine import DeviceError, Engine
from sparse_serve_jax.serving.plan import Plan
from sparse_serve_jax.serving.request import Request, State
from tests.tiny import check_nothing_is_held, config, new_engine, prompt_of, serve, tiny_model, with_slots


@dataclasses.dataclass(frozen=True)
class Kind:
  """What many requests ask for alike."""

  prompt: tuple[int, ...]
  max_new_tokens: int
  options: dict[str, Any]


def kinds() -> list[Kind]:
  """Prompts of half a block to many, most of which begin alike, outputs of one token to some blocks, greedy and drawn,
  with stop tokens.
  """
  sizes = [(3, 9), (7, 1), (8, 17), (24, 12), (33, 3), (60, 20), (90, 14), (41, 10)]
  options: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"stop_token_ids": [5, 11, 40]}]
  stem = prompt_of(45, seed=0)
  return [
    Kind((*stem[: n // 2], *prompt_of(n - n // 2, seed=n)), out, {"stop_token_ids": [], **options[i % 3]})
    for i, (n, out) in enumerate(sizes)
  ]


def small(policy: str) -> EngineConfig:
  """Blocks for about three of the longest requests, slots for an eighth of these, pieces of prompts by layer."""
  conf = config(
    f"sparse.policy={policy}", "sparse.token_budget=48", "sparse.threshold=0.8", "cache.dram_bytes=160KiB",
    "cache.lanes=5", "scheduler.max_inject_tokens=64", "scheduler.working_set_steps=3",
  )  # fmt: skip
  return with_slots(conf, 20, tiny_model())


class Unreliable:
  """An executor that fails now and then: when a plan is dispatched, or when its result is read, then for good."""

  def __init__(self, executor: Any, rng: np.random.Generator, rate: float):
    self._executor, self._rng, self._rate = executor, rng, rate
    self.failures = 0

  def __getattr__(self, name: str) -> Any:
    return getattr(self._executor, name)

  def submit(self, plan: Plan) -> Any:
    fails = self._rng.random() < self._rate
    if fails and self._rng.random() < 0.5:
      self._fail()
    step = self._executor.submit(plan)
    if fails:
      step.result = self._fail
    return step

  def _fail(self) -> Any:
    self.failures += 1
    raise RuntimeError("device gone")


def soak(policy: str, n_requests: int, failure_rate: float, seed: int) -> None:
  rng, conf, asked = np.random.default_rng(seed), small(policy), kinds()
  alone = [serve(conf, tiny_model(), [kind.prompt], kind.max_new_tokens, **kind.options)[0][0] for kind in asked]
  solid = new_engine(conf, tiny_model())
  executor = Unreliable(solid._executor, rng, failure_rate)
  engine = Engine(executor)
  requests: list[tuple[Request, int]] = []
  ended: list[Request] = []

  def on_token(request: Request, token: int) -> None:
    if rng.random() < 0.02:  # any request, also the one that called
      engine.cancel(f"{rng.integers(max(0, len(requests) - 8), len(requests))}")

  while len(ended) < n_requests:
    while len(requests) < n_requests and len(requests) - len(ended) < rng.integers(1, 12):
      of = int(rng.integers(len(asked)))
      kind = asked[of]
      request = engine.add_request(
        kind.prompt, kind.max_new_tokens, request_id=str(len(requests)), on_token=on_token, **kind.options
      )
      requests.append((request, of))
    if rng.random() < 0.03:
      engine.cancel(f"{rng.integers(len(requests))}")
    ended += engine.step()
    assert engine.has_work or len(ended) == len(requests)
  engine.run()

  assert sorted(request.id for request in ended) == sorted(request.id for request, _ in requests)
  states = {state: sum(request.state is state for request, _ in requests) for state in State}
  assert states[State.FINISHED] > n_requests / 3 and states[State.CANCELLED] > n_requests / 50
  assert executor.failures and states[State.FAILED] >= executor.failures / 2
  for request, of in requests:
    expected = alone[of]
    if request.state is State.FINISHED:
      assert request.output_tokens == expected
    else:
      assert request.output_tokens == expected[: len(request.output_tokens)]
      assert request.state is State.CANCELLED or isinstance(request.error, DeviceError)
  assert not engine.has_work and not engine.failed and not engine._live
  assert sum(request.cached_tokens > 0 for request, _ in requests) > n_requests / 10
  check_nothing_is_held(engine)


@pytest.mark.parametrize("policy", ["topk", pytest.param("psa", marks=pytest.mark.soak)])
def test_a_short_soak(policy: str):
  soak(policy, n_requests=80, failure_rate=0.02, seed=1)


@pytest.mark.slow
@pytest.mark.soak
def test_a_long_soak():
  soak("topk", n_requests=2000, failure_rate=0.005, seed=2)
