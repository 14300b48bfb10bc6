"""What time it is: on the wall, or in a simulation."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
  """Seconds from a point that does not matter; never backwards."""

  def now(self) -> float: ...

  def sleep_until(self, t: float) -> None:
    """Returns when `now() >= t`, so at once if that is past."""
    ...


class Wall:
  """The time of this machine."""

  def now(self) -> float:
    return time.monotonic()

  def sleep_until(self, t: float) -> None:
    while (left := t - self.now()) > 0:
      time.sleep(left)


class Virtual:
  """A time that passes only by `sleep_until`: a simulated executor sleeps for as long as a step would take."""

  def __init__(self, now: float = 0.0):
    self._now = now

  def now(self) -> float:
    return self._now

  def sleep_until(self, t: float) -> None:
    self._now = max(self._now, t)
