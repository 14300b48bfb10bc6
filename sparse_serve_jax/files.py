"""Text and JSON that people bring, in UTF-8 with or without a byte order mark; and what is written.

Errors name the file, of what is read the line too.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO


def read_text(file: str | pathlib.Path) -> str:
  """The text of a file, its line breaks as they are.

  Raises:
    ValueError: there is no such file, or it is not UTF-8.
  """
  with _opened(file) as source:
    return _decoded(source.read(), file, 1)


def read_json(file: str | pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: there is no such file, or something else in it.
  """
  return _object(read_text(file), file, 1)


def read_lines(file: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line numbers, from 1, and rows; blank lines are skipped. A line ends at a newline character only.

  Raises:
    ValueError: there is no such file, or a line is no JSON object.
  """
  for number, row in read_rows(file):
    if isinstance(row, ValueError):
      raise ValueError(f"{file}:{number}: {row}")
    yield number, row


def read_rows(file: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
  """`read_lines` that goes on after a broken line: yields what is wrong with it instead of a row.

  Raises:
    ValueError: there is no such file.
  """
  with _opened(file) as source:
    for number, line in enumerate(source, 1):
      if not line.strip():
        continue
      try:
        yield number, _object(_decoded(line.removesuffix(b"\n"), file, number), file, number)
      except ValueError as error:
        yield number, ValueError(str(error).removeprefix(f"{file}:{number}: "))


@contextlib.contextmanager
def writing(file: str | pathlib.Path) -> Iterator[None]:
  """Around what writes a file: an OSError that names none, as that of a full disk, names it."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    raise


def write_text(file: str | pathlib.Path, text: str) -> None:
  """Writes a file of UTF-8.

  Raises:
    OSError: it cannot be written, or not all of it; names the file.
  """
  with writing(file):
    pathlib.Path(file).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def placed(where: str):
  """Around what is done with a row: adds to a ValueError where the row stands, and makes one of a key that it lacks."""
  try:
    yield
  except KeyError as error:
    raise ValueError(f"{where}: the row lacks {error}") from None
  except (IndexError, ValueError) as error:
    raise ValueError(f"{where}: {error}") from error


def lone_surrogate(row: Mapping[str, Any]) -> str | None:
  """What is wrong with the first value of a row that has half of a character; None if all can be encoded.

  JSON can hold such a half ("\\ud83d"), UTF-8 cannot, and so no tokenizer takes it.
  """
  for key, value in row.items():
    for text in (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
      try:
        text.encode()
      except UnicodeEncodeError as error:
        return f"{key!r} has the lone surrogate {text[error.start]!a} at character {error.start}"
  return None


@contextlib.contextmanager
def _opened(file: str | pathlib.Path) -> Iterator[BinaryIO]:
  path = pathlib.Path(file)
  if path.is_dir():
    raise ValueError(f"{file} is a directory, a file is wanted")
  if not path.exists():
    raise ValueError(f"{file} is missing")
  with path.open("rb") as source:
    yield source


def _decoded(raw: bytes, file: str | pathlib.Path, line: int) -> str:
  """`raw`, which begins at `line` of the file, as text."""
  raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
  if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise ValueError(f"{file}:1: not UTF-8: its byte order mark is that of UTF-16")
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    line += raw.count(b"\n", 0, error.start)
    column = error.start - raw.rfind(b"\n", 0, error.start)
    raise ValueError(f"{file}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {column} of the line") from None


def _object(text: str, file: str | pathlib.Path, line: int) -> dict[str, Any]:
  """The object in `text`, which begins at `line` of the file."""
  try:
    made = json.loads(text)
  except json.JSONDecodeError as error:
    where = f"{file}:{line + error.lineno - 1}"
    raise ValueError(f"{where}: not JSON: {error.msg}, column {error.colno}") from None
  except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
    raise ValueError(f"{file}:{line}: not JSON that can be read: {error}") from None
  if not isinstance(made, dict):
    raise ValueError(f"{file}:{line}: wanted is a JSON object, got {type(made).__name__}")
  return made
