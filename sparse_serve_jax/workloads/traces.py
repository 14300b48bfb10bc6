"""Traces: when requests came to a service, and how long they were. No texts, and no tokenizer is needed.

Two public formats, told apart by what stands in a file:
- Mooncake's (arXiv 2407.00079), a JSON object a line: {"timestamp": milliseconds, "input_length": tokens,
  "output_length": tokens}. Times begin at 0 or later and ascend; some may be equal. Tokens are 1 to 2^31 - 1. All lines
  or none have "hash_ids": prompts begin alike where these do. There is one id, 0 to 2^31 - 1, for each 512 tokens and
  for the rest of a prompt; it stands for these and all before them. Nothing else is read.
- Azure's (arXiv 2311.18677), a table with the columns TIMESTAMP (2023-11-16 18:17:03.9799600), ContextTokens and
  GeneratedTokens.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sparse_serve_jax import files

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

HASH_TOKENS = 512  # that an id of Mooncake's stands for
_MOST = 2**31 - 1  # of tokens and ids
_MOST_MS = 1e15  # of a time, some 30,000 years

# file:line, microseconds, tokens of the prompt and of the output, ids of its blocks if there are any.
_Row = tuple[str, float, int, int, np.ndarray | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
  """Requests in the order in which they came."""

  times: np.ndarray  # float64 [requests], seconds after the first, ascending
  prompt_tokens: np.ndarray  # int64 [requests], 1 or more
  output_tokens: np.ndarray  # int64 [requests], 1 or more
  hash_ids: tuple[np.ndarray, ...] | None = None  # of each prompt's blocks of HASH_TOKENS, int64; None: not known

  def __len__(self) -> int:
    return len(self.times)


def read_trace(path: str | pathlib.Path) -> Trace:
  """Reads a file of one of the two formats.

  Raises:
    ValueError: no such file, no request in it, or a line that is wrong, earlier than the one before or the first one
      without ids of blocks where others have them; names the line.
  """
  text = files.read_text(path)
  rows = list(_mooncake(path) if text.lstrip().startswith("{") else _azure(path, text))
  if not rows:
    raise ValueError(f"{path} holds no request")
  where, times, prompts, outputs, ids = zip(*rows, strict=True)
  elapsed = (np.array(times, np.float64) - times[0]) / 1e6
  if (earlier := np.flatnonzero(np.diff(elapsed) < 0)).size:
    i = int(earlier[0]) + 1
    raise ValueError(f"{where[i]}: times must ascend, this one is {elapsed[i - 1] - elapsed[i]} s before the last")
  without = [at for at, of in zip(where, ids, strict=True) if of is None]
  if 0 < len(without) < len(ids):
    raise ValueError(f'{without[0]}: "hash_ids" are lacking, which {len(ids) - len(without)} of {len(ids)} lines have')
  hash_ids = None if without else ids
  return Trace(elapsed, np.array(prompts, np.int64), np.array(outputs, np.int64), hash_ids)


def _mooncake(path: str | pathlib.Path) -> Iterator[_Row]:
  for line, row in files.read_lines(path):
    where = f"{path}:{line}"
    with files.placed(where):
      time, prompt, output = row["timestamp"], row["input_length"], row["output_length"]
      if type(time) not in (int, float) or not 0 <= time < _MOST_MS:
        raise ValueError(f'"timestamp" is milliseconds, a number from 0 to below {_MOST_MS:g}, got {time!r:.80}')
      n_prompt = _tokens("input_length", prompt)
      ids = None if (given := row.get("hash_ids")) is None else _ids(given, -(-n_prompt // HASH_TOKENS))
      yield where, time * 1000, n_prompt, _tokens("output_length", output), ids


def _azure(path: str | pathlib.Path, text: str) -> Iterator[_Row]:
  header: list[str] | None = None
  for line, content in enumerate(text.split("\n"), 1):
    if not content.strip():
      continue
    where, values = f"{path}:{line}", [value.strip() for value in content.split(",")]
    with files.placed(where):
      if header is None:
        header = _header(values)
        continue
      if len(values) != len(header):
        raise ValueError(f"{len(values)} values, the header has {len(header)} columns")
      yield where, *_fields(dict(zip(header, values, strict=True))), None


def _header(columns: list[str]) -> list[str]:
  if lacking := [name for name in _COLUMNS if name not in columns]:
    raise ValueError(f"a trace is JSON objects, or a table that begins with {','.join(_COLUMNS)}; {lacking[0]} is not")
  return columns


def _fields(row: Mapping[str, str]) -> tuple[float, int, int]:
  moment = datetime.datetime.fromisoformat(row["TIMESTAMP"])
  moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
  prompt, output = (int(row[name]) if row[name].isdecimal() else row[name] for name in _COLUMNS[1:])
  microseconds = (moment - _EPOCH) // datetime.timedelta(microseconds=1)
  return microseconds, _tokens("ContextTokens", prompt), _tokens("GeneratedTokens", output)


def _tokens(name: str, value: Any) -> int:
  if type(value) is not int or not 1 <= value <= _MOST:
    raise ValueError(f'"{name}" is a number of tokens, an integer from 1 to {_MOST}, got {value!r:.80}')
  return value


def _ids(value: Any, n: int) -> np.ndarray:
  """As int64 [n]."""
  if not isinstance(value, list) or len(value) != n:
    got = f"{len(value)}: {value!r:.80}" if isinstance(value, list) else f"{value!r:.80}"
    raise ValueError(f'"hash_ids" of {n} blocks of {HASH_TOKENS} tokens are a list of {n} integers, got {got}')
  if wrong := [one for one in value if type(one) is not int or not 0 <= one <= _MOST]:
    raise ValueError(f'"hash_ids" are integers from 0 to {_MOST}, got {wrong[0]!r:.80}')
  return np.array(value, np.int64)


def rescaled(trace: Trace, rate: float) -> np.ndarray:
  """The times of a trace, made longer or shorter alike so that its gaps have the mean 1 / rate seconds.

  Raises:
    ValueError: all requests came at once.
  """
  if trace.times[-1] == 0:
    raise ValueError(f"{len(trace)} requests that all came at once cannot come at a rate of {rate} a second")
  return trace.times * ((len(trace) - 1) / rate / trace.times[-1])
