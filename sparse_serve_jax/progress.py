"""What is told beside results, on stderr: how far a command is, by a bar on a terminal or lines elsewhere; warnings."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from typing import Any

from tqdm import tqdm

EVERY_S = 20.0  # seconds between lines at least, and before the first one


class _Lines(tqdm):
  told: float | None = None  # when the last line came, of whichever bar, or the first bar

  def __init__(self, **options: Any):
    name = "{desc}: " if options.get("desc") else ""
    told = f"{name}{{n_fmt}} of {{total_fmt}} {options['unit']}s, {{elapsed}} so far, {{remaining}} left{{postfix}}"
    super().__init__(**options, delay=math.inf, bar_format=told)  # so that it never draws itself
    _Lines.told = _Lines.told or time.monotonic()

  def update(self, n: float | None = 1) -> None:
    self.n += n or 0
    if (now := time.monotonic()) - (_Lines.told or now) >= EVERY_S:
      _Lines.told = now
      print(self, file=sys.stderr, flush=True)


def bar(*, total: int, unit: str, **options: Any) -> tqdm:
  """A bar with `tqdm`'s options."""
  return (tqdm if sys.stderr.isatty() else _Lines)(total=total, unit=unit, **options)


def write(text: str) -> None:
  """A line on stderr, which no bar runs through."""
  if sys.stderr.isatty():
    tqdm.write(text, file=sys.stderr)
  else:
    print(text, file=sys.stderr, flush=True)


def log_warnings() -> None:
  """From now on, this process's warnings for users are lines of the log."""
  shown = warnings.showwarning

  def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
      logging.getLogger(__name__).warning("%s", message)
    else:
      shown(message, category, *where, **more)

  warnings.showwarning = show
