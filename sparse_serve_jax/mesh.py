"""The devices that one model is split over."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

AXIS = "tp"  # the mesh has this one axis


def make_mesh(n: int) -> Mesh:
  """The first `n` of this process's devices.

  Raises:
    ValueError: there are not as many.
  """
  devices = jax.devices()
  if not 0 < n <= len(devices):
    raise ValueError(f"tp={n} is not within the {len(devices)} devices that there are")
  return jax.make_mesh((n,), (AXIS,), (AxisType.Auto,), devices=devices[:n])
