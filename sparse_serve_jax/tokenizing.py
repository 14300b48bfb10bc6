"""What the library asks of a tokenizer; those that there are stand in `models.tokenizer`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


class Encoder(Protocol):
  """What measures a length. Special tokens that `encode` adds are part of it."""

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Tokenizer(Encoder, Protocol):
  """Text to token ids and back."""

  vocab_size: int

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

  def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The conversation as text that holds its special tokens: encode it with `add_special_tokens=False`."""
    ...

  def save(self, directory: pathlib.Path) -> None:
    """Writes what `models.tokenizer.load_tokenizer` reads."""
    ...
