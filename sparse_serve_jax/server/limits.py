"""What a server takes at most and how long it waits, unless its flags say otherwise."""

from __future__ import annotations

import dataclasses

STUCK_S = 300.0  # seconds after which an engine that does not go on is given up


@dataclasses.dataclass(frozen=True)
class Limits:
  max_body_bytes: int = 64 << 20
  max_waiting: int = 256  # outputs without a token
  body_seconds: float = 60.0  # that a body may take to come
  drain_seconds: float = 300.0  # that answers may take after a signal
