"""Runs a server until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import math
import os
import signal
import socket
import threading
import time

import uvicorn

from sparse_serve_jax import __version__
from sparse_serve_jax.models import Model
from sparse_serve_jax.server.app import Server, make_app
from sparse_serve_jax.server.engines import Engines
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.server.limits import Limits

_LOG = logging.getLogger(__name__)

_LOOK = 0.05  # seconds between looks at what is still to be answered, while the server ends
_LAST = 5.0  # seconds in which clients take what was sent last, once there is nothing more to wait for
_MOMENT = 0.5  # seconds: signals that are less apart are one, as `timeout` sends it to a process and to its group
_CLOSED = 60.0  # seconds in which engines end


def bind(address: tuple[str, int]) -> socket.socket:
  """A socket that listens at the address, host and port; port 0 takes a free one. From now on the address is nobody
  else's, as one that is bound alone may be, and connections wait to be answered.

  Raises:
    OSError: the address cannot be had; the message names it.
  """
  family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
  # It is told its protocol, without which asyncio lets Nagle hold answers back for 40 ms.
  listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen()
  except OSError as error:
    listener.close()
    host, port = address
    in_use = error.errno == errno.EADDRINUSE
    raise OSError(f"port {port} of {host} is in use" if in_use else f"{error.strerror}: {host}, port {port}") from error
  return listener


def serve(
  engines: Engines, model: Model, served: str, listener: socket.socket, limits: Limits, api_key: str | None
) -> bool:
  """Serves until SIGTERM or SIGINT has come and what was asked before is answered, or `limits.drain_seconds` have
  passed. A second signal ends the process, as does an engine that does not end.

  Returns whether an engine lives: if all have failed, the server answers no more, and waits for the signal too.

  Args:
    engines: idle, and from now on the server's.
    served: the name of the model that clients give.
    listener: of `bind`. A line on stdout says where it listens.
  """
  with contextlib.closing(listener):
    asyncio.run(_serve(listener, engines, model, served, limits, api_key))
  return not engines.failed


class _Uvicorn(uvicorn.Server):
  """Signals are ours."""

  @contextlib.contextmanager
  def capture_signals(self):
    yield


async def _serve(
  listener: socket.socket, engines: Engines, model: Model, served: str, limits: Limits, api_key: str | None
) -> None:
  server = Server(engines, model, served, limits, api_key)
  config = uvicorn.Config(
    make_app(server, __version__), log_level="warning", access_log=False, loop="asyncio", ws="none"
  )
  http, events, waits = _Uvicorn(config), asyncio.get_running_loop(), set[asyncio.Task[None]]()

  async def drain() -> None:
    until = time.monotonic() + limits.drain_seconds
    while server.n_answers and time.monotonic() < until and engines.health().status != "stuck":
      await asyncio.sleep(_LOOK)
    server.outputs.close(Refused(503, "the server ends, and this request is given up"))
    # Connections whose clients do not read are closed then.
    config.timeout_graceful_shutdown = math.ceil(_LAST + (0 if server.n_answers else max(0, until - time.monotonic())))
    http.should_exit = True

  first = math.inf  # when the first signal came

  def ended(number: int) -> None:
    nonlocal first
    if server.draining and time.monotonic() - first > _MOMENT:
      os._exit(128 + number)
    if not server.draining:
      server.draining, first = True, time.monotonic()
      waits.add(asyncio.create_task(drain()))

  for number in (signal.SIGTERM, signal.SIGINT):
    events.add_signal_handler(number, ended, number)
  if not model.tokenizer.vocab_size:
    _LOG.warning("%s has no tokenizer: only token ids are served, texts and conversations are refused", server.served)
  gc.collect()
  gc.freeze()  # model and programs: nothing of them is looked through again
  host, port = listener.getsockname()[:2]
  if api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
    _LOG.warning("whoever reaches %s, port %d, is served: other machines may, and no API key is asked for", host, port)
  print(f"serving {server.served} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
  try:
    await http.serve(sockets=[listener])
  finally:
    closing = threading.Thread(target=engines.close, daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, _CLOSED)
    if closing.is_alive():
      _LOG.error("the engine has not ended after %.0f s", _CLOSED)
      os._exit(1)
