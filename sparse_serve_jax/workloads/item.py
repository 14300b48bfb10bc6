"""What a workload is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparse_serve_jax.tokenizing import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """One request to make."""

  id: str
  prompt: np.ndarray  # int32 [T]
  max_new_tokens: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more arguments of `Engine.add_request`
  judge: Callable[[str], float] | None = None  # scores an answer's text: 1 is perfect, 0 wrong; None: not known here
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what its source says of it beside the prompt
  answer_tokens: int | None = None  # of the right answer; what a model goes on with means nothing. None: not known here


@dataclasses.dataclass(frozen=True)
class Refused:
  """A row that cannot be served, though the others of its file can."""

  id: str
  where: str  # file:line
  reason: str

  def __str__(self) -> str:
    return f"{self.where}: {self.reason}"


def unless_strict(row: Refused, strict: bool) -> Refused:
  """The row; if `strict` its ValueError."""
  if strict:
    raise ValueError(str(row))
  return row


def check_room(shortest: int, max_request_tokens: int) -> None:
  """Comes before prompts of known lengths are made, which may take all memory.

  Raises:
    ValueError: the shortest has more tokens than a request may have.
  """
  if shortest > max_request_tokens:
    raise ValueError(f"the shortest prompt has {shortest:,} tokens, and a request has room for {max_request_tokens:,}")


# What makes the items once there is a model: takes its tokenizer, and the most tokens of prompt and output together.
# Raises ValueError if not one prompt has room in these.
Source = Callable[[Tokenizer, int], list[Item | Refused]]


@dataclasses.dataclass(frozen=True)
class FileSource:
  """A source that knows which rows it refuses before there is a model."""

  items: Source
  refused: tuple[Refused, ...]  # they are among the items too

  def __call__(self, tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    """The items, each of at most `max_request_tokens` of prompt and output, and what is refused."""
    return self.items(tokenizer, max_request_tokens)


def refused_by(source: Source) -> tuple[Refused, ...]:
  """The rows that a source refuses whatever the model is."""
  return source.refused if isinstance(source, FileSource) else ()
