"""What GET /status tells: shapes, bounds, and every way to end. Over a device that is computed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator

from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server import status
from sparse_serve_jax.server.outputs import Output, Outputs
from sparse_serve_jax.server.status import Sample, Status
from sparse_serve_jax.serving.loop import Loop
from tests.fake_engine import SHAPE, S, fake_engine
from tests.test_server import ROOT

LIVE = {"waiting", "prefilling", "decoding"}
PROMPT = [(7 * i) % 60 + 30 for i in range(20)]


class Served:
  """Status and what it reads, within an event loop."""

  def __init__(self):
    self.engine, self.executor = fake_engine()
    self.loop = Loop(self.engine)
    self.outputs = Outputs(self.loop, ByteTokenizer(), lambda output: self.status.ended(output))
    self.status = Status(self.engine, self.outputs)
    self.all: list[Output] = []

  def add(self, n: int = 1, prompt: list[int] = PROMPT, max_tokens: int = 4) -> list[Output]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    self.all += (made := [self.outputs.add(i, prompt, params, asyncio.Queue()) for i in range(n)])
    return made

  @contextlib.asynccontextmanager
  async def held_up(self) -> AsyncIterator[None]:
    """The engine stands still meanwhile."""
    begun, go = threading.Event(), threading.Event()
    standing = self.loop.call(lambda: (begun.set(), go.wait()))
    await asyncio.to_thread(begun.wait)
    try:
      yield
    finally:
      go.set()
      await asyncio.wrap_future(standing)

  async def ended(self) -> None:
    async with asyncio.timeout(30):
      while not all(output.ended for output in self.all):
        await asyncio.sleep(0.001)


def served(test):
  """The test runs in an event loop, with a `Served`."""

  def run():
    async def main():
      of = Served()
      try:
        await test(of)
      finally:
        await asyncio.to_thread(of.loop.close)

    asyncio.run(main())

  run.__name__ = test.__name__
  return run


@served
async def test_a_request_from_its_arrival_to_its_end(of: Served):
  assert of.status.body()["requests"] == []
  async with of.held_up():
    (output,) = of.add()
    (row,) = of.status.body()["requests"]
    assert (row["id"], row["state"], row["prompt_tokens"], row["output_tokens"]) == (None, "waiting", 20, 0)
    assert row["times"][1:] == [None] * 3 and of.status.body()["live"] == {"waiting": 1, "prefilling": 0, "decoding": 0}
  await of.ended()
  body = of.status.body()
  (row,) = body["requests"]
  assert (row["id"], row["state"], row["output_tokens"], row["pool_blocks"]) == ("request-0", "length", 4, 0)
  request = output.stream.request
  assert row["times"] == [
    of.all[0].stream.arrival_time,
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
    of.status.sample()
    seen.append(of.status.body())

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
  after = of.status.body()
  assert after["since_start"]["output_tokens"] == 120 and after["held"]["owned"] == 0
  assert sum(sample.output_tokens_s > 0 for sample in of.status._samples) > 1
  assert {sample.batch for sample in of.status._samples} > {None} and after["since_start"]["hit_rate"] == 0.75


@served
async def test_each_way_to_end(of: Served):
  async with of.held_up():
    of.executor.not_finite.add("request-0")
    of.add()
    (gone,) = of.add()
    of.outputs.cancel(gone)
    of.add(prompt=[10**6])
    of.add(prompt=PROMPT * 10)
    of.add()
  await of.ended()
  rows = of.status.body()["requests"]
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
  body = of.status.body()
  assert [row["state"] for row in body["requests"]] == ["error", "error"] and of.loop.failed
  assert all(row["times"][3] is not None for row in body["requests"])


@served
async def test_it_stays_small(of: Served):
  """However many requests there were: so many rows and samples, and no text or token of any."""
  for _ in range(status.SAMPLES + 20):
    of.status.sample()
  of.add(3 * status.ROWS)
  await of.ended()
  async with of.held_up():
    of.add(status.ROWS + 5)
    of.status.sample()
    body = of.status.body()
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
  of.status.sample()
  n = len(of.status._samples)
  of.status.sample()
  assert len(of.status._samples) == n


def test_the_picture_of_the_documents_is_small():
  picture = (ROOT / "docs/assets/status.png").read_bytes()
  assert picture.startswith(b"\x89PNG") and len(picture) <= 150_000
