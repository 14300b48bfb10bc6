"""Processes on the machines of a Ray cluster, or on this one, each with GPUs of its own."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

_STORE_BYTES = 256 << 20  # of shared memory on this machine: prompts and rows travel through it, weights do not


def connect() -> Any:
  """The module `ray`, connected to the cluster that RAY_ADDRESS names or this machine is a part of; where there is
  none, to one that is started here and ends with this process.

  Raises:
    ValueError: Ray is not installed, or the cluster cannot be reached.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
  except ImportError as error:
    raise ValueError(f'this needs {error.name}: pip install "sparse-serve-jax[ray]"') from error
  if not ray.is_initialized():
    of = {"logging_level": logging.ERROR, "log_to_driver": True}
    try:
      ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **of)
    except ConnectionError as error:
      if "RAY_ADDRESS" in os.environ:
        raise ValueError(f"there is no Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
      ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, **of)
    atexit.register(ray.shutdown)
  return ray


def gpus_each(ray: Any, processes: int, tp: int) -> int:
  """GPUs that each of some processes asks for: `tp`, or 0 where the cluster has none.

  Raises:
    ValueError: the cluster has too few of them.
  """
  there = int(ray.cluster_resources().get("GPU", 0))
  if there and there < processes * tp:
    raise ValueError(f"{processes} processes with tp={tp} take {processes * tp} GPUs, and Ray's cluster has {there}")
  return tp if there else 0
