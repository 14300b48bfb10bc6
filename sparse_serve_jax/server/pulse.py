"""How engines are: whether one goes on, as its thread ends iterations or XLA compiles."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any, Literal

from jax import monitoring

from sparse_serve_jax.programs import COMPILES
from sparse_serve_jax.serving.loop import Loop

COMPILING = 10  # as many times `stuck_s` may pass while a program is compiled, or a replica starts


@dataclasses.dataclass(frozen=True)
class ReplicaHealth:
  status: str  # "ok", "starting", or "failed": none could be started
  live: int  # outputs that it has not ended
  restarts: int


@dataclasses.dataclass(frozen=True)
class Health:
  """What /health tells."""

  # "failed": no engine takes requests now; "stuck": the engine takes none, as it does not go on; "draining": the server
  # ends.
  status: Literal["ok", "failed", "stuck", "draining"]
  seconds: int | None = None  # that a stuck engine has not gone on
  replicas: dict[str, ReplicaHealth] | None = None  # by number, where engines are elsewhere

  @property
  def why(self) -> str:
    """Of an engine that is stuck or has failed, why it takes no requests."""
    return f"the engine has not gone on for {self.seconds} s" if self.status == "stuck" else "the engine has failed"

  def to_dict(self) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Pulse:
  """Of the one engine of this process. Any thread asks."""

  def __init__(self, loop: Loop, stuck_s: float):
    """`stuck_s`: seconds after which an engine that does not go on is taken for stuck."""
    self._loop, self._most = loop, stuck_s
    self._lock = threading.Lock()  # guards the next two: threads compile several programs at a time
    self._compiling, self._told = 0, 0.0
    monitoring.register_scalar_listener(self._begins)
    monitoring.register_event_duration_secs_listener(self._ends)

  def still(self) -> float | None:
    """Seconds that the engine has not gone on, if they are too many. A compilation that ends is progress."""
    since = self._loop.still_since
    if since is None:
      return None
    with self._lock:
      still, compiling = time.monotonic() - max(since, self._told), self._compiling > 0
    return still if still > self._most * (COMPILING if compiling else 1) else None

  def close(self) -> None:
    monitoring.unregister_scalar_listener(self._begins)
    monitoring.unregister_event_duration_listener(self._ends)

  def _begins(self, event: str, value: float, **_: object) -> None:
    self._compiles(event, 1)

  def _ends(self, event: str, duration_secs: float, **_: object) -> None:
    self._compiles(event, -1)

  def _compiles(self, event: str, more: int) -> None:
    if event == COMPILES:
      with self._lock:  # one may end whose begin was told before anybody listened
        self._compiling, self._told = max(0, self._compiling + more), time.monotonic()
