"""A user's own prompts: a file of JSON rows.

A row has one of "prompt" (text), "prompt_token_ids" and "messages" (a conversation, for the model's chat template);
if wanted "request_id", "max_new_tokens", and "temperature", "top_p", "seed", "min_tokens", "stop_token_ids" and
"ignore_eos" as `Engine.add_request` takes them. Null is as if not given, and other keys are the user's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax import files
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.cut import cut_ids, truncate_middle
from sparse_serve_jax.workloads.item import Item, Refused, Source

DEFAULT_OUTPUT = 32  # tokens, of rows that do not say


def _integer(value: Any, low: int = 0) -> bool:
  return type(value) is int and low <= value < 2**31


def _number(value: Any) -> bool:
  try:
    return type(value) in (int, float) and math.isfinite(value)
  except OverflowError:  # an integer of hundreds of digits
    return False


def _ids(value: Any) -> bool:
  return isinstance(value, list) and all(type(i) is int and abs(i) < 2**31 for i in value)


def _messages(value: Any) -> bool:
  """Content is the chat template's to judge."""
  return isinstance(value, list) and bool(value) and all(isinstance(of, dict) and "role" in of for of in value)


# Key -> what its value is, in words and as a test.
_PROMPTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "prompt": ("a text", lambda value: isinstance(value, str)),
  "prompt_token_ids": ("a list of token ids", _ids),
  "messages": ('a list of {"role": ..., "content": ...}', _messages),
}
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "temperature": ("a number of 0 or more", lambda value: _number(value) and value >= 0),
  "top_p": ("a number above 0 and up to 1", lambda value: _number(value) and 0 < value <= 1),
  "seed": ("an integer from 0 to 2**31 - 1", _integer),
  "min_tokens": ("a number of tokens", _integer),
  "stop_token_ids": ("a list of token ids", _ids),
  "ignore_eos": ("true or false", lambda value: type(value) is bool),
}
_FIELDS = {
  **_PROMPTS,
  **_OPTIONS,
  "request_id": ("a text or an integer", lambda value: type(value) in (str, int)),
  "max_new_tokens": ("a number of tokens, 1 or more", lambda value: _integer(value, 1)),
}
# What other servers call what is not here or has another name: to leave it out would be another request.
_FOREIGN = ("max_tokens", "max_completion_tokens", "top_k", "stop", "n")


class _Row(NamedTuple):
  where: str
  id: str
  fields: dict[str, Any]  # those of _FIELDS
  kind: str  # of _PROMPTS


def read(config: WorkloadConfig) -> Source:
  """Checks every row; what takes a tokenizer is left to do.

  Raises:
    ValueError: no file, or a broken row, or one that has another's name; names file and line.
  """
  config.refuse("tasks", "chat_template", "seed")
  if not config.path:
    raise ValueError("a workload of jsonl needs path, the file of prompts")
  lines = itertools.islice(files.read_lines(config.path), config.limit or None)
  rows = [_row(f"{config.path}:{line}", line, row) for line, row in lines]
  if not rows:
    raise ValueError(f"{config.path} holds no prompt")
  first: dict[str, str] = {}
  for row in rows:
    if row.id in first:
      raise ValueError(f"{row.where}: the request_id {row.id!r} is that of {first[row.id]} too")
    first[row.id] = row.where

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    return [_item(config, row, tokenizer) for row in rows]

  return items


def _row(where: str, line: int, row: dict[str, Any]) -> _Row:
  given = {key: value for key, value in row.items() if key in _FIELDS and value is not None}
  kinds = [key for key in _PROMPTS if key in given]
  if len(kinds) != 1:
    raise ValueError(f"{where}: a row has one of {', '.join(_PROMPTS)}, this one has {sorted(row)}")
  for key, value in given.items():
    what, fits = _FIELDS[key]
    if not fits(value):
      raise ValueError(f'{where}: "{key}" is {what}, got {value!r:.80}')
  if foreign := [key for key in _FOREIGN if row.get(key) is not None]:
    known = ", ".join(["max_new_tokens", *_OPTIONS])
    raise ValueError(f'{where}: a row cannot ask for "{foreign[0]}"; it can for {known}')
  return _Row(where, str(given.get("request_id", f"line-{line}")), given, kinds[0])


def _item(config: WorkloadConfig, row: _Row, tokenizer: Tokenizer) -> Item | Refused:
  if wrong := files.lone_surrogate(row.fields):
    return Refused(row.id, row.where, wrong)
  with files.placed(row.where):
    prompt = _prompt_ids(config, row, tokenizer)
  n_output = row.fields.get("max_new_tokens", config.max_new_tokens or DEFAULT_OUTPUT)
  options = {key: row.fields[key] for key in _OPTIONS if key in row.fields}
  return Item(row.id, np.array(prompt, np.int32), min(n_output, config.max_new_tokens or n_output), options)


def _prompt_ids(config: WorkloadConfig, row: _Row, tokenizer: Tokenizer) -> list[int]:
  most, value = config.prompt_tokens, row.fields[row.kind]
  if row.kind == "prompt":
    return truncate_middle(tokenizer, value, most) if most else tokenizer.encode(value)
  if row.kind == "messages":
    value = tokenizer.encode(tokenizer.apply_chat_template(value), add_special_tokens=False)
  return cut_ids(value, most) if most else value
