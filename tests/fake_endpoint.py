"""A server that answers as it is told: HTTP and server-sent events by hand, on a port of this machine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n"
MODELS = {"object": "list", "data": [{"id": "fake", "owned_by": "tests", "max_model_len": 4096}]}
Step = float | bytes | None  # seconds to wait, bytes to send, or None: cut the connection


def event(value: Any) -> bytes:
  return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
  return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(prompt: int, output: int, **more: Any) -> bytes:
  return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, **more}})


DONE = b"data: [DONE]\n\n"


def response(status: str, body: str, kind: str = "application/json") -> bytes:
  return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}".encode()


@dataclasses.dataclass
class Seen:
  """A request that came."""

  path: str
  headers: dict[str, str]
  body: dict[str, Any]
  at: float  # `time.monotonic` when it had come
  sent: list[float] = dataclasses.field(default_factory=list)  # when each of its bytes-steps was sent


class FakeEndpoint:
  """`with FakeEndpoint(script) as server: ...`: what `script` gives for a request's number, from 0, and what came, is
  its answer. It lists MODELS, and has no /metrics unless they are given."""

  def __init__(
    self, script: Callable[[int, Seen], Iterable[Step]], models: bytes | None = None, metrics: list[bytes] | None = None
  ):
    self._script = script
    self._models = models or response("200 OK", json.dumps(MODELS))
    self._metrics = list(metrics or ())
    self.seen: list[Seen] = []
    self.live = self.most_live = 0
    self._ready = threading.Event()
    self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

  def __enter__(self) -> FakeEndpoint:
    self._thread.start()
    assert self._ready.wait(10)
    return self

  def __exit__(self, *_: object) -> None:
    self._loop.call_soon_threadsafe(self._over.set)
    self._thread.join()

  async def _run(self) -> None:
    self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
    server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    self._ready.set()
    await self._over.wait()
    server.close()

  async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      head = (await reader.readuntil(b"\r\n\r\n")).decode()
      first, *lines = head.strip().split("\r\n")
      headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines)}
      body = await reader.readexactly(int(headers.get("content-length", 0)))
      path = first.split()[1]
      if path in ("/v1/models", "/metrics"):
        none = response("404 Not Found", "")
        writer.write(self._models if path == "/v1/models" else self._metrics.pop(0) if self._metrics else none)
        return await writer.drain()
      seen = Seen(path, headers, json.loads(body), time.monotonic())
      self.seen.append(seen)
      self.live += 1
      self.most_live = max(self.most_live, self.live)
      try:
        await self._act(seen, self._script(len(self.seen) - 1, seen), writer)
      finally:
        self.live -= 1
    except (ConnectionError, asyncio.IncompleteReadError):
      pass
    finally:
      writer.close()

  async def _act(self, seen: Seen, steps: Iterable[Step], writer: asyncio.StreamWriter) -> None:
    for step in steps:
      if step is None:
        return writer.transport.abort()
      if isinstance(step, float):
        await asyncio.sleep(step)
      else:
        seen.sent.append(time.monotonic())
        writer.write(step)
        await writer.drain()
