"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import pathlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sparse_serve_jax.models import Model
from sparse_serve_jax.server import asked
from sparse_serve_jax.server.answers import Answer
from sparse_serve_jax.server.engines import Engines
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.server.limits import Limits
from sparse_serve_jax.server.measures import by_label
from sparse_serve_jax.server.outputs import Outputs
from sparse_serve_jax.server.pulse import Health
from sparse_serve_jax.server.status import SAMPLE_S, body

_LOG = logging.getLogger(__name__)
_ENCODERS = 2  # threads that encode prompts
_PAGE = pathlib.Path(__file__).with_name("page.html").read_bytes()
_PAGE_HEADERS = {
  "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
  "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
}


class Server:
  """What the endpoints share. Made within the event loop."""

  def __init__(self, engines: Engines, model: Model, served: str, limits: Limits, api_key: str | None):
    self.engines, self.model, self.served, self.limits, self._key = engines, model, served, limits, api_key
    self.max_request_tokens = engines.max_request_tokens
    self.registry = CollectorRegistry()
    of = {"namespace": "sparse_serve", "registry": self.registry}
    self.refused = Counter("refused", "Requests that were answered with an error, by the status.", ["status"], **of)
    self.registry.register(engines)  # pyright: ignore[reportArgumentType]  # whose class need not be its Collector
    self.outputs = Outputs(engines, model.tokenizer)
    self.encoders = ThreadPoolExecutor(_ENCODERS, "encoder")
    self.draining, self.n_answers, self._started = False, 0, int(time.time())

  def health(self) -> Health:
    """What the engines say, and whether the server ends."""
    told = self.engines.health()
    return dataclasses.replace(told, status="draining") if self.draining and told.status == "ok" else told

  async def sample(self) -> None:
    """Has the engines take samples until it is cancelled. An engine that does not go on has its requests given up."""
    while True:
      await asyncio.sleep(SAMPLE_S)
      try:
        self.engines.sample()
        told = self.engines.health()
        if told.status == "stuck":
          self.outputs.give_up(Refused(500, f"{told.why}, and this request is given up"))
      except Exception:  # of one sample; the next may do
        _LOG.exception("no sample")

  def numbers(self) -> dict[str, Any]:
    """What /status tells but for the state: of the engines that answer. May wait for other processes."""
    engines = self.engines.told()
    told = {"model": self.served, "refused": by_label(self.refused), **body(engines)}
    if replicas := self.engines.health().replicas:
      told["replicas"] = {i: dataclasses.asdict(of) | {"counted": int(i) in engines} for i, of in replicas.items()}
    return told

  def knows_key(self, request: Request) -> bool:
    """Whether the request has the key, or none is asked for."""
    given = request.headers.get("authorization", "").encode("utf-8", "replace")
    return self._key is None or hmac.compare_digest(given, f"Bearer {self._key}".encode())

  def check_key(self, request: Request) -> None:
    if not self.knows_key(request):
      raise Refused(401, "this server wants an API key: Authorization: Bearer <key>", code="invalid_api_key")

  async def body(self, request: Request) -> Any:
    """The JSON of a body, read while it comes."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
      raise Refused(415, f"the content-type is {kind!r:.80}, and a body here is application/json")
    most, parts, n = self.limits.max_body_bytes, list[bytes](), 0
    try:
      async with asyncio.timeout(self.limits.body_seconds):
        async for part in request.stream():
          n += len(part)
          if n > most:
            raise Refused(413, f"the body has more than {most} bytes")
          parts.append(part)
    except TimeoutError:
      raise Refused(408, f"the body has not come within {self.limits.body_seconds:g} s: {n} bytes of it have") from None
    return await self.threaded(_json, b"".join(parts))

  async def threaded(self, what: Callable[..., Any], *given: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(self.encoders, what, *given)

  async def answer(self, request: Request, chat: bool) -> Response:
    if self.draining:
      raise Refused(503, "the server ends: it takes no more requests")
    self.n_answers += 1
    try:
      body = await self.body(request)
      of = self.model.tokenizer, self.model.config.vocab_size, self.served, self.max_request_tokens
      what = await self.threaded(asked.read, body, chat, *of)
      waiting, more, most = self.outputs.n_waiting, len(what.prompts) * what.params.n, self.limits.max_waiting
      if waiting + more > most:
        raise Refused(429, f"{waiting} outputs wait, and this request has {more}; {most} may wait", code="queue_full")
      answer = Answer(what, self)
      answer.submit()  # before anything else can come: what waits is counted
      return _Answering(self, answer, what.stream)
    except BaseException:
      self.n_answers -= 1
      raise

  async def models(self, request: Request) -> Response:
    """All, or the one that the path names."""
    card = {"id": self.served, "object": "model", "created": self._started, "owned_by": "sparse-serve"}
    card["max_model_len"] = self.max_request_tokens
    if not (name := request.path_params.get("name")):
      return JSONResponse({"object": "list", "data": [card]})
    asked.check_model({"model": name}, self.served)
    return JSONResponse(card)

  async def tokenize(self, request: Request) -> Response:
    fields = asked.object_of(await self.body(request))
    asked.check_model(fields, self.served)
    (ids, *more) = await self.threaded(asked.prompts_of, fields, self.model.tokenizer)
    if more:
      raise Refused(400, f"one prompt is tokenized at a time, got {1 + len(more)}", "prompt")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.max_request_tokens})

  async def detokenize(self, request: Request) -> Response:
    ids = asked.token_ids(asked.object_of(await self.body(request)))
    asked.check_text(self.model.tokenizer, "tokens")
    asked.check_ids(ids, self.model.config.vocab_size, "tokens")
    return JSONResponse({"prompt": await self.threaded(self.model.tokenizer.decode, ids, False)})

  async def tokenizer_info(self, _: Request) -> Response:
    tokenizer = self.model.tokenizer
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    return JSONResponse({"tokenizer_class": type(tokenizer).__name__, **names, **tokenizer.special_tokens})


class _Answering(Response):
  """Sends an answer as it is made. A client that goes away ends it."""

  def __init__(self, server: Server, answer: Answer, stream: bool):
    self._server, self._answer, self._stream = server, answer, stream

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await _while_there(receive, self._send(scope, receive, send))
    finally:
      self._answer.close()
      self._server.n_answers -= 1

  async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
    answer, begun = self._answer, False
    try:
      await answer.score()
      if not self._stream:
        return await JSONResponse(await answer.whole())(scope, receive, send)
      async for event in answer.events():
        if not begun:
          headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
          await send({"type": "http.response.start", "status": 200, "headers": headers})
          begun = True
        await send({"type": "http.response.body", "body": event, "more_body": True})
      await send({"type": "http.response.body", "body": b"", "more_body": False})
    except Refused as refused:
      await _refusal(self._server, refused)(scope, receive, send)
    except Exception as error:
      _LOG.exception("a request has failed")
      if begun:
        raise
      await _refusal(self._server, _unforeseen(error))(scope, receive, send)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
  """Runs `work` until it ends or its client goes away."""

  async def gone() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
  finally:
    for task in tasks:
      task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
  if isinstance(ended[0], Exception) and not isinstance(ended[0], OSError):
    raise ended[0]


def _json(body: bytes) -> Any:
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refused(400, f"the body is no JSON: {error}") from None


def _refusal(server: Server, refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
  server.refused.labels(str(refused.status)).inc()
  return JSONResponse(refused.body(), refused.status, headers)


def _unforeseen(error: Exception) -> Refused:
  return Refused(500, f"{type(error).__name__}: {error}")


def _endpoint(server: Server, what: Callable[[Request], Awaitable[Response]], key: bool = True):
  """`what`, whose errors become answers, behind the key."""

  async def call(request: Request) -> Response:
    try:
      if key:
        server.check_key(request)
      return await what(request)
    except Refused as refused:
      return _refusal(server, refused)
    except ClientDisconnect:
      return Response(status_code=499)
    except ValueError as error:
      return _refusal(server, Refused(400, str(error)))
    except Exception as error:
      _LOG.exception("a request has failed")
      return _refusal(server, _unforeseen(error))

  return call


async def _page(_: Request) -> Response:
  return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)


def make_app(server: Server, version: str) -> Starlette:
  """The ASGI application: what uvicorn runs."""

  endpoint = functools.partial(_endpoint, server)

  async def completions(request: Request) -> Response:
    return await server.answer(request, chat=False)

  async def chat(request: Request) -> Response:
    return await server.answer(request, chat=True)

  async def health(_: Request) -> Response:
    told = server.health()
    return JSONResponse(told.to_dict(), 200 if told.status == "ok" else 503)

  async def versions(_: Request) -> Response:
    return JSONResponse({"version": version})

  async def metrics(_: Request) -> Response:
    text = await asyncio.to_thread(generate_latest, server.registry)  # engines elsewhere are asked
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

  async def status(request: Request) -> Response:
    told: dict[str, Any] = {"state": server.health().status}
    if not server.knows_key(request):  # no 401: browsers log it as an error, and the page asks before it has the key
      told["key"] = "wanted"
    else:
      told |= {"version": version, **await asyncio.to_thread(server.numbers)}
    return JSONResponse(told, headers={"cache-control": "no-store"})

  async def no_such(request: Request, error: Any) -> Response:
    refused = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return _refusal(server, refused, error.headers)  # which methods there are

  @contextlib.asynccontextmanager
  async def lifespan(_: Starlette):
    sampling = asyncio.create_task(server.sample())
    yield
    sampling.cancel()
    server.encoders.shutdown(wait=False, cancel_futures=True)

  routes = [
    Route("/", endpoint(_page, key=False)),
    Route("/status", endpoint(status, key=False)),
    Route("/v1/completions", endpoint(completions), methods=["POST"]),
    Route("/v1/chat/completions", endpoint(chat), methods=["POST"]),
    Route("/v1/models", endpoint(server.models)),
    Route("/v1/models/{name:path}", endpoint(server.models)),  # a name may have a slash
    Route("/tokenize", endpoint(server.tokenize), methods=["POST"]),
    Route("/tokenizer_info", endpoint(server.tokenizer_info)),
    Route("/detokenize", endpoint(server.detokenize), methods=["POST"]),
    Route("/health", endpoint(health, key=False)),
    Route("/version", endpoint(versions)),
    Route("/metrics", endpoint(metrics)),
  ]
  return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: no_such})
