"""Prompts that are too long lose their middle."""

from __future__ import annotations

from sparse_serve_jax.prompting import encode_text
from sparse_serve_jax.tokenizing import Tokenizer


def cut_middle(tokenizer: Tokenizer, text: str, max_tokens: int, add_special_tokens: bool = True) -> str:
  """A text of about `max_tokens` tokens: of a longer one the first half and the last half of as many.

  Tokenized again it can be a few tokens longer; nothing is cut a second time.
  """
  if max_tokens < 2:
    raise ValueError(f"a prompt is cut in its middle, so at least 2 tokens have to remain, got {max_tokens=}")
  ids = tokenizer.encode(text, add_special_tokens)
  half = max_tokens // 2
  return text if len(ids) <= max_tokens else tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def truncate_middle(tokenizer: Tokenizer, text: str, max_tokens: int, add_special_tokens: bool = True) -> list[int]:
  """Returns the tokens of a text after `cut_middle`.

  They can be a few too many again; only then the middle is cut once more, out of the ids, so that the limit holds.
  """
  text = cut_middle(tokenizer, text, max_tokens, add_special_tokens)
  return cut_ids(encode_text(tokenizer, text, add_special_tokens), max_tokens)


def cut_ids(ids: list[int], max_tokens: int) -> list[int]:
  """The first half and the rest of `max_tokens` token ids; all if there are no more."""
  half = max_tokens // 2
  return ids if len(ids) <= max_tokens else ids[:half] + ids[len(ids) - (max_tokens - half) :]
