"""Processes on the machines of a Ray cluster, or on this one, each with GPUs of its own."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sparse_serve_jax import progress, runtime

Item = TypeVar("Item")
Call = Callable[..., Any]  # of a method of an object elsewhere, by its name; raises what the method does

_ENDED_SOON = 30.0  # seconds in which a host ends a process
_STORE_BYTES = 256 << 20  # of shared memory on this machine: prompts and rows travel through it, weights do not


def connect() -> Any:
  """The module `ray`, connected to the cluster that RAY_ADDRESS names or `ray start` made this machine a part of;
  where there is none, to one that is started here, is this process's alone, and ends with it.

  Raises:
    ValueError: Ray is not installed, or the cluster cannot be reached.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
  except ImportError as error:
    raise ValueError(f'this needs {error.name}: pip install "sparse-serve-jax[ray]"') from error
  if not ray.is_initialized():
    of: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    here = of | {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    if (address := os.environ.get("RAY_ADDRESS", "local")) not in ("", "local"):
      try:
        ray.init(**of)
      except ConnectionError as error:
        raise ValueError(f"there is no Ray cluster at RAY_ADDRESS={address}: {error}") from error
    else:
      try:  # not at "auto", which also takes one that another command has started, and will end
        ray.init(**here)
      except ValueError:  # there is one of `ray start`, and it has its sizes
        try:
          ray.init(**of)
        except ConnectionError:  # there was
          ray.init(address="local", **here)
    atexit.register(ray.shutdown)
  return ray


def end_process(ray: Any, node: str, pid: int) -> None:
  """Kills a process of a host of Ray's, which need not hear anything. Waits for it, but not for a host that is gone."""
  from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

  there = NodeAffinitySchedulingStrategy(node, soft=False)
  with contextlib.suppress(ray.exceptions.RayError, OSError):
    ray.get(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill).remote(pid), timeout=_ENDED_SOON)


def _kill(pid: int) -> None:
  os.kill(pid, signal.SIGKILL)


def gpus_each(ray: Any, processes: int, tp: int) -> int:
  """GPUs that each of some processes asks for: `tp`, or 0 where the cluster has none.

  Raises:
    ValueError: the cluster has too few of them.
  """
  there = int(ray.cluster_resources().get("GPU", 0))
  if there and there < processes * tp:
    raise ValueError(f"{processes} processes with tp={tp} take {processes * tp} GPUs, and Ray's cluster has {there}")
  return tp if there else 0


def once(function: Callable[[], Any], tp: int = 1) -> Any:
  """What a function returns in a process that has GPUs as those of `spread` have."""
  ray = connect()
  return ray.get(ray.remote(num_gpus=gpus_each(ray, 1, tp))(_Made).remote(lambda: None).run.remote(function))


def spread(make: Callable[[], Any], items: Sequence[Item], do: Callable[[Call, Item], object], tp: int = 1) -> None:
  """Works on items in as many processes at once as the cluster has GPUs for, `tp` each; where it has none, CPUs.

  Args:
    make: makes an object in each process, whose methods do the work.
    items: each is one process's, in their order.
    do: called with what calls the object's methods, and an item, in a thread of this process for each of the others.

  Raises:
    What `do` does; ValueError as of `connect`; ChildProcessError: a process has ended. The others are ended then.
  """
  ray = connect()
  gpus = gpus_each(ray, 1, tp)
  there = ray.cluster_resources()
  n = min(len(items), int(there.get("GPU", 0)) // tp if gpus else int(there.get("CPU", 1)))
  actors, left, stopped = [], iter(items), threading.Event()

  def work() -> None:
    mine = []  # one at most, and none for items that need nothing done

    def call(name: str, *given: Any) -> Any:
      if not mine:
        mine.append(ray.remote(num_gpus=gpus, num_cpus=1, max_restarts=0)(_Made).remote(make))
        actors.append(mine[0])
      try:
        return ray.get(mine[0].call.remote(name, *given))
      except ray.exceptions.RayTaskError as error:
        raise error.cause from None
      except ray.exceptions.RayError as error:
        raise ChildProcessError(f"a process has ended: {error}") from None

    for item in left:  # all threads take of one iterator
      if stopped.is_set():
        return
      do(call, item)
    for actor in mine:
      ray.kill(actor)  # others may wait for its GPUs

  with concurrent.futures.ThreadPoolExecutor(max(1, n)) as threads:
    try:
      for done in concurrent.futures.as_completed([threads.submit(work) for _ in range(n)]):
        done.result()
    except BaseException:
      stopped.set()
      for actor in actors:
        ray.kill(actor)
      raise


class _Made:
  """What runs in the processes of `spread`."""

  def __init__(self, make: Callable[[], Any]):
    progress.log_warnings()
    runtime.configure()
    self._made = make()

  def call(self, name: str, *given: Any) -> Any:
    return getattr(self._made, name)(*given)

  def run(self, function: Callable[[], Any]) -> Any:
    return function()
