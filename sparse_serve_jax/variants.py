"""Tables of variants: a name a user gives, and the function or class that stands for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def variant(table: Mapping[str, T], name: str, what: str) -> T:
  """The entry `name` of a table of `what`.

  Raises:
    ValueError: there is none; the message lists those there are.
  """
  if name not in table:
    near = difflib.get_close_matches(name, list(table), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}{hint}")
  return table[name]
