"""A request: what was asked, how far it is, when what happened."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

import numpy as np

from sparse_serve_jax.serving.plan import Sampling, TokenLogprobs


class State(enum.Enum):
  """Life of a request, as planned: the device may be one iteration behind."""

  WAITING = "waiting"  # for a lane and pool blocks, at first or since it was preempted
  PREFILLING = "prefilling"
  DECODING = "decoding"  # running or paused
  FINISHED = "finished"
  CANCELLED = "cancelled"
  FAILED = "failed"  # its logits were not finite, or the device failed; `error` says which


@dataclasses.dataclass(eq=False)
class Request:
  """One prompt and what became of it. Times are seconds of the engine's clock.

  The stop token that ends a request is not part of `output_tokens`.
  """

  id: str
  prompt: np.ndarray  # int32 [T]
  max_new_tokens: int
  arrival_time: float
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  stop_token_ids: frozenset[int] = frozenset()  # the model's EOS tokens included, unless they are to be ignored
  min_tokens: int = 0  # output tokens before a stop token can be drawn
  n_logprobs: int = 0  # most likely tokens that are listed in `logprobs`, if `sampling` wants them
  cache_salt: str | None = None  # it shares blocks with requests of the same salt
  on_token: Callable[[Request, int], None] | None = None  # called with every output token, as it is read

  state: State = State.WAITING
  output_tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)  # one for each output token, or none
  chain: list[bytes] = dataclasses.field(default_factory=list)  # hashes of the full blocks it prefills, if it may share
  cached_tokens: int = 0  # of its prompt, that were in the pool when it was admitted: its prefill began after them
  pool_blocks: int = 0  # that it holds, those that it shares included
  preemptions: int = 0  # times that its lane and blocks were taken from it before it had ended
  lost_tokens: int = 0  # of which it held KV when that happened last
  recomputed_tokens: int = 0  # of which it had held KV, and which were not in the pool when it was admitted again
  finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
  error: Exception | None = None  # why it failed; or what on_token raised, for which it was cancelled
  scheduled_time: float | None = None  # its first work was planned
  first_token_time: float | None = None  # its first token was read, even if that was a stop token
  token_times: list[float] = dataclasses.field(default_factory=list)  # one for each output token
  finish_time: float | None = None

  @property
  def tokens(self) -> np.ndarray:
    """The prompt and the output tokens that are known, int32."""
    return np.concatenate([self.prompt, np.array(self.output_tokens, np.int32)])

  @property
  def ended(self) -> bool:
    """Whether it is finished, cancelled or failed."""
    return self.state in (State.FINISHED, State.CANCELLED, State.FAILED)

  def sampling_of(self, index: int) -> Sampling:
    """How output token `index`, from 0 on, is drawn."""
    if index >= self.min_tokens:
      return self.sampling
    return dataclasses.replace(self.sampling, banned=self.stop_token_ids)

  def receive(self, token: int, now: float) -> bool:
    """Takes the next token, at the time `now`. Returns whether it is an output token, so not a stop token."""
    if self.first_token_time is None:
      self.first_token_time = now
    if token in self.stop_token_ids:
      self.end("stop", now)
      return False
    self.output_tokens.append(token)
    self.token_times.append(now)
    if len(self.output_tokens) == self.max_new_tokens:
      self.end("length", now)
    return True

  def fail(self, error: Exception, now: float) -> None:
    """Closes the request at the time `now` because of `error`; it keeps the tokens it has."""
    self.error = error
    self.end("error", now)

  def end(self, reason: str, now: float) -> None:
    """Closes the request at the time `now` for `reason`: "stop", "length", "cancelled" or "error"."""
    self.state = {"cancelled": State.CANCELLED, "error": State.FAILED}.get(reason, State.FINISHED)
    self.finish_reason, self.finish_time, self.pool_blocks = reason, now, 0

  def cut(self, n_tokens: int) -> None:
    """After its end: a stop string has ended its text within `n_tokens`, and others were on their way."""
    assert self.finish_time is not None
    for of in (self.output_tokens, self.token_times, self.logprobs):
      del of[n_tokens:]
    self.end("stop", self.finish_time)
