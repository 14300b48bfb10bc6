"""What fails: devices, logits, callbacks, interrupts. Nothing hangs, and nothing is lost but what must be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest

from sparse_serve_jax.config import SchedulerConfig
from sparse_serve_jax.serving.engine import DeviceError, Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Plan
from sparse_serve_jax.serving.request import Request, State
from tests.fake_engine import FakeExecutor, continuation, fake_engine
from tests.tiny import config, tiny_model

PROMPTS = {"a": [4] * 5, "b": [6] * 20, "c": [8, 1], "d": [3, 3, 3]}


def busy_engine(**sizes) -> tuple[Engine, FakeExecutor, dict[str, Request]]:
  """An engine that has begun: two lanes, so that two requests of four have to wait."""
  engine, executor = fake_engine(SchedulerConfig(max_inject_tokens=24), R=2, **sizes)
  requests = {name: engine.add_request(prompt, 6, request_id=name) for name, prompt in PROMPTS.items()}
  return engine, executor, requests


def fail_at(executor: FakeExecutor, name: str, times: range, error: BaseException) -> None:
  """Makes calls of a method of the executor raise `error`."""
  whole, calls = getattr(executor, name), itertools.count()

  def failing(*args):
    if next(calls) in times:
      raise error
    return whole(*args)

  setattr(executor, name, failing)


@pytest.mark.parametrize("where", ["submit", "execute"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_device_failure_ends_what_it_held_and_the_rest_goes_on(where: str, at: int):
  engine, executor, requests = busy_engine()
  fail_at(executor, where, range(at, at + 1), OSError("device gone"))
  ended = engine.run()
  assert sorted(request.id for request in ended) == sorted(PROMPTS) and not engine.failed and executor.resets == 1
  lost = [name for name, request in requests.items() if request.state is State.FAILED]
  assert 1 <= len(lost) <= 2  # no more than there are lanes
  for name, request in requests.items():
    expected = continuation(PROMPTS[name], 6)
    if name in lost:
      assert request.finish_reason == "error" and isinstance(request.error, DeviceError)
      assert str(request.error) == "the device failed with OSError: device gone"
      assert request.output_tokens == expected[: len(request.output_tokens)]
    else:
      assert request.output_tokens == expected and request.error is None
  assert engine._scheduler.pool_blocks_in_use == 0 and not engine.has_work
  again = engine.add_request([1, 2], 4)
  assert engine.run() == [again] and again.output_tokens == continuation([1, 2], 4)


def test_a_device_that_fails_for_every_request_ends_them_all():
  engine, executor, requests = busy_engine()
  fail_at(executor, "execute", range(1000), OSError("device gone"))
  assert len(engine.run()) == 4 and not engine.failed
  assert {request.finish_reason for request in requests.values()} == {"error"}
  assert executor.resets <= 4  # each failure ends a request at least


@pytest.mark.parametrize("where", ["submit", "execute"])
def test_a_device_that_cannot_go_on(where: str):
  """All requests end with the error, and only a new engine can go on."""
  engine, executor, requests = busy_engine()
  seen: list[int] = []
  requests["c"].on_token = lambda request, token: seen.append(token)
  fail_at(executor, where, range(2, 1000), OSError("device gone"))
  fail_at(executor, "reset", range(1000), RuntimeError("no device"))
  ended = engine.run()
  assert sorted(request.id for request in ended) == sorted(PROMPTS) and engine.failed and not engine.has_work
  assert all(isinstance(request.error, DeviceError) for request in requests.values())
  for go_on in (lambda: engine.add_request([1], 3), engine.step, lambda: engine.cancel("a") or engine.step()):
    with pytest.raises(RuntimeError, match=r"this engine has failed: RuntimeError\('no device'\); make a new one"):
      go_on()


def test_after_an_interrupted_dispatch_only_a_new_engine_goes_on():
  engine, executor, _ = busy_engine()
  engine.step()
  fail_at(executor, "submit", range(1), KeyboardInterrupt())
  with pytest.raises(KeyboardInterrupt):
    engine.step()
  assert engine.failed
  for go_on in (lambda: engine.add_request([1], 3), engine.step):
    with pytest.raises(RuntimeError, match=re.escape("this engine has failed: KeyboardInterrupt()")):
      go_on()


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_logits_that_are_not_finite_end_their_request_alone(n_tokens: int):
  engine, executor, requests = busy_engine()

  def poison(request: Request, token: int) -> None:
    if len(request.output_tokens) == n_tokens:
      executor.not_finite.add("b")

  if n_tokens:
    requests["b"].on_token = poison
  else:
    executor.not_finite.add("b")
  assert len(engine.run()) == 4 and executor.resets == 0
  bad = requests.pop("b")
  assert (bad.state, bad.finish_reason) == (State.FAILED, "error")
  n = len(bad.output_tokens)
  assert bad.output_tokens == continuation(PROMPTS["b"], n) and n_tokens <= n <= n_tokens + 1
  assert isinstance(bad.error, FloatingPointError) and f"logits after {20 + n} tokens" in str(bad.error)
  for name, request in requests.items():
    assert request.output_tokens == continuation(PROMPTS[name], 6)
  assert engine._scheduler.pool_blocks_in_use == 0


def interrupted_once(seen: list[tuple[str, int]]) -> Callable[[Request, int], None]:
  raised = []

  def on_token(request: Request, token: int) -> None:
    seen.append((request.id, token))
    if request.id == "a" and len(request.output_tokens) == 2 and not raised:
      raised.append(True)
      raise KeyboardInterrupt

  return on_token


def test_an_interrupt_in_a_callback_keeps_the_other_callbacks():
  """Those of the same iteration, and the observer, are called by the next step; none is called twice."""
  plans: list[Plan] = []
  engine, executor = fake_engine(observer=lambda seen: plans.append(seen.plan))
  seen: list[tuple[str, int]] = []
  on_token = interrupted_once(seen)
  requests = [engine.add_request(PROMPTS[name], 5, request_id=name, on_token=on_token) for name in "abc"]
  with pytest.raises(KeyboardInterrupt):
    engine.run()
  assert not engine.failed and engine.has_work
  engine.run()
  for request in requests:
    assert [token for name, token in seen if name == request.id] == request.output_tokens
    assert request.output_tokens == continuation(PROMPTS[request.id], 5)
  assert plans == executor.plans


def test_an_iteration_that_only_releases_is_waited_for():
  """Blocks that are free may be written from outside the device's programs: only when the release has run."""
  model = tiny_model()
  executor = JaxExecutor(config(), model)
  waited = []

  class Done:
    def block_until_ready(self) -> None:
      waited.append(True)

  nothing = Plan(1, np.arange(3, dtype=np.int32), (), (), (), ())
  step = executor.submit(nothing)
  assert len(step.done) == 1 and not (step.prefilled or step.decoded or step.measured)
  step.done = [*step.done, Done()]
  assert step.result().tokens == {} and waited == [True]
