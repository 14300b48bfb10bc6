"""As much of Ray as replicas use, with threads in place of processes; an actor can die, or stop to answer."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
  pass


class RayTaskError(RayError):
  def __init__(self, cause: BaseException):
    self.cause = cause


class GetTimeoutError(RayError, TimeoutError):
  pass


exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, GetTimeoutError=GetTimeoutError)


class Actor:
  """Calls of a group are made in order by its threads, as notes to one thread are."""

  def __init__(self, cls: type, groups: dict[str, int], most: int):
    self.of, self.dead, self._open = cls(), threading.Event(), set[Future[Any]]()
    self._answers = threading.Event()
    self._answers.set()
    self._pools = {name: ThreadPoolExecutor(n) for name, n in {**groups, "": most}.items()}
    self._lock = threading.Lock()

  def stop(self) -> None:
    """It does not answer any more."""
    self._answers.clear()

  def go_on(self) -> None:
    """It answers again, with what waited first."""
    self._answers.set()

  def die(self) -> None:
    with self._lock:
      self.dead.set()
      self._answers.set()
      lost, self._open = self._open, set()
    for future in lost:
      future.set_exception(RayError("the actor has died"))
    for pool in self._pools.values():
      pool.shutdown(wait=False, cancel_futures=True)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)

    def options(concurrency_group: str = "") -> Any:
      return SimpleNamespace(remote=lambda *given: self._call(concurrency_group, name, given))

    return SimpleNamespace(options=options, remote=options().remote)

  def _call(self, group: str, name: str, given: tuple[Any, ...]) -> Future[Any]:
    future: Future[Any] = Future()
    with self._lock:
      if self.dead.is_set():
        future.set_exception(RayError("the actor has died"))
        return future
      self._open.add(future)
      self._pools[group].submit(self._run, future, name, given)
    return future

  def _run(self, future: Future[Any], name: str, given: tuple[Any, ...]) -> None:
    error, made = None, None
    try:
      made = getattr(self.of, name)(*given)
    except Exception as raised:
      error = RayTaskError(raised)
    self._answers.wait()
    with self._lock:
      if future not in self._open:
        return
      self._open.discard(future)
    future.set_exception(error) if error else future.set_result(made)


class Ray:
  """In place of the module."""

  exceptions = exceptions

  def __init__(self):
    self.actors: list[Actor] = []
    self.ended: list[int] = []  # processes that were killed because they hang

  def cluster_resources(self) -> dict[str, float]:
    return {}

  def remote(self, concurrency_groups: dict[str, int], max_concurrency: int, **_: object) -> Any:
    def of(cls: type) -> Any:
      def make() -> Actor:
        self.actors.append(Actor(cls, concurrency_groups, max_concurrency))
        return self.actors[-1]

      return SimpleNamespace(remote=make)

    return of

  def get(self, future: Future[Any], timeout: float | None = None) -> Any:
    done, _ = concurrent.futures.wait([future], timeout)
    if not done:
      raise GetTimeoutError(f"{timeout} s have passed")
    return future.result()

  def kill(self, actor: Actor) -> None:
    actor.die()


def until(what: Any, seconds: float = 20.0) -> None:
  """Waits until `what()` is true."""
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end, "it has not come"
    time.sleep(0.002)
