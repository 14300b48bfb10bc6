"""Prompts to serve, as token ids, and when they arrive."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
  """What a workload needs of a tokenizer. Special tokens are added by `encode` and left out by `decode`."""

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Item:
  """One request to make."""

  id: str
  prompt: np.ndarray  # int32 [T]
  max_new_tokens: int


def longbench(
  tokenizer: Tokenizer, directory: str | pathlib.Path, max_prompt_tokens: int, limit: int | None = None
) -> list[Item]:
  """Reads the first `limit` rows of every data/*.jsonl of a folder laid out like the official LongBench release.

  Prompt templates and output lengths are read from its config/; LongBench-E files (`_e`) take those of their base task.
  Prompts are cut as `truncate_middle` does. No chat template is applied.

  Raises:
    ValueError: a config file is missing, a task has no template or length, or a line is broken; names file and line.
  """
  directory = pathlib.Path(directory)
  templates = read_json(directory / "config" / "dataset2prompt.json")
  lengths = read_json(directory / "config" / "dataset2maxlen.json")
  files = sorted((directory / "data").glob("*.jsonl"))
  if not files:
    raise ValueError(f"{directory / 'data'} has no .jsonl files")
  items = []
  for file in files:
    task = file.stem.removesuffix("_e")
    if task not in templates or task not in lengths:
      raise ValueError(f"{file}: task {task!r} has no template or no output length in {directory / 'config'}")
    for line, row in itertools.islice(read_lines(file), limit):
      try:
        text = templates[task].format(**row)
      except KeyError as error:
        raise ValueError(f"{file}:{line}: the row lacks {error}, which the template of {task!r} needs") from None
      prompt = truncate_middle(tokenizer, text, max_prompt_tokens)
      items.append(Item(f"{file.stem}-{line - 1}", np.array(prompt, np.int32), lengths[task]))
  return items


def cut_middle(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
  """A text of more than `max_tokens` tokens as the texts of its first and its last half so many.

  Tokenized again it can be a few tokens longer; nothing is cut a second time.
  """
  if max_tokens < 2:
    raise ValueError(f"a prompt is cut in its middle, so at least 2 tokens have to remain, got {max_tokens=}")
  ids = tokenizer.encode(text)
  half = max_tokens // 2
  return text if len(ids) <= max_tokens else tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def truncate_middle(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[int]:
  """Returns the tokens of a text after `cut_middle`.

  They can be a few too many again; only then the middle is cut once more, out of the ids, so that the limit holds.
  """
  return _cut_ids(tokenizer.encode(cut_middle(tokenizer, text, max_tokens)), max_tokens)


def needle(tokenizer: Tokenizer, n: int, prompt_tokens: int, max_new_tokens: int, seed: int = 0) -> list[Item]:
  """Makes n prompts: filler, a key hidden at a random depth, a question. At most, and close to, `prompt_tokens`."""
  rng = np.random.default_rng(seed)
  items = []
  for i in range(n):
    words = rng.choice(_FILLER, size=prompt_tokens)  # more than enough: a word is at least one token
    depth, key = rng.random(), int(rng.integers(10_000, 100_000))
    fits, too_many = 0, len(words) + 1
    if len(tokenizer.encode(_hidden(words[:0], depth, key))) > prompt_tokens:
      raise ValueError(f"a prompt of {prompt_tokens} tokens has no room for the key and the question")
    while fits + 1 < too_many:
      middle = (fits + too_many) // 2
      if len(tokenizer.encode(_hidden(words[:middle], depth, key))) <= prompt_tokens:
        fits = middle
      else:
        too_many = middle
    prompt = tokenizer.encode(_hidden(words[:fits], depth, key))
    items.append(Item(f"needle-{i}", np.array(prompt, np.int32), max_new_tokens))
  return items


def jsonl(
  tokenizer: Tokenizer,
  file: str | pathlib.Path,
  max_new_tokens: int,
  limit: int | None = None,
  max_prompt_tokens: int | None = None,
) -> list[Item]:
  """Reads rows {"prompt": text} or {"prompt_token_ids": [...]}, with "max_new_tokens" and "request_id" if wanted.

  A prompt of more than `max_prompt_tokens` loses its middle.

  Raises:
    ValueError: the file is missing or a line is broken; names file and line.
  """
  items = []
  for line, row in itertools.islice(read_lines(pathlib.Path(file)), limit):
    where = f"{file}:{line}"
    if ("prompt" in row) == ("prompt_token_ids" in row):
      raise ValueError(f'{where}: a row has either "prompt" or "prompt_token_ids", this one has {sorted(row)}')
    prompt = _prompt_ids(tokenizer, row, where, max_prompt_tokens)
    n_output = row.get("max_new_tokens", max_new_tokens)
    if type(n_output) is not int:
      raise ValueError(f'{where}: "max_new_tokens" is a number of tokens, got {n_output!r}')
    items.append(Item(str(row.get("request_id", f"line-{line}")), np.array(prompt, np.int32), n_output))
  return items


def arrival_times(n: int, rate: float | None, seed: int = 0) -> np.ndarray:
  """Returns when n requests arrive, in seconds after the start, float64 [n] ascending.

  None: all at once. Otherwise a Poisson process of `rate` requests a second, so exponential gaps of mean 1 / rate.
  """
  if rate is None:
    return np.zeros(n)
  if not rate > 0:
    raise ValueError(f"the rate of arrivals must be above 0 requests a second, got {rate}")
  return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


_FILLER = (
  "The grass is green and the sky is blue over the hill . The river runs past the old mill and the road bends north . "
  "Birds gather near the barn while the farmer counts his sheep . A cart of apples rolls slowly towards the market ."
).split()


def _hidden(words: np.ndarray, depth: float, key: int) -> str:
  at = int(depth * len(words))
  before, after = " ".join(words[:at]), " ".join(words[at:])
  return f"{before} The secret key is {key}. {after} Question: what is the secret key? Answer: the secret key is"


def _prompt_ids(tokenizer: Tokenizer, row: dict[str, Any], where: str, max_tokens: int | None) -> list[int]:
  if "prompt_token_ids" in row:
    ids = row["prompt_token_ids"]
    if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**31 for i in ids):
      raise ValueError(f'{where}: "prompt_token_ids" is a list of token ids')
    return ids if max_tokens is None else _cut_ids(ids, max_tokens)
  if not isinstance(row["prompt"], str):
    raise ValueError(f'{where}: "prompt" is a text, got {type(row["prompt"]).__name__}')
  return (
    tokenizer.encode(row["prompt"]) if max_tokens is None else truncate_middle(tokenizer, row["prompt"], max_tokens)
  )


def _cut_ids(ids: list[int], max_tokens: int) -> list[int]:
  half = max_tokens // 2
  return ids if len(ids) <= max_tokens else ids[:half] + ids[len(ids) - (max_tokens - half) :]


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; ValueError names file and line."""
  if not file.is_file():
    raise ValueError(f"{file} is missing")
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None


def read_lines(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line numbers, from 1, and rows; blank lines are skipped. A line ends at a newline character only."""
  if not file.is_file():
    raise ValueError(f"{file} is missing")
  with file.open(encoding="utf-8", newline="\n") as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{number}: not JSON: {error.msg} at column {error.colno}") from None
      if not isinstance(row, dict):
        raise ValueError(f"{file}:{number}: a row is a JSON object, got {type(row).__name__}")
      yield number, row
