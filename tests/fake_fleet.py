"""Servers over devices that are computed by hand: one engine, or replicas in threads of this process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from sparse_serve_jax import runtime
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.server import engines, replicas, serve
from sparse_serve_jax.server.engines import Engines
from sparse_serve_jax.server.limits import Limits
from tests.fake_engine import FakeExecutor, FakeModel, fake_executor
from tests.fake_ray import Ray


@dataclasses.dataclass(frozen=True)
class Model(FakeModel):
  tokenizer: ByteTokenizer = dataclasses.field(default_factory=ByteTokenizer)


class Standing:
  """A device that stands still while it is told to."""

  def __init__(self, executor: FakeExecutor):
    self.executor = executor
    self.goes, self.stands, execute = threading.Event(), threading.Event(), executor.execute
    self.goes.set()
    self.compiled = threading.Event()

    def call(plan: Any) -> Any:
      if not self.goes.is_set():
        self.stands.set()
        self.goes.wait()
        self.stands.clear()
      return execute(plan)

    executor.execute = call  # type: ignore[method-assign]


@contextlib.contextmanager
def fleet(
  monkeypatch: Any, n: int, stuck_s: float, compiled: bool = False
) -> Iterator[tuple[replicas.Fleet, Ray, list[Standing]]]:
  """Replicas, their Ray, and the devices of all that were ever started."""
  ray, devices = Ray(), list[Standing]()

  def executor(*_: object) -> FakeExecutor:
    made = fake_executor()
    devices.append(device := Standing(made))
    made.compile = lambda *_, **__: device.compiled.set() or 1  # type: ignore[attr-defined, func-returns-value]
    return made

  monkeypatch.setattr(replicas.cluster, "connect", lambda: ray)
  monkeypatch.setattr(replicas, "load_model_here", lambda *_, **__: Model())
  monkeypatch.setattr(engines, "JaxExecutor", executor)
  monkeypatch.setattr(replicas.Replica, "where", lambda of: ("here", id(of)))
  monkeypatch.setattr(replicas.cluster, "end_process", lambda _, node, process: ray.ended.append(process))
  monkeypatch.setattr(replicas, "_PAUSE", 0.01)
  monkeypatch.setattr(runtime, "configure", lambda: None)
  made = replicas.Fleet(n, fake_executor().config, "", None, stuck_s, compiled=compiled)
  try:
    yield made, ray, devices
  finally:
    for device in devices:
      device.goes.set()
    made.close()


@contextlib.asynccontextmanager
async def serving(
  engines: Engines,
  limits: Limits | None = None,
  signals: bool = True,
  model: Any = None,
  served: str = "fake",
  host: str = "127.0.0.1",
  key: str | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
  """A client of a server, as `serve.serve` runs it. It has ended afterwards, by a signal unless the test sends one."""
  listener = serve.bind((host, 0))
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that few bytes that nobody reads are kept
  of: Any = engines, model or Model(), served, limits or Limits(), key
  task = asyncio.create_task(serve._serve(listener, *of))
  url = f"http://127.0.0.1:{listener.getsockname()[1]}"
  headers = {"authorization": f"Bearer {key}"} if key else {}
  async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
    while not await _answers(http):
      await asyncio.sleep(0.01)
    yield http
  if signals:
    os.kill(os.getpid(), signal.SIGTERM)
  async with asyncio.timeout(20):
    await task


async def _answers(http: httpx.AsyncClient) -> bool:
  with contextlib.suppress(httpx.TransportError):
    return (await http.get("/version")).status_code == 200
  return False
