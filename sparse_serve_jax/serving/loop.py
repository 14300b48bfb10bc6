"""An engine behind a thread: any thread submits prompts and reads tokens as they come.

The engine itself knows no threads. Here one thread owns it and is the only one that calls it; others leave it notes,
which it reads between two iterations. Servers, notebooks and actors use this and nothing else of the engine.
"""

from __future__ import annotations

import atexit
import copy
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import Request

_LOG = logging.getLogger(__name__)

_CLOSED = "this loop is closed"
_END = object()  # the last entry of every stream's queue


class Stream:
  """Output tokens of one request, as they come. Threads may share it: each token goes to one of them."""

  def __init__(self, prompt: Sequence[int] | np.ndarray, options: dict[str, Any], sink: Sink | None = None):
    """For `Loop.submit`, whose `prompt`, `options` and `sink` these are."""
    self._prompt, self._options, self._sink = prompt, options, sink
    self._tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._request: Request | None = None  # the engine's, once it has taken it
    self._error: BaseException | None = None
    self._ended = threading.Event()

  def __iter__(self) -> Iterator[int]:
    return self

  def __next__(self) -> int:
    """Waits for the next token.

    Raises:
      ValueError: the request could never run.
      RuntimeError: it ended with an error, its own or the engine's.
    """
    token = self._tokens.get()
    if token is not _END:
      return token
    self._tokens.put(_END)  # for whoever asks again
    if self._error is not None:
      raise self._error
    raise StopIteration

  @property
  def ended(self) -> bool:
    """Whether there will be no more tokens."""
    return self._ended.is_set()

  @property
  def request(self) -> Request | None:
    """The engine's, once it has taken it. The engine's thread goes on to change it until it has ended."""
    return self._request

  @property
  def arrival_time(self) -> float:
    """When it was submitted, in seconds of the engine's clock."""
    return self._options["arrival_time"]

  @property
  def prompt_tokens(self) -> int:
    """Of the prompt, as it was submitted."""
    return len(self._prompt)

  @property
  def error(self) -> BaseException | None:
    """What the end raises: None before it, and of a request that ended well."""
    return self._error

  def result(self, timeout: float | None = None) -> Request:
    """Waits for the end, whether or not somebody reads the tokens. Returns the request, all tokens in it.

    A request that was cancelled is returned too; its `finish_reason` says so.

    Raises:
      TimeoutError: it has not ended after `timeout` seconds; it goes on.
      ValueError, RuntimeError: as reading tokens does.
    """
    if not self._ended.wait(timeout):
      raise TimeoutError(f"the request has not ended after {timeout} s")
    if self._error is not None:
      raise self._error
    assert self._request is not None
    return self._request

  def _take(self, request: Request, token: int) -> None:
    if self._sink is None:
      self._tokens.put(token)
    else:
      self._sink(self, token)

  def _end(self, error: BaseException | None) -> None:
    self._error = error
    self._ended.set()
    self._tokens.put(_END)
    if self._sink is not None:
      try:
        self._sink(self, None)
      except Exception:  # other streams are to end too
        _LOG.exception("a sink raised at the end of its stream")


# Called by the engine's thread with each token of a stream, and with None when it has ended. It must return at once and
# call nothing of the loop.
Sink = Callable[[Stream, int | None], None]


class Loop:
  """Runs an engine in a thread of its own until it is closed.

  `with Loop(engine) as loop:` waits at its end for the requests that live; after an exception it cancels them.
  A consumer that is slow or gone holds up nobody: its tokens wait in memory.
  """

  def __init__(self, engine: Engine):
    """Starts the thread.

    Args:
      engine: idle, and from now on the loop's alone. By its clock requests arrive when they are submitted, not when
        the thread sees them.
    """
    self._engine = engine
    self._changed = threading.Condition()  # guards what follows
    self._notes: deque[tuple[str, Stream]] = deque()  # "submit" or a reason to cancel, in order, for the thread
    self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
    self._live: dict[Stream, None] = {}  # submitted and not ended, oldest first
    self._draining = self._closing = False
    self._failure: BaseException | None = None
    self._streams: dict[Request, Stream] = {}  # the thread's own
    self._still: tuple[float, int] | None = None  # since when, and after how many iterations; None: nothing is to do
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    atexit.register(self.close)  # a process must not end while devices run
    self._thread.start()

  @property
  def failed(self) -> bool:
    """Whether the engine has failed. All streams have ended with the error then, and only a new engine can go on."""
    return self._failure is not None

  @property
  def still_since(self) -> float | None:
    """When the last iteration or call ended, or what there is to do came if that is later, in seconds of
    `time.monotonic`; None while there is nothing to do.
    """
    still = self._still
    return still[0] if still else None

  @property
  def live(self) -> list[Stream]:
    """Those that were submitted and have not ended, oldest first."""
    with self._changed:
      return list(self._live)

  def submit(self, prompt: Sequence[int] | np.ndarray, *, sink: Sink | None = None, **options: Any) -> Stream:
    """Queues token ids and returns at once.

    Args:
      prompt: token ids, copied.
      sink: called by the engine's thread with the stream and each token, then with None at its end; tokens go there and
        not to readers. It must return at once and call nothing of the loop.
      **options: as of `Engine.add_request`, but on_token. It may refuse them: the stream then ends with its ValueError.

    Returns:
      The stream of its output tokens, which need not be read.

    Raises:
      RuntimeError: the loop is draining or closed, or its engine has failed.
    """
    prompt = copy.copy(prompt)  # the caller may change theirs before the thread reads it
    stream = Stream(prompt, {"arrival_time": self._engine.clock.now()} | options, sink)
    with self._changed:
      self._check_failure()
      if self._draining:
        raise RuntimeError("this loop takes no more requests: it is draining or closed")
      self._live[stream] = None
      self._notes.append(("submit", stream))
      self._changed.notify_all()
    return stream

  def cancel(self, stream: Stream, reason: str = "cancelled") -> None:
    """Ends a request of this loop soon for `reason`, "cancelled" or "stop". One that has ended stays as it is."""
    with self._changed:
      if stream in self._live:
        self._notes.append((reason, stream))
        self._changed.notify_all()

  def call(self, what: Callable[[], Any]) -> Future[Any]:
    """Has the thread call `what` between two iterations, which wait for it. Returns its result, to come: a RuntimeError
    if the engine fails or the loop is closed before it.

    Raises:
      RuntimeError: the loop is closed, or its engine has failed.
    """
    future: Future[Any] = Future()
    with self._changed:
      self._check_failure()
      if self._closing:
        raise RuntimeError(_CLOSED)
      self._calls.append((what, future))
      self._changed.notify_all()
    return future

  def drain(self, timeout: float | None = None) -> None:
    """Takes no more requests and waits until those that live have ended.

    Raises:
      TimeoutError: some live after `timeout` seconds. They go on, and no others are taken.
      RuntimeError: the engine has failed.
    """
    with self._changed:
      self._draining = True
      if not self._changed.wait_for(lambda: not self._live, timeout):
        raise TimeoutError(f"{len(self._live)} requests have not ended after {timeout} s")
      self._check_failure()

  def close(self) -> None:
    """Cancels the requests that live, waits for the devices and ends the thread. May be called again."""
    with self._changed:
      self._draining = self._closing = True
      self._changed.notify_all()
    self._thread.join()
    atexit.unregister(self.close)

  def __enter__(self) -> Loop:
    return self

  def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
    try:
      if error_type is None:
        self.drain()
    finally:
      self.close()

  def _check_failure(self) -> None:
    """Call with the lock held."""
    if self._failure is not None:
      raise failure_of("the engine", self._failure)

  # ------------------------------------------------------------------------------------------------------ the thread

  def _run(self) -> None:
    """Whatever happens, no stream is left without an end."""
    error: BaseException | None = None
    try:
      while self._obey():
        for request in self._engine.step():
          self._finish(request)
      self._engine.cancel_all()
      for request in self._engine.run():
        self._finish(request)
    except BaseException as raised:
      _LOG.exception("the engine has failed")
      error = raised
    with self._changed:
      self._draining, self._failure = True, error
      for stream in self._live:
        stream._end(failure_of("the engine", error))
      self._live.clear()
      for _, future in self._calls:
        if future.running() or future.set_running_or_notify_cancel():
          future.set_exception(failure_of("the engine", error) if error else RuntimeError(_CLOSED))
      self._calls.clear()
      self._changed.notify_all()
    self._engine.wait()

  def _obey(self) -> bool:
    """Sleeps until there is something to do and does what the notes say. Returns whether to make a step; if not, the
    loop is to end.
    """
    engine = self._engine

    def called() -> bool:
      return bool(self._closing or self._notes or self._calls or engine.has_work or engine.failed)

    with self._changed:
      if not called():
        self._still = None
        self._changed.wait_for(called)
      n = engine.usage.iterations
      if self._still is None or self._still[1] != n:
        self._still = time.monotonic(), n
      notes, self._notes = self._notes, deque()
      call = self._calls.popleft() if self._calls else None  # one in an iteration: tokens wait for it
      closing = self._closing
    try:
      for what, stream in notes:
        if what == "submit":
          self._add(stream)
        elif stream._request and not stream._request.ended:
          self._engine.cancel(stream._request.id, what)
      if call is not None:
        _answer(*call)
        self._still = time.monotonic(), n
    except BaseException:  # ends the engine: its caller is told when that is so, as all others are
      with self._changed:
        self._calls.extendleft([call] if call else [])
      raise
    return not closing

  def _add(self, stream: Stream) -> None:
    try:
      request = self._engine.add_request(stream._prompt, on_token=stream._take, **stream._options)
    except Exception as error:
      self._end(stream, error)
    else:
      stream._request = request
      self._streams[request] = stream

  def _finish(self, request: Request) -> None:
    request.on_token = None  # the stream's, which has the request: both would stay until the collector comes
    self._end(self._streams.pop(request), request.error and failure_of("the request", request.error))

  def _end(self, stream: Stream, error: BaseException | None) -> None:
    with self._changed:
      stream._end(error)
      self._live.pop(stream, None)
      self._changed.notify_all()


def _answer(what: Callable[[], Any], future: Future[Any]) -> None:
  if future.set_running_or_notify_cancel():
    try:
      future.set_result(what())
    except Exception as error:
      future.set_exception(error)


def failure_of(what: str, error: BaseException | None) -> RuntimeError:
  """A new one for each that is told, as the error itself may be told to many threads."""
  failed = RuntimeError(f"{what} has failed: {error!r}")
  failed.__cause__ = error
  return failed
