"""Bodies of answers in OpenAI's form."""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from sparse_serve_jax.serving.plan import TokenLogprobs
from sparse_serve_jax.tokenizing import Tokenizer


class Scored(NamedTuple):
  """A token and what is told of it."""

  token: int
  told: TokenLogprobs | None  # None of the first of a prompt
  offset: int  # where it begins in the text of its choice, in characters


@dataclasses.dataclass
class Bodies:
  """Of one request: all of them share an id and a time."""

  chat: bool
  model: str
  tokenizer: Tokenizer

  def __post_init__(self):
    self._id, self._created = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
    self._name = functools.cache(self._read_name)  # a long prompt has each of its tokens often

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

  def logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
    """In the form of a chat or of a completion."""
    if self.chat:
      return {"content": [self._entry(token, told) for token, told, _ in tokens], "refusal": None}
    return {
      "tokens": [self._name(token) for token, _, _ in tokens],
      "token_logprobs": [told and told.logprob for _, told, _ in tokens],
      "top_logprobs": [told and self._top(token, told) for token, told, _ in tokens],
      "text_offset": [offset for _, _, offset in tokens],
    }

  def _read_name(self, token: int) -> str:
    """Its text; of one that is no whole characters its bytes, as OpenAI writes them."""
    of = self.tokenizer.token_bytes(token)
    try:
      return of.decode()
    except UnicodeDecodeError:
      return ("" if self.chat else "bytes:") + of.decode(errors="backslashreplace")

  def _top(self, token: int, told: TokenLogprobs) -> dict[str, float]:
    """The token too, if it is none of the most likely. Of tokens with the same text the most likely."""
    top: dict[str, float] = {}
    for of, logprob in (*told.top.items(), (token, told.logprob)):
      top.setdefault(self._name(of), logprob)
    return top

  def _entry(self, token: int, told: TokenLogprobs | None) -> dict[str, Any]:
    assert told is not None
    top = [self._named(of, logprob) for of, logprob in told.top.items()]
    return self._named(token, told.logprob) | {"top_logprobs": top}

  def _named(self, token: int, logprob: float) -> dict[str, Any]:
    return {"token": self._name(token), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))}

  def _head(self, kind: str) -> dict[str, Any]:
    return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> dict[str, Any]:
  return {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": output_tokens,
    "total_tokens": prompt_tokens + output_tokens,
    "prompt_tokens_details": {"cached_tokens": cached_tokens},
  }
