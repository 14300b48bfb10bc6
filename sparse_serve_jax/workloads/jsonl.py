"""A user's own prompts: a file of JSON rows.

A row has one of "prompt" (text), "prompt_token_ids" and "messages" (a conversation, for the model's chat template);
if wanted "request_id", and of `SamplingParams` "max_tokens" (or "max_new_tokens"), "min_tokens", "temperature",
"top_k", "top_p", "min_p", "seed", "stop_token_ids", "ignore_eos", "add_special_tokens" and "cache_salt"; not "stop",
"n" and "logprobs". Null is as if not given, and other keys are the user's own, but none that is nearly one of these.
An empty text is what the tokenizer puts before texts (BOS); without that, and of no token ids, it cannot be served.
A row that is wrong is refused, with file and line, and the others are served.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax import files, prompting
from sparse_serve_jax.sampling_params import ELSEWHERE, SamplingOptions, SamplingParams
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.cut import cut_ids, truncate_middle
from sparse_serve_jax.workloads.item import FileSource, Item, Refused, unless_strict

DEFAULT_OUTPUT = 32  # tokens, of rows that do not say

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_LENGTHS = ("max_tokens", "max_new_tokens")
# What a row cannot ask for here, or what has another name: to leave it out would be another request.
_FOREIGN = ("stop", "n", "logprobs", *ELSEWHERE)
_OPTIONS = [name for name in SamplingOptions.__annotations__ if name not in (*_FOREIGN, *_LENGTHS)]
_OWN = ("request_id", *_LENGTHS, *_OPTIONS)
_NEAR = 0.88  # of difflib's ratio: a letter that is missing, doubled or another


class _Row(NamedTuple):
  where: str
  id: str
  kind: str  # of _PROMPTS
  prompt: Any
  params: SamplingParams
  options: dict[str, Any]  # those of `params` that the row says, but its length


def read(config: WorkloadConfig) -> FileSource:
  """Checks every row; what takes a tokenizer is left to do.

  Raises:
    ValueError: no file, or no row of it can be served, or with `config.strict` one cannot; names file and line.
  """
  config.refuse("tasks", "chat_template", "seed", "shortest")
  if not config.path:
    raise ValueError("a workload of jsonl needs path, the file of prompts")
  rows: list[_Row | Refused] = []
  first: dict[str, str] = {}  # where a name stands first
  for line, row in itertools.islice(files.read_rows(config.path), config.limit or None):
    where = f"{config.path}:{line}"
    try:
      rows.append(_row(config, where, line, row, first))
    except ValueError as error:
      name = next(name for name in _names(line, row) if name not in first)
      rows.append(unless_strict(Refused(name, where, str(error)), config.strict))
    first[rows[-1].id] = where
  if not rows:
    raise ValueError(f"{config.path} holds no prompt")
  refused = tuple(row for row in rows if isinstance(row, Refused))
  if len(refused) == len(rows):
    raise ValueError(f"none of {len(rows)} rows can be served: {refused[0]}")

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    made = [row if isinstance(row, Refused) else _item(config, row, tokenizer) for row in rows]
    return [unless_strict(item, config.strict) if isinstance(item, Refused) else item for item in made]

  return FileSource(items, refused)


def _names(line: int, row: dict[str, Any] | ValueError) -> Iterator[str]:
  """What a row that is refused may be called: as it says, else by its line."""
  name = None if isinstance(row, ValueError) else row.get("request_id")
  if type(name) in (str, int) and not files.lone_surrogate({"request_id": name}):
    yield str(name)
  yield f"line-{line}"
  yield from (f"line-{line}-{i}" for i in itertools.count(2))


def _row(
  config: WorkloadConfig, where: str, line: int, row: dict[str, Any] | ValueError, first: dict[str, str]
) -> _Row:
  """Raises ValueError if it cannot be served."""
  if isinstance(row, ValueError):
    raise row
  given = {key: value for key, value in row.items() if value is not None}
  kinds = [key for key in _PROMPTS if key in given]
  if len(kinds) != 1:
    raise ValueError(f"a row has one of {', '.join(_PROMPTS)}, this one has {sorted(row)}")
  (kind,) = kinds
  if foreign := [key for key in _FOREIGN if key in given]:
    raise ValueError(f'a row cannot ask for "{foreign[0]}"; it can for {", ".join([*_LENGTHS, *_OPTIONS])}')
  for key in given.keys() - {*_PROMPTS, *_OWN}:
    if meant := difflib.get_close_matches(key, _OWN, 1, _NEAR):
      raise ValueError(f"{key!r} is no option of a row; is {meant[0]!r} meant?")
  name = given.get("request_id", f"line-{line}")
  if type(name) not in (str, int):
    raise ValueError(f'"request_id" is a text or an integer, got {name!r:.80}')
  if str(name) in first:
    raise ValueError(f"the request_id {str(name)!r} is that of {first[str(name)]} too")
  if wrong := files.lone_surrogate({key: given[key] for key in ("request_id", kind) if key in given}):
    raise ValueError(wrong)
  options = {key: given[key] for key in _OPTIONS if key in given}
  lengths = {key: given[key] for key in _LENGTHS if key in given} or {
    "max_tokens": config.max_new_tokens or DEFAULT_OUTPUT
  }
  return _Row(where, str(name), kind, _checked(kind, given[kind]), SamplingParams(**options, **lengths), options)


def _checked(kind: str, value: Any) -> Any:
  if kind == "messages":
    return prompting.checked(value)
  if kind == "prompt" and not isinstance(value, str):
    raise ValueError(f'"prompt" is a text, got {value!r:.80}')
  ids = isinstance(value, list) and all(type(i) is int and abs(i) < 2**31 for i in value)
  if kind == "prompt_token_ids" and not ids:
    raise ValueError(f'"prompt_token_ids" is a list of token ids, got {value!r:.80}')
  return value


def _item(config: WorkloadConfig, row: _Row, tokenizer: Tokenizer) -> Item | Refused:
  try:
    prompt = _prompt_ids(config, row, tokenizer)
  except ValueError as error:  # the chat template's, or the tokenizer's
    return Refused(row.id, row.where, str(error))
  n_output = row.params.max_tokens
  options = {key: value for key, value in row.options.items() if key != "add_special_tokens"}
  return Item(row.id, np.array(prompt, np.int32), min(n_output, config.max_new_tokens or n_output), options)


def _prompt_ids(config: WorkloadConfig, row: _Row, tokenizer: Tokenizer) -> list[int]:
  most, value = config.prompt_tokens, row.prompt
  if row.kind == "prompt":
    special = row.params.add_special_tokens
    return (
      truncate_middle(tokenizer, value, most, special) if most else prompting.encode_text(tokenizer, value, special)
    )
  if row.kind == "messages":
    value = prompting.encode_chat(tokenizer, value)
  return cut_ids(value, most) if most else value
