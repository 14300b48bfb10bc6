"""Continuous batching: token ids in, token ids out. The engine knows no text.

Life of a request: `add_request` checks and queues it; the scheduler admits it, plans pieces of its prefill, then one
decode row an iteration unless it pauses; the executor runs the plans; the engine reads each result one iteration late,
hands the token to the request and to its callback, and closes the request at a stop token or its length.

When a device fails, what it held is gone: the requests that held something there end with an error, and the engine goes
on with those that wait, over an empty cache. If the device cannot, they end too, and the engine has `failed`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.serving.audit import Audits
from sparse_serve_jax.serving.clock import Clock, Wall
from sparse_serve_jax.serving.metrics import Held, Usage
from sparse_serve_jax.serving.plan import MAX_BANNED, Dispatched, Executor, Observed, Plan, Sampling
from sparse_serve_jax.serving.request import Request, State
from sparse_serve_jax.serving.scheduler import Scheduler

_LOG = logging.getLogger(__name__)


class DeviceError(RuntimeError):
  """The device failed while it held something of the request; `__cause__` is what it failed with."""


class _InFlight(NamedTuple):
  """An iteration on its way: see `Observed`."""

  plan: Plan
  step: Dispatched
  planned: float
  dispatched: float
  pool_blocks: int


class Engine:
  """Serves requests with one iteration in flight: the next one is planned and dispatched before a result is read.

  Not thread-safe: see `serving.loop`. Callbacks may add and cancel requests.
  """

  def __init__(
    self,
    executor: Executor,
    *,
    clock: Clock | None = None,
    observer: Callable[[Observed], None] | None = None,
  ):
    """Makes an engine.

    Args:
      executor: runs the plans, with its configuration and its model. One that an idle engine has used may be handed on
        to the next, compiled programs and all.
      clock: by default the wall's.
      observer: called with every iteration, after its tokens are delivered.
    """
    self.config = executor.config
    self.usage, sparse = Usage(executor.shape), executor.config.sparse
    self.audits = Audits(sparse, executor.shape) if sparse.audit_share else None  # of what PSA promises
    self.clock: Clock = clock or Wall()
    self._model, self._executor, self._observer = executor.model, executor, observer
    executor.begin()
    self._scheduler = Scheduler(executor.config, executor.shape)
    self._live: dict[str, Request] = {}
    self._ended: list[Request] = []  # since the last step returned
    self._in_flight: deque[_InFlight] = deque()
    self._to_call: deque[Callable[[], None]] = deque()  # callbacks, observer and step, of results that have been taken
    self._names = (f"request-{i}" for i in itertools.count())
    self._failure: BaseException | None = None  # after which the engine's state is unknown, or its device dead

  @property
  def executor(self) -> Executor:
    """What runs the plans: its cache can be looked at between steps, its plans are the engine's alone."""
    return self._executor

  @property
  def has_work(self) -> bool:
    """Whether requests live, or have ended and no step has returned them."""
    return self._scheduler.has_work or bool(self._ended or self._to_call)

  @property
  def failed(self) -> bool:
    """Whether an iteration was interrupted, so that its state is unknown, or its device cannot go on. Only a new engine
    can.
    """
    return self._failure is not None

  @property
  def max_request_tokens(self) -> int:
    """Prompt and output tokens that one request can have."""
    return self._executor.shape.max_context

  @property
  def held(self) -> Held:
    """What the cache holds now. Any thread may ask: it waits for no device."""
    return self.usage.held(self._scheduler.pool_blocks_in_use, self._scheduler.pool_blocks_kept)

  def add_request(
    self,
    prompt: Sequence[int] | np.ndarray,
    max_new_tokens: int | None = None,
    *,
    params: SamplingParams | None = None,
    request_id: str | None = None,
    on_token: Callable[[Request, int], None] | None = None,
    arrival_time: float | None = None,
    **options: Any,
  ) -> Request:
    """Queues a prompt.

    Args:
      prompt: token ids.
      max_new_tokens: the request ends after so many, 128 by default, unless a stop token comes first. The stop token is
        not output.
      params: how tokens are drawn and when the request ends; instead of max_new_tokens and `options`.
      request_id: by default a number of its own.
      on_token: called with the request and each output token. If it raises, the request is cancelled and keeps the
        exception in `error`; other requests, and its own tokens so far, are untouched.
      arrival_time: seconds of the engine's clock, now by default.
      **options: fields of `SamplingParams`, but those for text and for several outputs: stop, add_special_tokens, n.

    Raises:
      ValueError: the request could never run, or there is no such option; nothing has changed then. The message names
        a request that was given a name.
      RuntimeError: the engine has `failed`.
    """
    self._check_running()
    name = next(of for of in self._names if of not in self._live) if request_id is None else request_id
    try:
      if params is None:
        params = _params_of({"max_new_tokens": max_new_tokens, **options})
      elif options or max_new_tokens is not None:
        raise ValueError("give params or single options, got both")
      if name in self._live:
        raise ValueError("a request of this name has not ended yet")
      request = Request(
        id=name,
        prompt=self._checked_prompt(prompt),
        max_new_tokens=params.max_tokens,
        arrival_time=self.clock.now() if arrival_time is None else arrival_time,
        sampling=_sampling(params),
        stop_token_ids=self._stops(params),
        min_tokens=params.min_tokens,
        n_logprobs=params.logprobs or 0,
        cache_salt=params.cache_salt,
        on_token=on_token,
      )
      with self._whole(expected=ValueError):
        self._scheduler.add(request)
        self._live[name] = request
    except ValueError as error:
      if request_id is None:
        raise
      raise ValueError(f"request {request_id!r}: {error}") from None
    return request

  def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
    """Ends the request `request_id` for `reason`, "cancelled" or "stop"; the next step returns it. False if there is
    none of this name, so also if it has ended; RuntimeError if there is one and the engine has `failed`.
    """
    request = self._live.get(request_id)
    if request is None:
      return False
    with self._whole():
      del self._live[request_id]
      self._scheduler.cancel(request, self.clock.now(), reason)
      self._ended.append(request)
    return True

  def cancel_all(self) -> None:
    """Ends all requests."""
    for name in list(self._live):
      self.cancel(name)

  def step(self) -> list[Request]:
    """Plans and dispatches one iteration, then reads the one before; all that are on their way, if there is no plan.

    A device that fails ends requests with their `error`, and no step with an exception.

    Returns:
      The requests that ended since the last step returned, cancelled and failed ones included.

    Raises:
      RuntimeError: the engine has `failed` before.
      BaseException: what the observer raised; or an interrupt, after which `failed` says whether the engine can go on.
    """
    with self._whole():
      plan = self._scheduler.schedule(self.clock.now())
      self._submit(plan)
    self._process(keep=0 if plan.empty else 1)
    self._call_back()
    ended, self._ended = self._ended, []
    return ended

  def wait(self) -> None:
    """Blocks until the devices are idle, so that a process may end; reads nothing."""
    self._executor.wait()

  def run(self) -> list[Request]:
    """Steps until there is nothing left to do. Returns the requests that ended, in that order."""
    ended = []
    while self.has_work and not self.failed:
      ended += self.step()
    return ended

  def _submit(self, plan: Plan) -> None:
    owned, planned = self._scheduler.pool_blocks_in_use, self.clock.now()
    self.usage.count_pool(owned)
    if plan.empty:
      return
    if self.audits is not None:
      plan = self.audits.plan(plan, self.usage.blocks_attended)
    try:
      step = self._executor.submit(plan)
      self._in_flight.append(_InFlight(plan, step, planned, self.clock.now(), owned))
    except Exception as error:
      self._lose(error)

  @contextlib.contextmanager
  def _whole(self, expected: type[Exception] | tuple[()] = ()):
    """Around what must not be interrupted: afterwards scheduler and devices may disagree."""
    self._check_running()
    try:
      yield
    except expected:
      raise
    except BaseException as error:
      self._failure = error
      raise

  def _check_running(self) -> None:
    if self._failure is not None:
      raise RuntimeError(f"this engine has failed: {self._failure!r}; make a new one")

  def _process(self, keep: int) -> None:
    """Takes the results of the iterations in flight but the newest `keep`. One whose reading is interrupted stays."""
    while len(self._in_flight) > keep:
      flight = self._in_flight[0]
      try:
        result = flight.step.result()
      except Exception as error:
        with self._whole():
          self._lose(error)
        return
      with self._whole():
        self._in_flight.popleft()
        if self.audits is not None and result.audit is not None:
          self.audits.take(flight.plan, result.audit)
        received = self._scheduler.update(result, done := self.clock.now())
        self.usage.count_step(flight.plan, result.stats, len(received.tokens))
        for request, _ in received.tokens:
          if told := result.logprobs.get(request.id):
            top = itertools.islice(told.top.items(), request.n_logprobs)
            request.logprobs.append(told._replace(top=dict(top)))
        self._end(received.ended)
        self._to_call += [functools.partial(self._hand_over, *to) for to in received.tokens if to[0].on_token]
        if self._observer is not None:
          seen = Observed(flight.plan, result, flight.planned, flight.dispatched, done, flight.pool_blocks)
          self._to_call.append(functools.partial(self._observer, seen))
        self._to_call.append(flight.step.on_delivered)  # last: what it starts takes Python's lock

  def _lose(self, error: Exception) -> None:
    """The device failed: all it held is gone, results on their way too. Tells the requests, and begins anew."""
    _LOG.error("the device failed", exc_info=error)
    lost = DeviceError(f"the device failed with {type(error).__name__}: {error}")
    lost.__cause__ = error.with_traceback(None)  # whose frames may hold the cache that the new one takes the place of
    self._in_flight.clear()
    self._end(self._scheduler.lose(lost, self.clock.now()))
    try:
      self._executor.reset()
    except Exception as again:
      self._failure = again
      for request in list(self._live.values()):  # that wait
        self._scheduler.cancel(request, self.clock.now())
        request.fail(lost, self.clock.now())
        self._end([request])

  def _end(self, requests: Sequence[Request]) -> None:
    for request in requests:
      del self._live[request.id]
    self._ended += requests

  def _call_back(self) -> None:
    """Of each result hands out tokens, after all requests have theirs, then tells observer and step. What an interrupt
    keeps from being called is called later."""
    while self._to_call:
      self._to_call.popleft()()

  def _hand_over(self, request: Request, token: int) -> None:
    if request.state is State.CANCELLED:  # by a callback before this one
      return
    assert request.on_token is not None
    try:
      request.on_token(request, token)
    except Exception as error:
      _LOG.exception("request %r: on_token raised, the request is cancelled", request.id)
      request.error = request.error or error
      if not request.ended:
        self.cancel(request.id)

  def _checked_prompt(self, prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    try:
      ids = np.asarray(prompt)
    except (ValueError, OverflowError):  # lists of several lengths
      ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
      raise ValueError(f"a prompt is a list of token ids, got {prompt!r:.80}")
    vocab = self._model.config.vocab_size
    outside = np.flatnonzero((ids < 0) | (ids >= vocab))
    if outside.size:
      at = int(outside[0])
      raise ValueError(
        f"{outside.size} token ids are outside the vocabulary of {vocab}, the first is {int(ids[at])} at position {at}"
      )
    return ids.astype(np.int32)

  def _stops(self, params: SamplingParams) -> frozenset[int]:
    """Tokens that end a request, the model's EOS tokens included."""
    eos = () if params.ignore_eos else self._model.eos_token_ids
    vocab, min_tokens = self._model.config.vocab_size, params.min_tokens
    stops = frozenset(token for token in (*params.stop_token_ids, *eos) if 0 <= token < vocab)  # others never come
    if min_tokens and len(stops) > MAX_BANNED:
      raise ValueError(
        f"{min_tokens=} takes at most {MAX_BANNED} stop tokens, the model's EOS tokens included, got {len(stops)}"
      )
    return stops


def _params_of(options: dict[str, Any]) -> SamplingParams:
  params = SamplingParams(**options)
  if params.stop or params.n > 1:
    raise ValueError("stop and n are for LLM.generate, an engine knows no text")
  return params


def _sampling(params: SamplingParams) -> Sampling:
  return Sampling(
    temperature=params.temperature,
    top_p=params.top_p,
    seed=params.seed,
    top_k=params.top_k,
    min_p=params.min_p,
    logprobs=params.logprobs is not None,
  )
