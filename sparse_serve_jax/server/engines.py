"""What the endpoints need of engines, and the one engine of this process. `replicas.Fleet` has engines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from prometheus_client import Metric

from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import Model, place_params
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server.measures import Measures
from sparse_serve_jax.server.scoring import prompt_logprobs
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.loop import Loop, Sink, Stream
from sparse_serve_jax.serving.plan import TokenLogprobs

Scores = list[TokenLogprobs | None]  # of the tokens of a prompt


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
    """As `prompt_logprobs`, of engines with tp=1. Raises RuntimeError: no engine takes requests now."""
    ...

  def ended(self, stream: Stream) -> None:
    """Counts a stream, once, after its end."""
    ...

  def health(self) -> dict[str, Any]:
    """Under "status" "ok", or "failed" if no engine takes requests now; and more, where there is more to tell."""
    ...

  def collect(self) -> Iterable[Metric]:
    """What /metrics tells of them. May wait for other processes."""
    ...

  def close(self) -> None:
    """Ends what lives, and the engines."""
    ...


class One:
  """The engine of this process, in a thread of its own."""

  def __init__(self, engine: Engine, model: Model):
    """Takes an engine that is idle, and from now on this one's."""
    self.config, self.max_request_tokens = engine.config, engine.max_request_tokens
    # The engine's own, not a copy; split over devices they score no prompts.
    self._weights = place_params(model, make_mesh(1)) if engine.config.tp == 1 else None
    self._model, self._loop = model, Loop(engine)
    self._measures = Measures(engine, self._loop)
    self.submit, self.cancel, self.close = self._loop.submit, self._loop.cancel, self._loop.close
    self.collect = self._measures.registry.collect

  @property
  def failed(self) -> bool:
    return self._loop.failed

  def score(self, prompt: list[int], n_top: int) -> Future[Scores]:
    cfg, weights = self._model.config, self._weights
    assert weights is not None
    return self._loop.call(lambda: prompt_logprobs(cfg, weights, prompt, n_top))

  def ended(self, stream: Stream) -> None:
    if stream.request is not None:
      self._measures.ended(stream.request)

  def health(self) -> dict[str, Any]:
    return {"status": "failed" if self.failed else "ok"}
