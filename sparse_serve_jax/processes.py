"""Results that worker processes make ahead of their use."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
  """Yields `function` of each item, in order.

  Args:
    function: can be pickled, which is done once a worker; it may be large.
    items: can be pickled.
    workers: processes, which together are at most three results a worker ahead; 0: none, and nothing is made ahead.
  """
  if not workers:
    yield from map(function, items)
    return
  context = multiprocessing.get_context("forkserver")  # a fork of a process that runs JAX may hang
  context.set_forkserver_preload([getattr(function, "func", function).__module__])  # imported once, not by every worker
  resource_tracker.ensure_running()  # it would unblock what follows (Python 3.11)
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of the terminal: it is this process's to handle
  try:
    forkserver.ensure_running()  # which inherits that, as all workers do
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (function,))
  waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(_call, item))
      if len(waiting) > 3 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
  global _function
  _function = function
  parent = multiprocessing.parent_process()
  assert parent is not None

  def leave_with_parent() -> None:  # which a parent that is killed cannot see to
    parent.join()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
  assert _function is not None
  return _function(item)
