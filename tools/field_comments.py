"""For the site of documents: what a comment says of a field stands beside it, as a docstring would.

mkdocs.yml names it. Fields of classes are told by a comment at the end of their line, or by one right above it.
"""

from __future__ import annotations

from typing import Any

import griffe


class FieldComments(griffe.Extension):
  """Reads comments of fields that have no docstring."""

  def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
    if attr.docstring is None and attr.lineno and attr.parent and attr.parent.is_class:
      lines = attr.lines_collection[attr.filepath]
      if told := _comment_of(lines, attr.lineno - 1, (attr.endlineno or attr.lineno) - 1):
        attr.docstring = griffe.Docstring(told, lineno=attr.lineno, parent=attr)


def _comment_of(lines: list[str], first: int, last: int) -> str:
  """What is said of the field on these lines; "" if nothing is."""
  _, has_any, told = lines[last].partition("  # ")
  above = first
  if lines[first].lstrip().startswith("self."):  # a note to who reads the code
    return ""
  while not has_any and lines[above - 1].lstrip().startswith("# "):
    above -= 1
  told = told if has_any else " ".join(line.strip().removeprefix("# ") for line in lines[above:first])
  return "" if told.startswith(("fmt:", "noqa", "type:", "pyright:")) else told
