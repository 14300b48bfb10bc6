"""One model over the devices of several processes, which all run the same program: `jax.distributed`.

Nothing tells one process what another has planned. Each runs the whole engine on the same requests, so that all
dispatch the same programs in the same order: what is planned must not depend on a clock, on memory that happens to be
free, or on what one process alone has read. `agreed` is for the last.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(coordinator: str, hosts: int, index: int) -> None:
  """Waits until all processes are there; from then on `jax.devices()` are those of all. Comes before any other use of
  JAX's devices.

  Args:
    coordinator: "host:port" of process 0, at which it listens.
    hosts: processes.
    index: of this one.

  Raises:
    ValueError: the numbers do not fit, or the others have not come.
  """
  if not 0 <= index < hosts or ":" not in coordinator:
    raise ValueError(f"{coordinator=}, {hosts=}, {index=}: give HOST:PORT of process 0, and an index below hosts")
  try:
    jax.distributed.initialize(coordinator, hosts, index)
  except RuntimeError as error:
    raise ValueError(f"process {index} of {hosts} has not met the others at {coordinator}: {error}") from error


def is_first() -> bool:
  """Whether this process is the one that reads requests and tells answers."""
  return jax.process_index() == 0


def agreed(value: Any) -> Any:
  """The first process's value, of JSON, in all of them; those of the others do not count."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
  n = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  told = multihost_utils.broadcast_one_to_all(data if is_first() else np.zeros(n, np.uint8))
  return json.loads(np.asarray(told).tobytes())
