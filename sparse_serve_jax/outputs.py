"""What comes back for a prompt: text as it comes, and what became of it at the end."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from sparse_serve_jax.detokenizer import Detokenizer
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.serving.metrics import request_metrics
from sparse_serve_jax.serving.plan import TokenLogprobs
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.tokenizing import Tokenizer

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
    """Of prompt and outputs."""
    return self.prompt_tokens + self.output_tokens


@dataclasses.dataclass(frozen=True)
class RequestOutput:
  """What became of one prompt: `n` samples, of which the first can be read without asking for it."""

  prompt_token_ids: list[int]
  samples: tuple[Sample, ...]

  @property
  def text(self) -> str:
    """Of the first sample."""
    return self.samples[0].text

  @property
  def token_ids(self) -> list[int]:
    """Of the first sample."""
    return self.samples[0].token_ids

  @property
  def finish_reason(self) -> FinishReason:
    """Of the first sample."""
    return self.samples[0].finish_reason

  @property
  def logprobs(self) -> list[TokenLogprobs] | None:
    """Of the first sample; None unless asked for."""
    return self.samples[0].logprobs

  @property
  def times(self) -> Times:
    """Of the first sample."""
    return self.samples[0].times

  @property
  def error(self) -> str | None:
    """Of the first sample: what ended it, None if nothing did."""
    return self.samples[0].error

  @property
  def usage(self) -> Usage:
    """Tokens of the prompt and of all samples."""
    n_output = sum(len(sample.token_ids) for sample in self.samples)
    return Usage(len(self.prompt_token_ids), n_output, self.samples[0].cached_tokens)


class Reading:
  """One request's tokens as they become text, up to a stop string."""

  def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, pieces: bool):
    """`pieces`: the text is wanted as it comes. If not, and without stop strings, it is made at the end, at once."""
    self._tokenizer, self._wants_logprobs = tokenizer, params.logprobs is not None
    wanted = pieces or bool(params.stop)
    self._detokenizer = Detokenizer(tokenizer, params.stop, params.min_tokens) if wanted else None
    self.n_tokens = 0  # that were pushed, up to the one that ended a stop string

  @property
  def stopped(self) -> bool:
    """Whether a stop string has come: tokens that follow were on their way, and are not pushed."""
    return self._detokenizer is not None and self._detokenizer.stopped

  @property
  def offset(self) -> int:
    """Where the newest token begins in the text, as of `Detokenizer`; 0 without pieces."""
    return self._detokenizer.offset if self._detokenizer else 0

  @property
  def text(self) -> str:
    """That is certain, if it is wanted as it comes."""
    return self._detokenizer.text if self._detokenizer else ""

  def push(self, token: int) -> str:
    """Takes the next token. Returns the text that is certain now and was not before, often none."""
    self.n_tokens += 1
    return self._detokenizer.push(token) if self._detokenizer else ""

  def finish(self) -> str:
    """After the last token: the rest of the text, which is told once."""
    return self._detokenizer.finish() if self._detokenizer else ""

  def finish_reason(self, request: Request) -> FinishReason:
    """After the end."""
    failed = request.finish_reason == "error"
    return "stop" if self.stopped and not failed else cast(FinishReason, request.finish_reason)

  def sample(self, request: Request) -> Sample:
    """After the end."""
    self.finish()
    if self._detokenizer is None:
      tokens, text = request.output_tokens, self._tokenizer.decode(request.output_tokens)
    else:
      tokens, text = request.output_tokens[: self.n_tokens], self._detokenizer.text
    told = request.logprobs[: len(tokens)] if self._wants_logprobs else None
    times, reason = request_metrics(request), self.finish_reason(request)
    assert times["total_s"] is not None
    at = Times(times["scheduling_delay_s"], times["ttft_s"], times["tbt_mean_s"], times["total_s"])
    return Sample(
      text, tokens, reason, told, at, request.cached_tokens, str(request.error) if reason == "error" else None
    )
