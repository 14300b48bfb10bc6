"""What GET /status tells: shapes, bounds, and every way to end. Over a device that is computed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server import status
from sparse_serve_jax.server.engines import One
from sparse_serve_jax.server.outputs import Output, Outputs
from sparse_serve_jax.server.status import Live, Moment, Sample, Sums, Told
from sparse_serve_jax.serving.metrics import Held
from tests.fake_engine import SHAPE, FakeModel, S, fake_engine

ROOT = Path(__file__).resolve().parent.parent
LIVE = {"waiting", "prefilling", "decoding"}
PROMPT = [(7 * i) % 60 + 30 for i in range(20)]


class Served:
  """Status and what it reads, within an event loop."""

  def __init__(self):
    self.engine, self.executor = fake_engine()
    self.one = One(self.engine, FakeModel())  # type: ignore[arg-type]  # which scores no prompts
    self.outputs = Outputs(self.one, ByteTokenizer())

  def add(self, n: int = 1, prompt: list[int] = PROMPT, max_tokens: int = 4) -> list[Output]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [self.outputs.add(i, prompt, params, asyncio.Queue()) for i in range(n)]

  def body(self) -> dict[str, Any]:
    return status.body(self.one.told())

  @contextlib.asynccontextmanager
  async def held_up(self) -> AsyncIterator[None]:
    """The engine stands still meanwhile."""
    begun, go = threading.Event(), threading.Event()
    standing = self.one._loop.call(lambda: (begun.set(), go.wait()))
    await asyncio.to_thread(begun.wait)
    try:
      yield
    finally:
      go.set()
      await asyncio.wrap_future(standing)

  async def ended(self) -> None:
    async with asyncio.timeout(30):
      while self.outputs._of:
        await asyncio.sleep(0.001)


def served(test):
  """The test runs in an event loop, with a `Served`."""

  def run():
    async def main():
      of = Served()
      try:
        await test(of)
      finally:
        await asyncio.to_thread(of.one.close)

    asyncio.run(main())

  run.__name__ = test.__name__
  return run


@served
async def test_a_request_from_its_arrival_to_its_end(of: Served):
  assert of.body()["requests"] == []
  async with of.held_up():
    (output,) = of.add()
    (row,) = of.body()["requests"]
    assert (row["id"], row["state"], row["prompt_tokens"], row["output_tokens"]) == (None, "waiting", 20, 0)
    assert row["times"][1:] == [None] * 3 and of.body()["live"] == {"waiting": 1, "prefilling": 0, "decoding": 0}
  await of.ended()
  body = of.body()
  (row,) = body["requests"]
  assert (row["id"], row["state"], row["output_tokens"], row["pool_blocks"]) == ("request-0", "length", 4, 0)
  request = output.stream.request
  assert row["times"] == [
    output.stream.arrival_time,
    request.scheduled_time,
    request.first_token_time,
    request.finish_time,
  ]
  assert row["times"] == sorted(row["times"]) and row["times"][-1] <= body["now"]
  assert body["live"] == dict.fromkeys(body["live"], 0) and body["held"]["owned"] == 0


@served
async def test_states_and_blocks_of_those_that_run(of: Served):
  """Six lanes of ten: a state for each, and the pool blocks that it holds."""
  seen = []

  def look(stream, token):
    of.one.sample()
    seen.append(of.body())

  sink, of.outputs._sink = of.outputs._sink, lambda stream, token: (look(stream, token), sink(stream, token))
  of.add(10, max_tokens=12)
  await of.ended()
  most = max(seen, key=lambda body: body["live"]["decoding"])
  assert most["live"]["decoding"] >= 2
  for body in seen:
    assert sum(body["live"].values()) <= 10 and {row["state"] for row in body["requests"]} <= LIVE | {
      "length",
      "finished",
    }
    held = [row["pool_blocks"] for row in body["requests"]]
    assert set(held) <= {0, (20 + 12) // S} and sum(held) <= SHAPE.M and body["held"]["owned"] <= SHAPE.M
    assert body["held"]["dram_kv_bytes"] == body["held"]["owned"] * body["size"]["pool_block_bytes"]
  after = of.body()
  assert after["since_start"]["output_tokens"] == 120 and after["held"]["owned"] == 0
  assert sum(tokens > 0 for tokens in after["samples"]["output_tokens_s"]) > 1
  assert {*after["samples"]["batch"]} > {None} and after["since_start"]["hit_rate"] == 0.75


@served
async def test_each_way_to_end(of: Served):
  async with of.held_up():
    of.executor.not_finite.add("request-0")
    of.add()
    (gone,) = of.add()
    of.outputs.leave(gone)
    of.add(prompt=[10**6])
    of.add(prompt=PROMPT * 10)
    of.add()
  await of.ended()
  rows = of.body()["requests"]
  assert sorted(row["state"] for row in rows) == ["cancelled", "error", "length", "refused", "refused"]
  for row in rows:
    assert row["times"][0] <= row["times"][3]
    assert row["id"] is None if row["state"] == "refused" else row["id"]
  assert {row["prompt_tokens"] for row in rows if row["state"] == "refused"} == {1, 200}


@served
async def test_an_engine_that_has_failed(of: Served):
  def fail():
    raise KeyboardInterrupt  # an Exception would only fail the device

  async with of.held_up():
    of.add(2)
    of.executor.submit = lambda plan: fail()
  await of.ended()
  body = of.body()
  assert [row["state"] for row in body["requests"]] == ["error", "error"] and of.one.failed
  assert all(row["times"][3] is not None for row in body["requests"])


@served
async def test_it_stays_small(of: Served):
  """However many requests there were: so many rows and samples, and no text or token of any."""
  for _ in range(status.SAMPLES + 20):
    of.one.sample()
  of.add(3 * status.ROWS)
  await of.ended()
  async with of.held_up():
    of.add(status.ROWS + 5)
    of.one.sample()
    body = of.body()
    ended, live = body["requests"][: status.ROWS], body["requests"][status.ROWS :]
    assert {row["state"] for row in ended} == {"length"} and {row["state"] for row in live} == {"waiting"}
    assert (len(live), body["not_listed"], body["live"]["waiting"]) == (status.ROWS, 5, status.ROWS + 5)
    samples = body["samples"]
    assert list(samples) == list(Sample._fields) and {len(column) for column in samples.values()} == {status.SAMPLES}
    assert samples["at"] == sorted(samples["at"]) and samples["waiting"][-1] == status.ROWS + 5
    text = json.dumps(body, allow_nan=False)
    assert len(text) < 64_000 and ", ".join(map(str, PROMPT[:3])) not in text
  await of.ended()


@served
async def test_no_sample_without_time(of: Served):
  """Two in a tick of the clock are one."""
  of.engine.clock.now = lambda: 5.0
  of.one.sample()
  n = len(of.body()["samples"]["at"])
  of.one.sample()
  assert len(of.body()["samples"]["at"]) == n


def test_engines_are_added_up():
  """Two, one of which is younger, on a host whose clock is 1,000 s ahead."""
  held, size = Held(owned=3, kept=1, slots=4, hbm_kv_bytes=100, dram_kv_bytes=50), {"lanes": 2, "block_bytes": 10}
  size |= {"block_tokens": 8, "pool_block_bytes": 40, "max_request_tokens": 64}

  def told(now: float, n: int, attended: float, missed: float, steps: float) -> Told:
    """With `n` samples, a second apart, of which the last was half a second ago."""
    sums = Sums(5, 100, 200, attended, missed, 7, 8, decode_rows=6, decode_steps=steps)
    moments = [Moment(now - 0.5 - i, sums, held, Live(1, 0, 2)) for i in reversed(range(n))]
    of = {"id": "request-0", "times": [now - 2, now - 1, None, None]}
    return Told(now, n, size, held, Live(1, 0, 2), 3, sums, (100, 50), {"length": n}, moments, [of], [of])

  of = status.body({0: told(50.0, 3, 90, 30, 2), 2: told(1050.0, 2, 10, 0, 0)})
  samples = of["samples"]
  assert samples["at"] == [47.5, 48.5, 49.5] and samples["decode"] == [2, 4, 4] and samples["slots"] == [4, 8, 8]
  assert samples["output_tokens_s"] == [100, 200, 200] and samples["loaded_bytes_s"] == [70, 140, 140]
  assert samples["hit_rate"] == [0.6667, 0.7, 0.7] and samples["batch"] == [3, 6, 6]
  assert of["since_start"]["hit_rate"] == 0.7 and of["since_start"]["iterations"] == 10
  assert of["since_start"]["hbm_peak_bytes"] == 200
  assert of["size"] == size | {"lanes": 4} and of["held"]["owned"] == 6 and of["not_listed"] == 6
  assert of["live"] == {"waiting": 2, "prefilling": 0, "decoding": 4} and of["ended"] == {"length": 5}
  assert [row["replica"] for row in of["requests"]] == [0, 2, 0, 2]
  assert {tuple(row["times"]) for row in of["requests"]} == {(48.0, 49.0, None, None)}
  assert status.body({}) == {}


def test_the_picture_of_the_documents_is_small():
  picture = (ROOT / "docs/assets/status.png").read_bytes()
  assert picture.startswith(b"\x89PNG") and len(picture) <= 150_000
