"""Replicas of an engine, each in a process of its own with its own devices and memory: actors of Ray.

The front stays one process. It asks each replica, again and again, for all that happened since it asked last, so that
an iteration's tokens come in one message; what it tells a replica are notes without an answer. A replica that dies,
does not answer, or whose engine does not go on, ends its requests with an error, and another takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sparse_serve_jax import cluster, progress, runtime
from sparse_serve_jax.buckets import MOST_PROGRAMS
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.prefix import hash_chain
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server.engines import One, Scores
from sparse_serve_jax.server.limits import STUCK_S
from sparse_serve_jax.server.pulse import COMPILING, Health, ReplicaHealth
from sparse_serve_jax.server.routing import Router
from sparse_serve_jax.server.status import Told
from sparse_serve_jax.serving.loop import Sink, Stream, failure_of
from sparse_serve_jax.serving.plan import TokenLogprobs
from sparse_serve_jax.serving.request import Request

_LOG = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between a replica's looks at whether its engine goes on, while nothing happens
_SILENT = 5  # looks without an answer, after which a replica gets no new requests while another answers
_TRIES, _PAUSE = 3, 5.0  # starts of a replica that takes the place of another, and seconds between them
_TOLD_SOON, _CLOSED_SOON = 2.0, 30.0  # seconds in which a replica tells its numbers, and ends
_DEEPEST = 512  # blocks of a prompt that it is routed by


class Ended(NamedTuple):
  reason: str | None  # None: it was never taken, and there is an error
  cached_tokens: int
  error: Exception | None


class Happened(NamedTuple):
  """What happened to a request: a token, or its end."""

  name: int
  token: int | None
  logprobs: TokenLogprobs | None
  ended: Ended | None


# ---------------------------------------------------------------------------------------------------------- the replica


class Replica:
  """What runs within an actor. Threads of Ray's call it."""

  def where(self) -> tuple[str, int]:
    """Ray's name of the host that it is on, and its process there."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()

  def start(
    self, config: EngineConfig, model: str, dtype: str | None, stuck_s: float, compiled: bool, sharing: int
  ) -> tuple[EngineConfig, int]:
    """Makes the engine as `One.start` does. `stuck_s` is as of `pulse.Pulse`.

    Returns:
      The configuration with its sizes, and the most tokens of a request.

    Raises:
      ValueError: the model is none, or the engine does not fit.
    """
    progress.log_warnings()
    runtime.configure()
    loaded = load_model_here(model, dtype=dtype)
    self._look = min(_LOOK, stuck_s / 4)
    self._changed = threading.Condition()  # guards the next four
    self._come: deque[tuple[int, Stream, int | None]] = deque()
    self._streams: dict[int, Stream] = {}
    self._n_told: Counter[int] = Counter()  # tokens
    self._gone: set[int] = set()  # cancelled before they came, as a long prompt is passed by its cancellation
    self._one = One.start(config, loaded, stuck_s, compiled=compiled, sharing=sharing)
    return self._one.config, self._one.max_request_tokens

  def submit(self, name: int, prompt: np.ndarray, params: SamplingParams) -> None:
    sink = functools.partial(self._sink, name)
    try:
      stream = self._one.submit(prompt, sink=sink, params=params)
    except RuntimeError as error:  # the engine has failed or stands still; it may go on before `news` sees that
      return _Remote(name, prompt, params, sink).end(Ended(None, 0, error))
    with self._changed:
      self._streams[name] = stream
      gone = name in self._gone
      self._gone.discard(name)
    if gone:
      self._one.cancel(stream)

  def cancel(self, name: int, reason: str) -> None:
    with self._changed:
      stream = self._streams.get(name)
      if stream is None:
        self._gone.add(name)
    if stream is not None:
      self._one.cancel(stream, reason)

  def ended(self, name: int, n_tokens: int | None) -> None:
    """The front has heard the end of a request; `n_tokens` are all that it has if a stop string has ended it."""
    with self._changed:
      stream = self._streams.pop(name, None)
      self._gone.discard(name)  # a cancellation that came after the end
    if stream is not None:
      if n_tokens is not None and stream.request is not None:
        stream.request.cut(n_tokens)
      self._one.ended(stream)

  def news(self) -> list[Happened]:
    """Waits for something to tell, or a moment. Raises RuntimeError: the engine has failed or is stuck, and all is
    told.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._come, self._look)
      come, self._come = self._come, deque()
    if not come and (told := self._one.health()).status != "ok":
      raise RuntimeError(told.why)
    return [self._tell(*item) for item in come]

  def score(self, prompt: np.ndarray, n_top: int) -> Scores:
    return self._one.score(prompt.tolist(), n_top).result()

  def collect(self) -> list[Metric]:
    return list(self._one.collect())

  def sample(self) -> None:
    self._one.sample()

  def told(self) -> Told:
    (told,) = self._one.told().values()
    return told

  def close(self) -> None:
    self._one.close()

  def _sink(self, name: int, stream: Stream, token: int | None) -> None:
    """Called by the engine's thread."""
    with self._changed:
      self._come.append((name, stream, token))
      self._changed.notify_all()

  def _tell(self, name: int, stream: Stream, token: int | None) -> Happened:
    request = stream.request
    with self._changed:
      n = self._n_told[name]
      self._n_told[name] += 1
      if token is None:
        del self._n_told[name]
    if token is not None:
      assert request is not None
      return Happened(name, token, request.logprobs[n] if request.logprobs else None, None)
    error = stream.error and (ValueError if isinstance(stream.error, ValueError) else RuntimeError)(str(stream.error))
    return Happened(
      name, None, None, Ended(request and request.finish_reason, request.cached_tokens if request else 0, error)
    )


# ------------------------------------------------------------------------------------------------------------ the front


class _Remote(Stream):
  """A request that a replica serves. Its `request` mirrors what the answer to a client is made of."""

  def __init__(self, name: int, prompt: np.ndarray, params: SamplingParams, sink: Sink):
    super().__init__(prompt, {"params": params, "arrival_time": time.monotonic()}, sink)
    self.name, self._mirror = name, Request(str(name), prompt, params.max_tokens, self.arrival_time)
    self.actor: Any = None  # that serves it, or has; None: it is lost
    self.broken: Exception | None = None  # what its sink has raised with a token: it gets no others

  def take(self, told: Happened) -> None:
    if told.ended is not None:
      return self.end(told.ended)
    if self.broken is not None:  # and its end is on its way
      return None
    assert told.token is not None
    self._request = self._mirror
    if told.logprobs is not None:
      self._mirror.logprobs.append(told.logprobs)
    self._mirror.output_tokens.append(told.token)
    self._take(self._mirror, told.token)

  def end(self, ended: Ended) -> None:
    if ended.reason is not None:
      self._request = self._mirror
      self._mirror.cached_tokens = ended.cached_tokens
      self._mirror.end(ended.reason, time.monotonic())
    self._end(ended.error if self.broken is None else failure_of("the request", self.broken))


@dataclasses.dataclass
class _Place:
  """Where one replica after another serves."""

  index: int
  actor: Any
  where: tuple[str, int] | None = None
  status: str = "starting"  # then "ok"; "starting" again after a death; "failed" if none could start
  restarts: int = 0
  heard: float = 0.0  # when it last answered, in seconds of `time.monotonic`
  live: dict[int, _Remote] = dataclasses.field(default_factory=dict)

  def begin(self) -> None:
    """From now on it serves."""
    self.status, self.heard = "ok", time.monotonic()


class Fleet:
  """Replicas behind one front; see `engines.Engines`."""

  def __init__(
    self,
    n: int,
    config: EngineConfig,
    model: str,
    dtype: str | None,
    stuck_s: float = STUCK_S,
    *,
    compiled: bool = False,
  ):
    """Starts `n` replicas and waits for them. Each has config.tp GPUs where Ray's cluster has any, and an equal part of
    what `auto` takes of its host. One that does not answer for `stuck_s` seconds has died.

    Raises:
      ValueError: Ray is not there, it has too few GPUs, or as of `Replica.start`.
      ChildProcessError: a replica ended while it started.
    """
    self._ray, self._start = cluster.connect(), (model, dtype, stuck_s, compiled)
    # A program that is compiled may take `COMPILING` times as long: so may each of those that a start compiles.
    self._stuck_s, self._n_compiled = stuck_s, MOST_PROGRAMS if compiled else 1
    gpus = cluster.gpus_each(self._ray, n, config.tp)
    # Notes and news have threads of their own: whoever asks for news waits, and scores take their time. Who asks for
    # numbers leaves a note too: they tell the ends that were noted before.
    groups = {"notes": 1, "news": 1}
    of = dict(num_cpus=0, num_gpus=gpus, max_concurrency=4, concurrency_groups=groups, max_restarts=0)
    self._class = self._ray.remote(**of)(Replica)
    self._lock = threading.Lock()  # guards places and router
    self._places = [_Place(i, self._class.remote()) for i in range(n)]
    self._router, self._names, self._closing = Router(), itertools.count(), False
    for place in self._places:
      place.where = self._get(place.actor.where.remote())
    nodes = [place.where[0] for place in self._places if place.where]
    shares, places = Counter(nodes), zip(self._places, nodes, strict=True)
    started = [place.actor.start.remote(config, *self._start, shares[node]) for place, node in places]
    made = [self._get(one) for one in started]
    self.config, self.max_request_tokens = made[0][0], min(most for _, most in made)
    self._calls = ThreadPoolExecutor(n + 2, "replicas")
    self._watching = [threading.Thread(target=self._watch, args=(place,), daemon=True) for place in self._places]
    for place, thread in zip(self._places, self._watching, strict=True):
      place.begin()
      thread.start()

  @property
  def failed(self) -> bool:
    return all(place.status == "failed" for place in self._places)

  def submit(self, prompt: list[int], *, sink: Sink, params: SamplingParams) -> Stream:
    ids = np.asarray(prompt, np.int32)
    size = self.config.cache.block_tokens
    chain = hash_chain(ids[: _DEEPEST * size], size, params.cache_salt) if self.config.cache.prefix else []
    stream = _Remote(next(self._names), ids, params, sink)
    with self._lock:
      place = self._places[self._router.choose(chain, self._loads())]
      place.live[stream.name], stream.actor = stream, place.actor
      place.actor.submit.options(concurrency_group="notes").remote(stream.name, ids, params)
    return stream

  def cancel(self, stream: Stream, reason: str = "cancelled") -> None:
    with self._lock:
      for place in self._places:
        if isinstance(stream, _Remote) and stream.name in place.live:
          place.actor.cancel.options(concurrency_group="notes").remote(stream.name, reason)

  def score(self, prompt: list[int], n_top: int) -> Future[Scores]:
    with self._lock:
      actor = self._places[self._router.choose([], self._loads())].actor
    return self._calls.submit(self._scored, actor.score.remote(np.asarray(prompt, np.int32), n_top))

  def ended(self, stream: Stream) -> None:
    request = stream.request
    if isinstance(stream, _Remote) and stream.actor is not None:
      n_tokens = len(request.output_tokens) if request and request.finish_reason == "stop" else None
      stream.actor.ended.options(concurrency_group="notes").remote(stream.name, n_tokens)

  def health(self) -> Health:
    with self._lock:
      each = {str(p.index): ReplicaHealth(p.status, len(p.live), p.restarts) for p in self._places}
    return Health("ok" if any(of.status == "ok" for of in each.values()) else "failed", replicas=each)

  def collect(self) -> Iterator[Metric]:
    """The numbers of every replica that answers, with its label, and which replicas serve."""
    up = GaugeMetricFamily("sparse_serve_replica_up", "Whether the replica serves.", labels=["replica"])
    restarts = CounterMetricFamily("sparse_serve_replica_restarts", "Times it was started anew.", labels=["replica"])
    families: dict[str, Metric] = {}
    for place, metrics in self._asked("collect"):
      for metric in metrics:
        of = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        of.samples += [s._replace(labels={**s.labels, "replica": str(place.index)}) for s in metric.samples]
    for place in self._places:
      up.add_metric([str(place.index)], place.status == "ok")
      restarts.add_metric([str(place.index)], place.restarts)
    yield from (up, restarts, *families.values())

  def sample(self) -> None:
    for place in self._places:
      if place.status == "ok":
        place.actor.sample.options(concurrency_group="notes").remote()

  def told(self) -> dict[int | None, Told]:
    return {place.index: told for place, told in self._asked("told")}

  def close(self) -> None:
    self._closing = True
    closed = [(place, place.actor.close.remote()) for place in self._places if place.status == "ok"]
    until = time.monotonic() + _CLOSED_SOON
    for place, ref in closed:
      try:
        self._get(ref, max(0.0, until - time.monotonic()))
      except Exception as error:  # the others are closed all the same
        self._end(place, error)
    for place in self._places:
      self._ray.kill(place.actor)
    for thread in self._watching:
      thread.join(_CLOSED_SOON)
    for place in self._places:  # a thread ends before it has told all that happened
      with self._lock:
        left, place.live = place.live, {}
      for stream in left.values():
        stream.end(Ended(None, 0, RuntimeError("the engines end, and this request is given up")))
    self._calls.shutdown(wait=False)

  def _asked(self, what: str) -> Iterator[tuple[_Place, Any]]:
    """What a call returns of each replica that serves and answers soon."""
    serve = [place for place in self._places if place.status == "ok"]
    refs = [getattr(place.actor, what).options(concurrency_group="notes").remote() for place in serve]
    until = time.monotonic() + _TOLD_SOON
    for place, ref in zip(serve, refs, strict=True):
      with contextlib.suppress(OSError, RuntimeError):  # it is not there any more, or does not answer
        yield place, self._get(ref, max(0.0, until - time.monotonic()))

  def _loads(self) -> dict[int, int]:
    """Of replicas that serve, those that answer if any does. Call with the lock held. Raises RuntimeError: none
    serves.
    """
    serve = [place for place in self._places if place.status == "ok"]
    if not serve:
      raise RuntimeError(f"no replica serves now: {', '.join(f'{p.index} {p.status}' for p in self._places)}")
    since = time.monotonic() - _SILENT * _LOOK
    return {place.index: len(place.live) for place in [p for p in serve if p.heard > since] or serve}

  def _scored(self, ref: Any) -> Scores:
    try:
      return self._get(ref)
    except OSError as error:
      raise RuntimeError(str(error)) from None

  def _get(self, ref: Any, timeout: float | None = None) -> Any:
    """What a call of a replica returned. Raises what the call did; ChildProcessError: the replica has ended;
    TimeoutError.
    """
    exceptions = self._ray.exceptions
    try:
      return self._ray.get(ref, timeout=timeout)
    except exceptions.RayTaskError as error:
      raise error.cause from None
    except exceptions.GetTimeoutError:
      raise TimeoutError(f"it has not answered for {timeout:.0f} s") from None
    except exceptions.RayError as error:
      raise ChildProcessError(f"a replica has ended: {error}") from None

  def _watch(self, place: _Place) -> None:
    """A thread for each place: hands out what its replica tells, and replaces one that has died."""
    while not self._closing:
      try:
        told = self._get(place.actor.news.options(concurrency_group="news").remote(), self._stuck_s)
      except Exception as error:  # whatever it is: nobody else looks after the place
        if not self._lost(place, error):
          return
        continue
      place.heard = time.monotonic()
      for one in told:
        with self._lock:
          stream = place.live.get(one.name) if one.ended is None else place.live.pop(one.name, None)
        if stream is None:  # `close` has ended it
          continue
        try:
          stream.take(one)
        except Exception as error:  # its own stream ends by it alone, as in a `Loop`
          _LOG.exception("a sink raised with a token, and its request ends")
          stream.broken = error
          self.cancel(stream)

  def _end(self, place: _Place, error: Exception) -> None:
    """Ends the process of a replica that is lost. Ray only asks it to end, which one that hangs does not hear."""
    if place.where is not None and not isinstance(error, ChildProcessError):
      cluster.end_process(self._ray, *place.where)
    self._ray.kill(place.actor)

  def _lost(self, place: _Place, error: Exception) -> bool:
    """Ends the requests of a replica that has died or is stuck and starts another. Returns whether one serves now."""
    with self._lock:
      place.status, lost, place.live = "starting", place.live, {}
      self._router.forget(place.index)
    why = f"replica {place.index}{' has died' if isinstance(error, ChildProcessError) else f': {error}'}"
    for stream in lost.values():
      stream.actor = None
      stream.end(Ended(None, 0, RuntimeError(f"{why}, and what it had to answer is lost")))
    if self._closing:
      return False
    _LOG.error("%s; it had %d requests, and another is started: %s", why, len(lost), error)
    for i in range(_TRIES):
      self._end(place, error)
      time.sleep(_PAUSE * bool(i))
      if self._closing:
        return False
      place.actor, place.where = self._class.remote(), None
      try:
        place.where = self._get(place.actor.where.remote(), COMPILING * self._stuck_s)
        starting = place.actor.start.remote(self.config, *self._start, 1)  # its sizes stand since the first start
        self._get(starting, COMPILING * self._stuck_s * self._n_compiled)
      except Exception as again:
        error = again
        _LOG.error("replica %d cannot be started: %s", place.index, again)
        continue
      with self._lock:
        place.begin()
        place.restarts += 1
      return True
    with self._lock:
      place.status = "failed"
    return False
