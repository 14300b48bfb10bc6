"""The open-loop driver, in simulated time: an iteration takes a second of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from sparse_serve_jax.serving.clock import Virtual, Wall
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.run import Refusal, Served, row, serve, summary_of
from sparse_serve_jax.workloads import Item, Refused
from tests.fake_engine import VOCAB, FakeExecutor, FakeModel, continuation, fake_executor


def simulated(model: FakeModel | None = None, **sizes) -> tuple[Engine, FakeExecutor]:
  """An engine on a device that takes a second for every iteration."""
  executor = fake_executor(model=model, **sizes)
  clock, execute = Virtual(100.0), executor.execute

  def taking_a_second(plan):
    clock.sleep_until(clock.now() + 1)
    return execute(plan)

  executor.execute = taking_a_second
  return Engine(executor, clock=clock), executor


def item(name: str, prompt: list[int], n: int) -> Item:
  return Item(name, np.array(prompt, np.int32), n)


def test_virtual_time_passes_by_sleeping_alone():
  clock = Virtual(3.0)
  assert clock.now() == clock.now() == 3.0
  clock.sleep_until(5.5)
  clock.sleep_until(1.0)
  assert clock.now() == 5.5


def test_the_wall_sleeps_until_it_is_time():
  clock = Wall()
  start = clock.now()
  clock.sleep_until(start + 0.02)
  assert 0.02 <= clock.now() - start < 5
  clock.sleep_until(start)  # past


def test_times_by_hand():
  """Three iterations for "a", a rest, and "b" and "c" together."""
  engine, _ = simulated()
  items = [item("a", [1], 3), item("b", [2], 2), item("c", [3], 2)]
  ended: list[Request] = []
  served = serve(engine, items, [0.0, 10.0, 10.0], ended.append)
  assert [request.id for request in ended] == ["a", "b", "c"]
  for request, of in zip(ended, items, strict=True):
    assert request.output_tokens == continuation(of.prompt.tolist(), of.max_new_tokens)
  times = [(r.arrival_time - 100, r.scheduled_time - 100, [t - 100 for t in r.token_times]) for r in ended]
  assert times == [(0, 0, [1, 2, 3]), (10, 10, [11, 12]), (10, 10, [11, 12])]
  assert isinstance(served, Served) and (served.refused, served.failed) == (0, 0)
  assert served.elapsed_s == 13  # the last iteration only releases blocks
  assert (served.summary.requests, served.summary.ttft_mean_s, served.summary.tbt_mean_s) == (3, 1, 1)
  assert served.to_dict() == served.summary.to_dict() | {"refused": 0, "failed": 0, "elapsed_s": 13}


def test_rows_tell_of_requests_what_the_run_does():
  engine, _ = simulated(R=2)
  items = [item("a", [1], 3), item("b", [2], 2), item("c", [3] * 5, 4), item("d", [1] * 10_000, 2)]
  ends: list[Request | Refusal] = []
  whole = serve(engine, items, [0.0, 0.5, 1.0, 2.0], ends.append).to_dict()
  told = summary_of([row(end, 100.0) for end in ends])
  assert {key: told[key] for key in whole if key in told} == {key: whole[key] for key in whole if key in told}
  assert (told["requests"], told["refused"], told["failed"], told["output_tokens"]) == (3, 1, 0, 9)
  assert (
    whole.keys() - told.keys() >= {"throughput_tok_s", "iterations"} and told["scheduling_delay_mean_s"] is not None
  )


def test_arrivals_do_not_wait_for_the_engine():
  """One lane for all: requests queue, and their times to the first token count from when they were due."""
  engine, _ = simulated(R=1)
  ended: list[Request] = []
  served = serve(engine, [item(str(i), [i], 4) for i in range(4)], [0.5 * i for i in range(4)], ended.append)
  assert [request.arrival_time - 100 for request in ended] == [0, 0.5, 1, 1.5]
  delays = [request.scheduled_time - request.arrival_time for request in ended]
  assert delays[0] == 0 and delays == sorted(delays) and delays[3] > 3 * 3
  assert served.summary.scheduling_delay_mean_s == np.mean(delays)


def test_the_start_may_be_later_than_zero():
  engine, _ = simulated()
  ended: list[Request] = []
  serve(engine, [item("late", [1], 1)], [7.0], ended.append)
  assert ended[0].scheduled_time == 107


def test_what_is_refused_is_handed_out_with_the_reason_and_the_rest_runs():
  engine, _ = simulated()
  items = [item("long", [1] * 90, 3), item("good", [1, 2], 3), item("foreign", [VOCAB], 3)]
  ended: list[Request | Refusal] = []
  served = serve(engine, items, np.zeros(3), ended.append)
  long, foreign, good = ended
  assert isinstance(long, Refusal) and isinstance(foreign, Refusal) and isinstance(good, Request)
  assert [(end.id, end.prompt_tokens) for end in (long, foreign)] == [("long", 90), ("foreign", 1)]
  assert "93, but only 64 tokens would fit" in long.error and "outside the vocabulary" in foreign.error
  assert (served.summary.requests, served.refused) == (1, 2)


def test_what_its_source_refuses_is_handed_out_when_it_is_due():
  engine, _ = simulated()
  items = [Refused("broken", "in.jsonl:7", "no text"), item("good", [1], 3)]
  ended: list[Request | Refusal] = []
  served = serve(engine, items, [0.0, 0.0], ended.append)
  assert ended[0] == Refusal("broken", None, "in.jsonl:7: no text")
  assert (served.refused, served.summary.requests) == (1, 1)


def test_rows_by_hand():
  engine, _ = simulated()
  ended: list[Request | Refusal] = []
  serve(engine, [item("a", [1, 2], 2), item("b", [], 3)], [0.0, 0.0], ended.append)
  refused, a = (row(end, start=90.0) for end in ended)
  assert json.loads(json.dumps(a)) == a
  assert a == {
    "request_id": "a",
    "prompt_tokens": 2,
    "cached_tokens": 0,
    "output_token_ids": continuation([1, 2], 2),
    "finish_reason": "length",
    "arrival_s": 10,
    "scheduled_s": 10,
    "first_token_s": 11,
    "token_s": [11, 12],
    "finish_s": 12,
  }
  assert refused == {
    "request_id": "b",
    "prompt_tokens": 0,
    "output_token_ids": [],
    "finish_reason": "refused",
    "error": "request 'b': the prompt is empty, at least one token is needed",
  }


def test_all_refused():
  engine, _ = simulated()
  served = serve(engine, [item("a", [], 1), item("b", [], 1)], [0.0, 5.0], lambda end: None)
  assert (served.refused, served.summary.requests, served.summary.hbm_hit_rate, served.elapsed_s) == (2, 0, None, 5)


def test_errors_are_counted():
  engine, executor = simulated()
  executor.not_finite.add("bad")
  ended: list[Request | Refusal] = []
  served = serve(engine, [item("bad", [1], 2), item("good", [2], 2)], [0.0, 0.0], ended.append)
  assert (served.failed, served.summary.requests) == (1, 1)
  assert "not finite" in row(ended[0], 0.0)["error"] and row(ended[0], 0.0)["finish_reason"] == "error"


def test_a_device_that_fails_for_good():
  """What it held is handed out with the error, and the run ends with it when nothing more can be added."""
  engine, executor = simulated()

  def broken(*_):
    raise OSError("device gone")

  executor.execute = executor.reset = broken
  ended: list[Request | Refusal] = []
  with pytest.raises(RuntimeError, match="device gone"):
    serve(engine, [item("a", [1], 2), item("b", [2], 2)], [0.0, 9.0], ended.append)
  assert [row(end, 0.0)["finish_reason"] for end in ended] == ["error"]


def test_an_item_says_how_it_is_drawn():
  prompt = np.array([3, 4, 5], np.int32)
  stop = continuation(prompt.tolist(), 3)[2]
  engine, _ = simulated(FakeModel(eos_token_ids=(stop,)))
  items = [Item(str(i), prompt, 5, options) for i, options in enumerate([{}, {"ignore_eos": False}])]
  ended: list[Request] = []
  serve(engine, items, np.zeros(2), ended.append, ignore_eos=True)
  reasons = {request.id: request.finish_reason for request in ended}
  assert reasons == {"0": "length", "1": "stop"}


def test_an_interruption_cancels_what_lives():
  """What was handed out stays; what lives ends, and is not handed out."""
  engine, _ = simulated()
  step, steps, waited = engine.step, itertools.count(), []
  engine.wait = lambda: waited.append(True)

  def interrupted():
    if next(steps) == 5:
      raise KeyboardInterrupt
    return step()

  engine.step = interrupted
  ended: list[Request] = []
  with pytest.raises(KeyboardInterrupt):
    serve(engine, [item("short", [1], 2), item("long", [2], 30)], [0.0, 0.0], ended.append)
  assert [request.id for request in ended] == ["short"] and waited
  (left,) = step()
  assert (left.id, left.finish_reason) == ("long", "cancelled")


def test_an_interruption_within_an_iteration():
  """Nothing can be cancelled then, and that is not what is told."""
  engine, executor = simulated()

  def interrupted(plan):
    raise KeyboardInterrupt

  executor.submit = interrupted
  with pytest.raises(KeyboardInterrupt):
    serve(engine, [item("a", [1], 2)], [0.0], lambda end: None)
  assert engine.failed


@pytest.mark.parametrize(
  ("arrivals", "message"),
  [([0.0], "2 items need as many"), ([1.0, 0.5], "ascend"), ([0.0, float("inf")], "finite")],
)
def test_arrivals_are_checked(arrivals, message):
  engine, executor = simulated()
  with pytest.raises(ValueError, match=message):
    serve(engine, [item("a", [1], 2), item("b", [1], 2)], arrivals, lambda end: None)
  assert not executor.plans


def test_wall_time():
  clock = Wall()
  engine = Engine(fake_executor(), clock=clock)
  ended: list[Request] = []
  served = serve(engine, [item(str(i), [i], 4) for i in range(3)], [0.0, 0.02, 0.04], ended.append)
  assert 0.04 <= served.elapsed_s < 5 and len(ended) == 3
