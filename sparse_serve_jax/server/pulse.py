"""Whether an engine goes on: its thread ends iterations, or XLA compiles."""

from __future__ import annotations

import threading
import time

from jax import monitoring

from sparse_serve_jax.serving.loop import Loop

STUCK_S = 300.0
COMPILING = 10  # as many times `stuck_s` may pass while a program is compiled, or a replica starts
_COMPILES = "/jax/core/compile/backend_compile_duration"  # JAX tells its begin and its end, an error's too


class Pulse:
  """Of the one engine of this process. Any thread asks."""

  def __init__(self, loop: Loop, stuck_s: float):
    """`stuck_s`: seconds after which an engine that does not go on is taken for stuck."""
    self._loop, self._most = loop, stuck_s
    self._compiling, self._told = set[int](), 0.0  # threads
    monitoring.register_scalar_listener(self._begins)
    monitoring.register_event_duration_secs_listener(self._ends)

  def still(self) -> float | None:
    """Seconds that the engine has not gone on, if they are too many. A compilation that ends is progress."""
    since, compiling = self._loop.still_since, bool(self._compiling)
    if since is None:
      return None
    still = time.monotonic() - max(since, self._told)
    return still if still > self._most * (COMPILING if compiling else 1) else None

  def close(self) -> None:
    monitoring.unregister_scalar_listener(self._begins)
    monitoring.unregister_event_duration_listener(self._ends)

  def _begins(self, event: str, value: float, **_: object) -> None:
    if event == _COMPILES:
      self._compiling.add(threading.get_ident())
      self._told = time.monotonic()

  def _ends(self, event: str, duration_secs: float, **_: object) -> None:
    if event == _COMPILES:
      self._told = time.monotonic()
      self._compiling.discard(threading.get_ident())


def stands_still(seconds: float) -> str:
  return f"the engine has not gone on for {seconds:.0f} s"
