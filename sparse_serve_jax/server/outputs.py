"""Outputs that are on their way: tokens cross from the engine's thread to the event loop and become text there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from typing import NamedTuple

from sparse_serve_jax.outputs import Reading
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server.engines import Engines, Scores
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.serving.loop import Stream
from sparse_serve_jax.serving.plan import TokenLogprobs
from sparse_serve_jax.tokenizing import Tokenizer

_LOG = logging.getLogger(__name__)


class Piece(NamedTuple):
  """What is new of an output."""

  output: Output
  text: str
  token: int | None  # None at the end
  logprobs: TokenLogprobs | None
  offset: int = 0  # where the token begins in the text of the output


class Output:
  """One sample of one prompt. Belongs to the event loop."""

  def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams, news: asyncio.Queue[Piece]):
    self.index, self._news, self._wants = index, news, params.logprobs is not None
    self.reading = Reading(tokenizer, params, pieces=True)
    self.stream: Stream | None = None
    self.refused: Refused | None = None  # why it was given up
    self.ended = False

  @property
  def finish_reason(self) -> str | None:
    """After the end."""
    request = self.stream.request if self.stream else None
    return self.reading.finish_reason(request) if request else None

  def end(self, refused: Refused) -> None:
    """In place of what would come."""
    self.ended, self.refused = True, refused
    self._news.put_nowait(Piece(self, "", None, None))

  def take(self, token: int | None) -> None:
    if token is None:
      self._news.put_nowait(Piece(self, self.reading.finish(), None, None))
      self.ended = True
      request = self.stream.request if self.stream else None
      if request and self.reading.stopped and request.finish_reason not in ("error", None):  # None: its engine is lost
        request.cut(self.reading.n_tokens)
    elif not self.reading.stopped:
      assert self.stream is not None and self.stream.request is not None
      told = self.stream.request.logprobs[self.reading.n_tokens] if self._wants else None
      text = self.reading.push(token)
      self._news.put_nowait(Piece(self, text, token, told, self.reading.offset if self._wants else 0))


class Outputs:
  """All outputs of a server that have not ended. The event loop is woken once for what comes together."""

  def __init__(self, engines: Engines, tokenizer: Tokenizer):
    self._engines, self._tokenizer = engines, tokenizer
    self._events = asyncio.get_running_loop()
    self._lock = threading.Lock()  # guards the next two
    self._come: deque[tuple[Stream, int | None]] = deque()
    self._woken = False
    self._of: dict[Stream, Output] = {}
    self._scores: dict[asyncio.Future[Scores], Refused | None] = {}  # and why one was given up
    self._closed: Refused | None = None
    self.n_to_score = 0  # prompts

  @property
  def n_waiting(self) -> int:
    """Outputs without a token, and prompts that are to be scored."""
    return sum(output.reading.n_tokens == 0 for output in self._of.values()) + self.n_to_score

  def add(self, index: int, prompt: list[int], params: SamplingParams, news: asyncio.Queue[Piece]) -> Output:
    """Raises RuntimeError: no engine takes it; Refused: all is given up."""
    self._check()
    output = Output(index, self._tokenizer, params, news)
    output.stream = self._engines.submit(prompt, sink=self._sink, params=params)
    self._of[output.stream] = output
    return output

  async def score(self, prompt: list[int], n_top: int) -> Scores:
    """As `Engines.score`. Raises Refused: it was given up."""
    self._check()
    told = asyncio.wrap_future(self._engines.score(prompt, n_top))
    self._scores[told] = None
    try:
      return await told
    except asyncio.CancelledError:
      raise self._scores[told] or asyncio.CancelledError from None
    finally:
      del self._scores[told]

  def leave(self, output: Output) -> None:
    """Nobody waits for it any more: ends it, and what still comes of it is not read."""
    output.ended = True
    self._cancel(output)

  def give_up(self, why: Refused) -> None:
    """Ends all outputs and scores that live for their clients, whatever their engines do."""
    for told in self._scores:
      self._scores[told] = why
      told.cancel()
    for output in self._of.values():
      if not output.ended:
        self._give_up(output, why)

  def close(self, why: Refused) -> None:
    """Gives up all that lives, and what comes."""
    self._closed = why
    self.give_up(why)

  def _check(self) -> None:
    if self._closed is not None:
      raise self._closed

  def _give_up(self, output: Output, why: Refused) -> None:
    self._cancel(output)
    output.end(why)

  def _cancel(self, output: Output) -> None:
    if output.stream is not None:
      self._engines.cancel(output.stream)

  def _sink(self, stream: Stream, token: int | None) -> None:
    """Called by an engine's thread."""
    with self._lock:
      self._come.append((stream, token))
      wake, self._woken = not self._woken, True
    if wake:
      with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody waits
        self._events.call_soon_threadsafe(self._deliver)

  def _deliver(self) -> None:
    with self._lock:
      come, self._come, self._woken = self._come, deque(), False
    for stream, token in come:
      output = self._of[stream]
      stopped = output.reading.stopped
      try:
        if not output.ended:  # it may have been given up
          output.take(token)
      except Exception as error:  # of its tokenizer; others go on
        _LOG.exception("an output has no text")
        self._give_up(output, Refused(500, f"{type(error).__name__}: {error}"))
      if token is None:
        del self._of[stream]
        self._engines.ended(stream)
      elif output.reading.stopped and not stopped:
        self._engines.cancel(stream, "stop")
