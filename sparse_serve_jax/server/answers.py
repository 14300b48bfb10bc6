"""From what is asked to an answer: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from sparse_serve_jax.detokenizer import offsets
from sparse_serve_jax.models import Model
from sparse_serve_jax.server.asked import Asked
from sparse_serve_jax.server.bodies import Bodies, Scored, usage
from sparse_serve_jax.server.engines import Engines
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.server.outputs import Output, Outputs, Piece
from sparse_serve_jax.tokenizing import Tokenizer


class Served(Protocol):
  """What answers need of a server."""

  model: Model
  served: str  # the model's name
  engines: Engines
  outputs: Outputs


class Answer:
  """Of one request. Whatever ends it, `close` cancels what has not ended."""

  def __init__(self, asked: Asked, served: Served):
    self._asked = asked
    self._model, self._engines, self._of_server = served.model, served.engines, served.outputs
    self._bodies = Bodies(asked.chat, served.served, served.model.tokenizer)
    self._news: asyncio.Queue[Piece] = asyncio.Queue()
    self._outputs: list[Output] = []
    self._prompts: list[tuple[str, list[Scored]]] = [("", [])] * len(asked.prompts)  # text and tokens of echoes
    self._n_to_score = 0

  def submit(self) -> None:
    """All outputs, at once, or none."""
    asked = self._asked
    self._await_scores(0 if asked.params.logprobs is None else len(asked.echoes))
    try:
      with self._refusing():
        for i, prompt in enumerate(asked.prompts if asked.max_tokens else []):
          for j in range(asked.params.n):
            params = asked.params_of(i, j)
            self._outputs.append(self._of_server.add(i * asked.params.n + j, prompt, params, self._news))
    except BaseException:
      self.close()
      raise

  async def score(self) -> None:
    """The prompts, if they are to be told."""
    with self._refusing():
      if self._asked.echoes:
        each = zip(self._asked.prompts, self._asked.echoes, strict=True)
        self._prompts = [await self._echo(prompt, text) for prompt, text in each]
        self._await_scores(0)

  def _await_scores(self, n: int) -> None:
    """So many prompts are to be scored from now on."""
    self._of_server.n_to_score += n - self._n_to_score
    self._n_to_score = n

  @contextlib.contextmanager
  def _refusing(self):
    try:
      yield
    except RuntimeError as error:  # no engine takes it
      raise Refused(500 if self._engines.failed else 503, str(error)) from error

  def close(self) -> None:
    self._await_scores(0)
    for output in self._outputs:
      if not output.ended:
        self._of_server.leave(output)
    while not self._news.empty():  # pieces have their outputs, which have the queue
      self._news.get_nowait()

  async def whole(self) -> dict[str, Any]:
    n = self._asked.params.n
    texts = [self._prompts[i // n][0] for i in range(len(self._prompts) * n)]
    tokens = [list(self._prompts[i // n][1]) for i in range(len(self._prompts) * n)]
    async for piece in self._pieces():
      texts[piece.output.index] += piece.text
      tokens[piece.output.index] += self._scored(piece)
    wants = self._asked.params.logprobs is not None
    reasons = [output.finish_reason for output in self._outputs] or ["length"] * len(texts)
    choices = [
      self._bodies.choice(i, text, self._bodies.logprobs(tokens[i]) if wants else None, reasons[i])
      for i, text in enumerate(texts)
    ]
    return self._bodies.whole(choices, self._usage())

  async def events(self) -> AsyncIterator[bytes]:
    """Server-sent events. The first comes with the first piece, so that what is refused before it has a status."""
    empty = {"usage": None} if self._asked.usage else {}
    bodies, begun = self._bodies, False
    try:
      async for piece in self._pieces():
        if not begun:
          begun = True
          for choice in self._first():
            yield _event(bodies.chunk([choice], **empty))
        i, output = piece.output.index, piece.output
        told = bodies.logprobs(scored) if (scored := self._scored(piece)) else None
        if piece.text or piece.token is not None:  # one whose text is held back is a token that came, too
          yield _event(bodies.chunk([bodies.choice(i, piece.text, told, None, delta=True)], **empty))
        if output.ended and piece.token is None:
          last = bodies.choice(i, "", None, output.finish_reason, delta=True)
          yield _event(bodies.chunk([last | ({"delta": {}} if self._asked.chat else {})], **empty))
    except Refused as refused:
      if not begun:
        raise
      yield _event(refused.body())
    else:
      if not self._outputs:
        for choice in self._first():
          yield _event(bodies.chunk([choice | {"finish_reason": "length"}], **empty))
      if self._asked.usage:
        yield _event(bodies.chunk([], usage=self._usage()))
    yield b"data: [DONE]\n\n"

  def _first(self) -> list[dict[str, Any]]:
    """What comes before the outputs: who speaks, or the prompts again."""
    n, bodies = self._asked.params.n, self._bodies
    each = range(len(self._prompts) * n)
    if self._asked.chat:
      return [bodies.role(i) for i in each]
    wants = self._asked.params.logprobs is not None
    echoes = [self._prompts[i // n] for i in each if self._asked.echoes or not self._outputs]
    return [
      bodies.choice(i, text, bodies.logprobs(tokens) if wants else None, None)
      for i, (text, tokens) in enumerate(echoes)
    ]

  async def _pieces(self) -> AsyncIterator[Piece]:
    """Until all outputs have ended. Raises Refused: one has failed."""
    left = len(self._outputs)
    while left:
      piece = await self._news.get()
      if piece.token is None:
        left -= 1
        if piece.output.refused is not None:
          raise piece.output.refused
        stream = piece.output.stream
        if stream is not None and stream.error is not None:
          raise Refused(400 if isinstance(stream.error, ValueError) else 500, str(stream.error))
        if piece.output.finish_reason == "cancelled":
          raise Refused(503, "the server ends and has cancelled this request")
      yield piece

  def _scored(self, piece: Piece) -> list[Scored]:
    """Its token, if log probabilities are wanted."""
    if piece.token is None or piece.logprobs is None:
      return []
    before = self._prompts[piece.output.index // self._asked.params.n][0]
    return [Scored(piece.token, piece.logprobs, len(before) + piece.offset)]

  async def _echo(self, prompt: list[int], text: str) -> tuple[str, list[Scored]]:
    n_top = self._asked.params.logprobs
    if n_top is None:
      return text, []
    if self._engines.config.tp > 1:
      raise Refused(400, "logprobs of a prompt (echo) take a model on one device, tp=1", "echo")
    told = await self._of_server.score(prompt, n_top)
    at = await asyncio.to_thread(_places, self._model.tokenizer, prompt, text)
    return text, [Scored(*of) for of in zip(prompt, told, at, strict=True)]

  def _usage(self) -> dict[str, Any]:
    requests = [output.stream.request for output in self._outputs if output.stream and output.stream.request]
    cached = sum(request.cached_tokens for request in requests[:: self._asked.params.n])
    prompt_tokens = sum(len(prompt) for prompt in self._asked.prompts)
    return usage(prompt_tokens, sum(output.reading.n_tokens for output in self._outputs), cached)


def _places(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
  """Where the tokens of a prompt begin in its text, in which special tokens that were put around it do not stand."""
  before = max(0, tokenizer.decode(prompt, skip_special_tokens=False).find(text))
  return [min(max(0, at - before), len(text)) for at in offsets(tokenizer, prompt)]


def _event(body: dict[str, Any]) -> bytes:
  return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
