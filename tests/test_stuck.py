"""Engines that hang without dying, and clients that never read: over a device that is computed by hand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import monitoring

from sparse_serve_jax.buckets import MOST_PROGRAMS
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server import app, pulse, replicas, serve
from sparse_serve_jax.server.engines import One
from sparse_serve_jax.server.limits import Limits
from sparse_serve_jax.server.pulse import Health, Pulse, ReplicaHealth
from sparse_serve_jax.serving.engine import Engine
from tests.fake_engine import continuation, fake_executor
from tests.fake_fleet import Model, Standing, fleet, serving
from tests.fake_ray import until

PROMPT = [(7 * i) % 60 + 30 for i in range(20)]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
BODY = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "seed": 0}
STUCK = 0.2


def ignored(*_: object) -> None:
  pass


def one(stuck_s: float = STUCK) -> tuple[One, Standing]:
  executor = fake_executor()
  device = Standing(executor)
  return One(Engine(executor), Model(), stuck_s), device  # type: ignore[arg-type]


def test_one_that_stands_still_says_so_and_goes_on_when_it_can():
  of, device = one()
  try:
    device.goes.clear()
    stream = of.submit(PROMPT, sink=ignored, params=PARAMS)
    assert device.stands.wait(20) and of.health() == Health("ok")
    until(lambda: of.health().status == "stuck")
    time.sleep(1.1)
    assert of.health() == Health("stuck", 1)
    for call in (lambda: of.submit(PROMPT, sink=ignored, params=PARAMS), lambda: of.score(PROMPT, 0)):
      with pytest.raises(RuntimeError, match=r"the engine has not gone on for \d s"):
        call()
    device.goes.set()
    assert stream.result(20).output_tokens == continuation(PROMPT, 5)
    until(lambda: of.health() == Health("ok"))
    time.sleep(2 * STUCK)
    assert of.health() == Health("ok"), "it has nothing to do"
  finally:
    device.goes.set()
    of.close()


def test_calls_are_progress():
  """Each is short, and there is never nothing to do."""
  of, _ = one()
  try:
    calls = [of._loop.call(lambda: time.sleep(STUCK / 4)) for _ in range(12)]
    while not calls[-1].done():
      assert of.health() == Health("ok")
      time.sleep(0.005)
  finally:
    of.close()


def test_an_engine_that_plans_nothing_for_ever_is_stuck():
  of, _ = one()
  engine = of._loop._engine
  try:
    engine.step = lambda: time.sleep(0.001) or []  # type: ignore[method-assign]
    of.submit(PROMPT, sink=ignored, params=PARAMS)
    until(lambda: of.health().status == "stuck")
  finally:
    del engine.step
    of.close()


def test_compilation_is_no_hang_unless_it_takes_ten_times_as_long():
  """JAX tells when one begins and ends; here it goes on until it is let."""
  executor = fake_executor()
  of, go, begun = One(Engine(executor), Model(), STUCK), threading.Event(), threading.Event()  # type: ignore[arg-type]
  execute, after = executor.execute, list[Health]()

  def compiling(plan):
    executor.execute = execute
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    after.append(of.health())
    return execute(plan)

  def begins(event, *_, **__):
    if event == pulse.COMPILES:
      begun.set()
      go.wait()

  executor.execute = compiling
  monitoring.register_scalar_listener(begins)
  try:
    stream = of.submit(PROMPT, sink=ignored, params=PARAMS)
    assert begun.wait(20)
    time.sleep(3 * STUCK)
    assert of.health() == Health("ok")
    until(lambda: of.health().status == "stuck")
    assert of.health().seconds >= pulse.COMPILING * STUCK - 0.5
    go.set()
    assert stream.result(20).output_tokens == continuation(PROMPT, 5)
    assert after == [Health("ok")], "what is compiled counts as an iteration"
  finally:
    go.set()
    monitoring.unregister_scalar_listener(begins)
    of.close()


def test_of_programs_that_are_compiled_at_a_time_one_that_ends_ends_no_other():
  """Events of JAX, as threads that compile cause them."""
  of = Pulse(SimpleNamespace(still_since=time.monotonic()), STUCK)  # type: ignore[arg-type]
  try:
    monitoring.record_event_duration_secs(pulse.COMPILES, 0.0)  # of one that began before
    for _ in range(2):
      monitoring.record_scalar(pulse.COMPILES, 0.0)
    monitoring.record_event_duration_secs(pulse.COMPILES, 0.0)
    time.sleep(3 * STUCK)
    assert of.still() is None
    monitoring.record_event_duration_secs(pulse.COMPILES, 0.0)
    until(lambda: of.still() is not None, pulse.COMPILING * STUCK / 2)
  finally:
    of.close()


def test_requests_of_a_stuck_engine_are_given_up(monkeypatch):
  monkeypatch.setattr(app, "SAMPLE_S", 0.02)
  of, device = one()

  async def run():
    async with serving(of) as http:
      whole = (await http.post("/v1/completions", json=BODY)).json()
      device.goes.clear()
      streamed = asyncio.create_task(http.post("/v1/completions", json=BODY | {"stream": True}))
      await asyncio.to_thread(device.stands.wait)
      scored = asyncio.create_task(http.post("/v1/completions", json=BODY | {"echo": True, "logprobs": 0}))
      for answer in (await http.post("/v1/completions", json=BODY), await streamed, await scored):
        assert answer.status_code == 500 and "the engine has not gone on for 0 s" in answer.json()["error"]["message"]
      health = await http.get("/health")
      assert health.status_code == 503 and health.json() == {"status": "stuck", "seconds": 0}
      assert (await http.get("/status")).json()["state"] == "stuck"
      refused = await http.post("/v1/completions", json=BODY)
      assert refused.status_code == 503 and "has not gone on" in refused.json()["error"]["message"]
      device.goes.set()
      while (await http.get("/health")).status_code != 200:
        await asyncio.sleep(0.01)
      again = (await http.post("/v1/completions", json=BODY)).json()
      assert again["choices"] == whole["choices"]
      told = (await http.get("/status")).json()
      assert told["ended"] == {"length": 2, "cancelled": 3}

  asyncio.run(run())


def test_a_stuck_engine_does_not_keep_the_process(monkeypatch):
  ended = list[int]()
  of, device = one()
  monkeypatch.setattr(serve, "_LAST", 0)
  monkeypatch.setattr(serve, "_CLOSED", 0.1)
  monkeypatch.setattr(serve.os, "_exit", ended.append)

  async def run():
    async with serving(of, signals=False) as http:
      device.goes.clear()
      asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
      await asyncio.to_thread(device.stands.wait)
      while (await http.get("/health")).status_code == 200:
        await asyncio.sleep(0.01)
      os.kill(os.getpid(), signal.SIGTERM)
      assert (await asking).status_code in (500, 503)

  try:
    asyncio.run(run())
  finally:
    device.goes.set()
    until(lambda: not of._loop._thread.is_alive())
  assert ended == [1]


@pytest.mark.parametrize("reads", [True, False])
def test_a_drain_ends(monkeypatch, reads):
  """A client that reads is told that its answer is cut off; the connection of one that does not is closed."""
  monkeypatch.setattr(serve, "_LAST", 0.2)
  of, device = one(20)

  async def run() -> bytes:
    events, rest = asyncio.get_running_loop(), list[bytes]()
    with socket.socket() as connection:  # open until the server has ended
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      connection.setblocking(False)
      async with serving(of, Limits(drain_seconds=0.3), signals=False) as http:
        await events.sock_connect(connection, (http.base_url.host, http.base_url.port))
        body = json.dumps(BODY | {"stream": True, "n": 64, "max_tokens": 40})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        await events.sock_sendall(connection, (head + body).encode())
        rest.append(await events.sock_recv(connection, 100))
        if reads:
          device.goes.clear()
          threading.Timer(1, device.goes.set).start()
        else:
          await asyncio.sleep(0.5)  # all is made, and more than the system takes
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        while reads and (got := await events.sock_recv(connection, 65536)):
          rest.append(got)
      assert 0.3 <= time.monotonic() - began < 5
    return b"".join(rest)

  answer = asyncio.run(run())
  if reads:
    assert b"the server ends, and this request is given up" in answer and b"[DONE]" in answer


@pytest.mark.parametrize("how", ["its engine", "the actor"])
def test_a_replica_that_hangs_is_taken_out_and_started_anew(monkeypatch, how):
  with fleet(monkeypatch, 2, STUCK) as (of, ray, devices):
    first = [of.submit([40 + i] * 20, sink=ignored, params=PARAMS) for i in range(2)]
    assert [stream.result(20).output_tokens for stream in first] == [continuation([40 + i] * 20, 5) for i in range(2)]
    if how == "its engine":
      engine = ray.actors[0].of._one._loop._engine
      next(device for device in devices if device.executor is engine.executor).goes.clear()
    else:
      ray.actors[0].stop()
    lost, good = (of.submit([40 + i] * 20, sink=ignored, params=PARAMS) for i in range(2))
    assert good.result(20).output_tokens == continuation([41] * 20, 5)
    why = "the engine has not gone on for 0 s" if how == "its engine" else "it has not answered for 0 s"
    with pytest.raises(RuntimeError, match=f"replica 0: {why}, and what it had to answer is lost"):
      lost.result(20)
    until(lambda: of.health().replicas["0"] == ReplicaHealth("ok", 0, 1))
    assert ray.actors[0].dead.is_set() and len(ray.actors) == 3 and ray.ended == [id(ray.actors[0].of)]
    again = of.submit([40] * 20, sink=ignored, params=PARAMS)
    assert again.result(20).output_tokens == continuation([40] * 20, 5)


def test_a_sink_that_raises_ends_its_own_stream_alone(monkeypatch):
  """As `Loop`'s do. The thread that hands out what a replica tells goes on."""

  def sink(stream, token):
    raise OSError("nobody takes it")

  with fleet(monkeypatch, 1, 20) as (of, ray, _):
    bad, good = (of.submit([40 + i] * 20, sink=[sink, ignored][i], params=PARAMS) for i in range(2))
    assert good.result(20).output_tokens == continuation([41] * 20, 5)
    with pytest.raises(RuntimeError, match="the request has failed: .*nobody takes it"):
      bad.result(20)
    again = of.submit([40] * 20, sink=ignored, params=PARAMS)
    assert again.result(20).output_tokens == continuation([40] * 20, 5)
    assert of.health().replicas["0"] == ReplicaHealth("ok", 0, 0) and len(ray.actors) == 1


def test_no_stream_is_left_when_replicas_are_closed(monkeypatch):
  for _ in range(3):  # which of them were told before the thread ended is chance
    with fleet(monkeypatch, 1, 20) as (of, _, (device,)):
      device.goes.clear()
      streams = [of.submit([40 + i] * 20, sink=ignored, params=PARAMS) for i in range(8)]
      assert device.stands.wait(20)
      threading.Timer(0.3, device.goes.set).start()
      of.close()
      assert all(stream.ended for stream in streams) and not any(place.live for place in of._places)


def test_a_start_that_compiles_may_take_longer(monkeypatch):
  """As long as a program may, for each of them. The one that takes the place of another compiles too."""
  waited = list[float | None]()
  with fleet(monkeypatch, 1, 20, compiled=True) as (of, ray, devices):
    get = of._get
    monkeypatch.setattr(of, "_get", lambda ref, timeout=None: (waited.append(timeout), get(ref, timeout))[1])
    ray.actors[0].die()
    until(lambda: of.health().replicas["0"] == ReplicaHealth("ok", 0, 1))
    assert [device.compiled.is_set() for device in devices] == [True, True]
  assert pulse.COMPILING * 20 * MOST_PROGRAMS in waited


def test_a_replica_that_does_not_answer_gets_no_new_requests_while_another_does(monkeypatch):
  monkeypatch.setattr(replicas, "_LOOK", 0.2)
  with fleet(monkeypatch, 2, 20) as (of, ray, _):

    def live_after(prompt: list[int], n: int) -> list[int]:
      """Outputs of each replica once it has had `n` more."""
      for _ in range(n):
        of.submit(prompt, sink=ignored, params=PARAMS)
      return [one.live for one in of.health().replicas.values()]

    known = of.submit([40] * 20, sink=ignored, params=PARAMS)
    assert known.result(20).output_tokens == continuation([40] * 20, 5)
    ray.actors[0].stop()
    assert live_after([40] * 20, 1) == [1, 0], "it was there a moment ago"
    time.sleep(1.2 * replicas._SILENT * replicas._LOOK)
    held = of.submit([40] * 20, sink=ignored, params=PARAMS)
    assert held.result(20).output_tokens == continuation([40] * 20, 5)
    ray.actors[1].stop()
    time.sleep(1.2 * replicas._SILENT * replicas._LOOK)
    assert sum(live_after([50] * 20, 2)) == 3, "none answers: all may get some"
    for actor in ray.actors:
      actor.go_on()
    until(lambda: not any(one.live for one in of.health().replicas.values()))
    assert [one.restarts for one in of.health().replicas.values()] == [0, 0]
