"""The picture of a run, in simulated time: an iteration takes a second of it, its dispatch a tenth."""

from __future__ import annotations

import itertools
import json
import numbers

import pytest

from sparse_serve_jax.config import SchedulerConfig
from sparse_serve_jax.serving import timeline
from sparse_serve_jax.serving.clock import Virtual
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.timeline import DEVICE, DISPATCH, ENGINE, REQUESTS, Timeline
from tests.fake_engine import SHAPE, S, continuation, fake_executor


class Passing(Virtual):
  """A time of which a millisecond passes whenever somebody asks."""

  def now(self) -> float:
    self.sleep_until(super().now() + 0.001)
    return super().now()


def watched(clock: Virtual | None = None, **sizes) -> tuple[Engine, Timeline]:
  """An engine that is watched, and its timeline."""
  executor, clock = fake_executor(**sizes), clock or Virtual(50.0)
  execute, submit = executor.execute, executor.submit

  def taking_a_second(plan):
    clock.sleep_until(clock.now() + 1)
    return execute(plan)

  def taking_a_tenth(plan):
    clock.sleep_until(clock.now() + 0.1)
    return submit(plan)

  executor.execute, executor.submit = taking_a_second, taking_a_tenth
  line = Timeline(executor.shape)
  return Engine(executor, clock=clock, observer=line.observe), line


def slices(trace: dict, pid: int, tid: int) -> list[tuple[str, float, float]]:
  """Name, start and end in seconds."""
  found = [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, tid)]
  return [(e["name"], round(e["ts"] / 1e6, 6), round((e["ts"] + e["dur"]) / 1e6, 6)) for e in found]


def counts(trace: dict) -> dict[str, list[int]]:
  """Values of every counter, in order."""
  found: dict[str, list[int]] = {}
  for event in trace["traceEvents"]:
    if event["ph"] == "C":
      found.setdefault(event["name"], []).append(event["args"]["value"])
  return found


def check_form(trace: dict) -> None:
  """The rules of the format that viewers depend on."""
  assert set(trace) == {"displayTimeUnit", "traceEvents"} and trace["displayTimeUnit"] in ("ms", "ns")
  for event in trace["traceEvents"]:
    assert isinstance(event["name"], str) and event["name"]
    assert event["ph"] in ("X", "C", "M") and isinstance(event["pid"], int)
    if event["ph"] == "X":
      assert isinstance(event["tid"], int) and event["ts"] >= 0 and event["dur"] >= 0
    elif event["ph"] == "C":
      assert event["ts"] >= 0 and event["args"]
      assert all(isinstance(value, numbers.Real) for value in event["args"].values())
    else:
      assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
  named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
  assert {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"} <= named
  for pid, tid in named:
    lane = slices(trace, pid, tid)
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(lane)), lane  # slices of a line do not overlap


def test_iterations_by_hand():
  """The second is dispatched while the first runs, and begins when that is done."""
  engine, line = watched()
  line.add(engine.add_request([1, 2], 3, request_id="a"))
  engine.run()
  trace = line.to_dict()
  check_form(trace)
  assert slices(trace, ENGINE, DISPATCH)[:3] == [
    ("dispatch 1", 0, 0.1),
    ("dispatch 2", 0.1, 0.2),
    ("dispatch 3", 1.2, 1.3),
  ]
  assert slices(trace, ENGINE, DEVICE)[:3] == [
    ("iteration 1", 0.1, 1.2),
    ("iteration 2", 1.2, 2.3),
    ("iteration 3", 2.3, 3.3),
  ]
  assert slices(trace, REQUESTS, 1) == [("prefill", 0, 1.2), ("decode", 1.2, 3.3)]

  line.add(engine.add_request([1, 2], 1, request_id="later"))  # the device was idle before
  engine.run()
  trace = line.to_dict()
  check_form(trace)
  dispatched = slices(trace, ENGINE, DISPATCH)[-2]
  assert slices(trace, ENGINE, DEVICE)[-2][1] == dispatched[2] == dispatched[1] + 0.1

  first, second = [e["args"] for e in trace["traceEvents"] if e["name"] in ("iteration 1", "iteration 2")]
  assert (first["prefill tokens x layers"], first["decode rows"], first["blocks attended"]) == (2 * 2, 0, 0)
  assert (second["prefill tokens x layers"], second["decode rows"], second["blocks attended"]) == (0, 1, 4)


def test_a_request_that_waits():
  engine, line = watched(R=1)
  requests = [engine.add_request([i], 2, request_id=f"r{i}", arrival_time=50 + i / 2) for i in range(2)]
  engine.run()
  for request in reversed(requests):  # drawn in order of arrival
    line.add(request)
  trace = line.to_dict()
  check_form(trace)
  names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 2}
  assert names == {1: "r0", 2: "r1"}
  phases = slices(trace, REQUESTS, 2)
  assert [name for name, _, _ in phases] == ["waiting", "prefill", "decode"]
  assert phases[0][1] == 0.5 and phases[0][2] > 1 and all(a[2] == b[1] for a, b in itertools.pairwise(phases))


def test_a_request_that_pauses():
  """Slots for one working set: the younger decodes when the older has ended."""
  engine, line = watched(scheduler=SchedulerConfig(batch_control="working_set"), P=8)
  older, younger = (engine.add_request([i] * 17, 6, request_id=f"r{i}") for i in range(2))
  engine.run()
  for request in (older, younger):
    assert request.output_tokens == continuation(request.prompt.tolist(), 6)
    line.add(request)
  trace = line.to_dict()
  check_form(trace)
  assert [name for name, _, _ in slices(trace, REQUESTS, 1)] == ["prefill", "decode"]
  phases = slices(trace, REQUESTS, 2)
  assert [name for name, _, _ in phases] == ["prefill", "paused", "decode"]
  assert phases[1][2] - phases[1][1] > 3


def test_requests_cut_short():
  """Cancelled while it waits, while it decodes; ended by a stop token, with a row planned that is thrown away."""
  engine, line = watched(Passing(), R=2)
  stop = continuation([3], 3)[2]
  stopped = engine.add_request([3], 9, stop_token_ids=[stop], request_id="stopped")
  decoding = engine.add_request([4], 30, request_id="decoding")
  waiting = engine.add_request([5], 9, request_id="waiting")
  for _ in range(2):
    engine.step()
  engine.cancel("waiting")
  while not stopped.ended:
    engine.step()
  engine.step()
  engine.cancel("decoding")
  again = engine.add_request([6], 3, request_id="stopped")  # its name may be used again
  engine.run()
  for request in (stopped, decoding, waiting, again):
    line.add(request)
  trace = line.to_dict()
  check_form(trace)
  of = {line + 1: slices(trace, REQUESTS, line + 1) for line in range(4)}
  assert [[name for name, _, _ in phases] for phases in of.values()] == [
    ["waiting", "prefill", "decode"],
    ["waiting", "prefill", "decode"],
    ["waiting"],
    ["waiting", "prefill", "decode"],
  ]
  for request, phases in zip((stopped, decoding, waiting, again), of.values(), strict=True):
    assert phases[0][1] == pytest.approx(request.arrival_time - stopped.arrival_time)
    assert phases[-1][2] == pytest.approx(request.finish_time - stopped.arrival_time)


def test_counters_and_the_file(tmp_path):
  engine, line = watched()
  for i in range(3):
    line.add(engine.add_request([i], 4))
  engine.run()
  line.write(tmp_path / "timeline.json")
  trace = json.loads((tmp_path / "timeline.json").read_text())
  assert trace == line.to_dict()
  check_form(trace)
  iterations = slices(trace, ENGINE, DEVICE)
  block = 2 * S * SHAPE.D * 4  # bytes, of one layer and head
  own = 3 * SHAPE.L * SHAPE.K * block  # each request has one pool block, in all layers and heads
  # Prefill, three steps, an idle moment, and a plan that only releases. The fake loads a block a row, which then is in
  # a slot, and says that it saves one each iteration.
  assert counts(trace) == {
    "decode rows": [0, 3, 3, 3, 0, 0, 0],
    "bytes loaded": [0, 3 * block, 3 * block, 3 * block, 0, 0, 0],
    "bytes saved": [block, block, block, block, 0, block, 0],
    "bytes in HBM": [0, *[3 * block] * 6],
    "bytes in DRAM": [own, own, own, own, own, 0, 0],
  }
  moments = [*(start for _, start, _ in iterations[:4]), iterations[3][2], *iterations[4][1:]]
  for name in timeline.COUNTERS:
    assert [e["ts"] / 1e6 for e in trace["traceEvents"] if e["name"] == name] == pytest.approx(moments)


def test_counters_of_a_pool_in_hbm_and_of_an_idle_device():
  engine, line = watched(offload=False, P=0)
  engine.add_request([1, 2], 1)
  engine.run()
  engine.clock.sleep_until(80.0)
  engine.add_request([1] * 20, 2)
  engine.run()
  one, told = SHAPE.L * SHAPE.K * 2 * S * SHAPE.D * 4, counts(line.to_dict())
  assert told["bytes in DRAM"] == [0] * 9
  assert told["bytes in HBM"] == [one, one, 0, 0, 3 * one, 3 * one, 3 * one, 0, 0]  # 20 + 2 tokens are three blocks
  assert told["decode rows"] == [0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_nothing_to_show():
  check_form(Timeline(fake_executor().shape).to_dict())


def test_what_fails_is_not_drawn():
  executor = fake_executor()
  line = Timeline(executor.shape)
  engine = Engine(executor, observer=line.observe)

  def interrupted(plan):
    raise KeyboardInterrupt

  executor.execute = interrupted
  engine.add_request([1], 2)
  with pytest.raises(KeyboardInterrupt):
    engine.run()
  assert not slices(line.to_dict(), ENGINE, DEVICE)


def test_a_new_engine_begins_with_an_empty_pool():
  """Blocks that the prefix cache of the one before kept are nobody's."""
  executor, clock = fake_executor(), Virtual(50.0)
  line = Timeline(executor.shape)
  most = []
  for n in (5 * S, S):
    engine = Engine(executor, clock=clock, observer=line.observe)
    before = len(counts(line.to_dict()).get("bytes in DRAM", []))
    engine.add_request(list(range(n)), 2)
    engine.run()
    most.append(max(counts(line.to_dict())["bytes in DRAM"][before:]))
  block = SHAPE.L * SHAPE.K * SHAPE.block_bytes
  assert most == [6 * block, 2 * block]
