"""What comes back from an LLM for a prompt."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_serve_jax.serving.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Times:
  """When things happened, in seconds after the request was made; None for what it did not live to see."""

  scheduled: float | None  # until its first work was planned: what it waited for others
  first_token: float | None  # until its first token was there
  between_tokens: float | None  # mean gap between output tokens; None of fewer than two
  total: float  # until it ended


@dataclasses.dataclass(frozen=True)
class Sample:
  """One output of a prompt."""

  text: str  # ends before a stop string
  token_ids: list[int]  # without the stop token, with those that a stop string stands in
  finish_reason: FinishReason  # a stop token or string; max_tokens; `error` says what; cancelled by a callback
  logprobs: list[TokenLogprobs] | None  # one for each token id, if asked for
  times: Times
  cached_tokens: int = 0  # of the prompt, that the cache held when its turn came
  error: str | None = None  # what ended it: logits that are not finite, or a device that failed


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens of a prompt and of all its outputs."""

  prompt_tokens: int
  output_tokens: int
  cached_tokens: int = 0  # of the prompt, that the cache held before its first sample was made

  @property
  def total_tokens(self) -> int:
    return self.prompt_tokens + self.output_tokens


@dataclasses.dataclass(frozen=True)
class RequestOutput:
  """What became of one prompt: `n` samples, of which the first can be read without asking for it."""

  prompt_token_ids: list[int]
  samples: tuple[Sample, ...]

  @property
  def text(self) -> str:
    return self.samples[0].text

  @property
  def token_ids(self) -> list[int]:
    return self.samples[0].token_ids

  @property
  def finish_reason(self) -> FinishReason:
    return self.samples[0].finish_reason

  @property
  def logprobs(self) -> list[TokenLogprobs] | None:
    return self.samples[0].logprobs

  @property
  def times(self) -> Times:
    return self.samples[0].times

  @property
  def error(self) -> str | None:
    return self.samples[0].error

  @property
  def usage(self) -> Usage:
    n_output = sum(len(sample.token_ids) for sample in self.samples)
    return Usage(len(self.prompt_token_ids), n_output, self.samples[0].cached_tokens)
