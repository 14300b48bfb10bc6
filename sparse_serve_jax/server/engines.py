"""What the endpoints need of engines, and the one engine of this process. `replicas.Fleet` has engines elsewhere."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from prometheus_client import Metric

from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import Model, place_params
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server.limits import STUCK_S
from sparse_serve_jax.server.measures import Measures
from sparse_serve_jax.server.pulse import Health, Pulse
from sparse_serve_jax.server.scoring import Scorer
from sparse_serve_jax.server.status import Status, Told
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.loop import Loop, Sink, Stream
from sparse_serve_jax.serving.plan import TokenLogprobs

Scores = list[TokenLogprobs | None]  # of the tokens of a prompt
_LOG = logging.getLogger(__name__)


class Engines(Protocol):
  """One engine or several. Any thread calls them."""

  config: EngineConfig  # of each
  max_request_tokens: int  # prompt and output tokens that one request can have

  @property
  def failed(self) -> bool:
    """Whether none of them will ever serve again."""
    ...

  def submit(self, prompt: list[int], *, sink: Sink, params: SamplingParams) -> Stream:
    """As `Loop.submit`. Raises RuntimeError: no engine takes requests now."""
    ...

  def cancel(self, stream: Stream, reason: str = "cancelled") -> None:
    """As `Loop.cancel`."""
    ...

  def score(self, prompt: list[int], n_top: int) -> Future[Scores]:
    """As `Scorer`, of engines with tp=1. Raises RuntimeError: no engine takes requests now."""
    ...

  def ended(self, stream: Stream) -> None:
    """Counts a stream, once, after its end and as its request is now."""
    ...

  def health(self) -> Health: ...

  def collect(self) -> Iterable[Metric]:
    """What /metrics tells of them. May wait for other processes."""
    ...

  def sample(self) -> None:
    """Has each keep how it is now, for `told`. Returns at once."""
    ...

  def told(self) -> Mapping[int | None, Told]:
    """What each that answers tells, for /status, by its number; None is the only one. May wait for other processes."""
    ...

  def close(self) -> None:
    """Ends what lives, and the engines."""
    ...


class One:
  """The engine of this process, in a thread of its own."""

  def __init__(self, engine: Engine, model: Model, stuck_s: float = STUCK_S):
    """Takes an engine that is idle, and from now on this one's; see `Pulse`."""
    self.config, self.max_request_tokens = engine.config, engine.max_request_tokens
    self._model, self._loop = model, Loop(engine)
    self._pulse = Pulse(self._loop, stuck_s)
    self._measures, self._status = Measures(engine, self._loop), Status(engine, self._loop)
    self.cancel = self._loop.cancel
    self.collect, self.sample = self._measures.registry.collect, self._status.sample

  @classmethod
  def start(
    cls, config: EngineConfig, model: Model, stuck_s: float = STUCK_S, *, compiled: bool = False, sharing: int = 1
  ) -> One:
    """Makes the engine, one of `sharing` on this host; `compiled`: with its programs for requests of all
    lengths, but those that tell log probabilities.

    Raises:
      ValueError: it does not fit.
    """
    executor = JaxExecutor(config, model, sharing)
    if compiled:
      begun = time.monotonic()
      n = executor.compile(range(1, executor.shape.max_context), sampled=True)
      _LOG.warning("%d programs compiled in %.0f s", n, time.monotonic() - begun)
    return cls(Engine(executor), model, stuck_s)

  @property
  def failed(self) -> bool:
    return self._loop.failed

  @functools.cached_property
  def _scorer(self) -> Scorer:
    """Over the engine's own weights, not a copy. Those that are split over devices score no prompts."""
    assert self.config.tp == 1
    return Scorer(self._model.config, place_params(self._model, make_mesh(1)))

  def submit(self, prompt: Sequence[int] | np.ndarray, *, sink: Sink, params: SamplingParams) -> Stream:
    self._check()
    return self._loop.submit(prompt, sink=sink, params=params)

  def score(self, prompt: list[int], n_top: int) -> Future[Scores]:
    self._check()
    return self._loop.call(lambda: self._scorer(prompt, n_top))

  def ended(self, stream: Stream) -> None:
    self._status.ended(stream)
    if stream.request is not None:
      self._measures.ended(stream.request)

  def health(self) -> Health:
    still = self._pulse.still()
    if self.failed or still is None:
      return Health("failed" if self.failed else "ok")
    return Health("stuck", round(still))

  def told(self) -> dict[int | None, Told]:
    return {None: self._status.told()}

  def close(self) -> None:
    self._loop.close()
    self._pulse.close()

  def _check(self) -> None:
    """Raises RuntimeError: the engine does not go on."""
    if (told := self.health()).status == "stuck":
      raise RuntimeError(told.why)
