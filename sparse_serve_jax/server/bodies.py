"""Bodies of answers in OpenAI's form."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sparse_serve_jax.serving.plan import TokenLogprobs
from sparse_serve_jax.tokenizing import Tokenizer

Scored = tuple[int, TokenLogprobs | None]  # a token and what is told of it; None of the first of a prompt


@dataclasses.dataclass
class Bodies:
  """Of one request: all of them share an id and a time."""

  chat: bool
  model: str
  tokenizer: Tokenizer

  def __post_init__(self):
    self._id, self._created = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

  def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    kind = "chat.completion" if self.chat else "text_completion"
    return self._head(kind) | {"choices": list(choices), "usage": usage}

  def chunk(self, choices: Sequence[dict[str, Any]], **usage: Any) -> dict[str, Any]:
    kind = "chat.completion.chunk" if self.chat else "text_completion"
    return self._head(kind) | {"choices": list(choices)} | usage

  def choice(
    self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None, delta: bool = False
  ) -> dict[str, Any]:
    of: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
    if not self.chat:
      return of | {"text": text}
    if delta:
      return of | {"delta": {"content": text}}
    return of | {"message": {"role": "assistant", "content": text, "refusal": None}}

  def role(self, index: int) -> dict[str, Any]:
    """What begins an answer of a chat's stream."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

  def logprobs(self, tokens: Sequence[Scored], offset: int = 0) -> dict[str, Any]:
    """In the form of a chat or of a completion, whose first token begins at character `offset`."""
    if self.chat:
      return {"content": [self._entry(token, told) for token, told in tokens], "refusal": None}
    offsets = list[int]()
    for token, _ in tokens:
      offsets.append(offset)
      offset += len(self.text_of(token))
    return {
      "tokens": [self.text_of(token) for token, _ in tokens],
      "token_logprobs": [told and told.logprob for _, told in tokens],
      "top_logprobs": [told and self._top(told) for _, told in tokens],
      "text_offset": offsets,
    }

  def text_of(self, token: int) -> str:
    return self.tokenizer.decode([token], skip_special_tokens=False)

  def _top(self, told: TokenLogprobs) -> dict[str, float]:
    """Of tokens with the same text the most likely."""
    top: dict[str, float] = {}
    for token, logprob in told.top.items():
      top.setdefault(self.text_of(token), logprob)
    return top

  def _entry(self, token: int, told: TokenLogprobs | None) -> dict[str, Any]:
    assert told is not None
    top = [self._named(of, logprob) for of, logprob in told.top.items()]
    return self._named(token, told.logprob) | {"top_logprobs": top}

  def _named(self, token: int, logprob: float) -> dict[str, Any]:
    text = self.text_of(token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

  def _head(self, kind: str) -> dict[str, Any]:
    return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
  return {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": output_tokens,
    "total_tokens": prompt_tokens + output_tokens,
    "prompt_tokens_details": {"cached_tokens": cached_tokens},
  }
