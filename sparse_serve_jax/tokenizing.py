"""What the library asks of a tokenizer; those that there are stand in `models.tokenizer`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Typed = Literal["token", "text"]  # what a special token that stands in a text becomes: its id, or ordinary text


@runtime_checkable
class Encoder(Protocol):
  """What measures a length. Special tokens that `encode` adds are part of it."""

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`; with `add_special_tokens` what the tokenizer puts around texts, such as BOS."""
    ...


@runtime_checkable
class Tokenizer(Encoder, Protocol):
  """Text to token ids and back."""

  vocab_size: int

  @property
  def special_tokens(self) -> Mapping[str, str]:
    """By name: "bos_token" -> "<s>"."""
    ...

  def encode(self, text: str, add_special_tokens: bool = True, special_tokens_in_text: Typed = "token") -> list[int]:
    """Token ids of a text.

    Args:
      text: any, an empty one too.
      add_special_tokens: with what the tokenizer puts around texts, such as BOS.
      special_tokens_in_text: special tokens that stand in the text become a "token", or stay "text".

    Raises:
      ValueError: `special_tokens_in_text` is neither, or the model has no tokenizer.
    """
    ...

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of token ids; `skip_special_tokens` leaves special ones out."""
    ...

  def token_bytes(self, token: int) -> bytes:
    """UTF-8 of what a token is within a text. Of one that is a part of a character, that part."""
    ...

  def apply_chat_template(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **kwargs: Any,
  ) -> str:
    """The conversation as text that holds its special tokens: encode it with `add_special_tokens=False`.

    Args:
      messages: in order. Parts of type text of a content are joined.
      add_generation_prompt: end with what begins an answer.
      tools: JSON schemas of functions, for templates that know tools.
      documents: {"title": ..., "text": ...}, for templates that know documents.
      continue_final_message: end within the last message, for the model to go on with; text names the field if it is
        not "content". Only without `add_generation_prompt`.
      kwargs: other variables of the template, such as enable_thinking.

    Raises:
      ValueError: there is no template, it is broken, or it refuses this conversation.
    """
    ...

  def encode_chat(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    special_tokens_in_text: Typed = "text",
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool | str = False,
    **kwargs: Any,
  ) -> list[int]:
    """The conversation as token ids; arguments are those of `apply_chat_template`.

    Args:
      special_tokens_in_text: "text": the template's control tokens become ids, and those that stand in messages,
        tools, documents or `kwargs` stay text. "token": all become ids, as if the whole text were encoded. Without
        control tokens in messages the two are the same.
    """
    ...

  def turn_ends(self) -> dict[int, str]:
    """Tokens that end an output, as the tokenizer's files know them: id -> where it comes from."""
    ...

  def describe(self) -> str:
    """Lines for a reader: what it is, its special tokens and their sources, whether it has a chat template."""
    ...

  def save(self, directory: pathlib.Path) -> None:
    """Writes into `directory` what `models.tokenizer.load_tokenizer` reads."""
    ...
