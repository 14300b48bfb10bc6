"""The devices that one model is split over."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

AXIS = "tp"  # the mesh has this one axis


def make_mesh(n: int) -> Mesh:
  """The first `n` devices; of several processes, which `hosts` joins, all devices of all.

  Raises:
    ValueError: there are not as many, or those of several processes are more.
  """
  devices = jax.devices()
  if not 0 < n <= len(devices):
    raise ValueError(f"tp={n} asks for {n} devices, and there are {len(devices)}: give tp=1 up to tp={len(devices)}")
  if jax.process_count() > 1 and n < len(devices):
    raise ValueError(f"tp={n}: {jax.process_count()} processes have {len(devices)} devices, and split over all of them")
  return jax.make_mesh((n,), (AXIS,), (AxisType.Auto,), devices=devices[:n])
