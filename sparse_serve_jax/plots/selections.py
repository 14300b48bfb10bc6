"""What selections miss by the slots that there are: rows of `sparse-serve selections`."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence

from sparse_serve_jax.plots import style

Row = dict[str, str]
TABLE = "selections"  # the file of the table of all of them, with suffixes
_MISSES = "misses at "  # before slots, in units of one step's selection


def read(folder: pathlib.Path) -> list[Row]:
  """Rows of all tables of selections in a folder; of rows of one name the other tables' count before those of TABLE."""
  rows: list[Row] = []
  for file in sorted(folder.glob("*.csv"), key=lambda file: (file.stem != TABLE, file)):
    with file.open(newline="", encoding="utf-8") as source:
      table = csv.DictReader(source)
      if {"source", "like"} <= set(heads := table.fieldnames or ()) and any(head.startswith(_MISSES) for head in heads):
        rows += table
  return list({(row["source"], row["like"]): row for row in rows}.values())


def draw(rows: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Misses of exact LRU against slots, axes for each recorded selection with those that are drawn like it."""
  recorded = list(dict.fromkeys(row["like"] for row in rows))
  columns = min(3, len(recorded))
  lines = -(-len(recorded) // columns)
  figure, grid = style.subplots(lines, columns, size=(4.2 * columns, 0.6 + 3.3 * lines))
  all_axes = list(grid.flat) if len(recorded) > 1 else [grid]
  for axes, name in zip(all_axes, recorded, strict=False):
    for row in (row for row in rows if row["like"] == name):
      curve = [
        (float(key.removeprefix(_MISSES)), float(row[key])) for key in row if key.startswith(_MISSES) and row[key]
      ]
      slots, misses = zip(*sorted(curve), strict=True)
      axes.plot(slots, misses, label="recorded" if row["source"] == name else row["source"])
    axes.set(xlabel="slots / blocks of a selection", ylabel="share of reads that miss")
    axes.set_title(name, fontsize=8)
    style.logarithmic(axes, "x", slots)
    style.logarithmic(axes, "y")
    axes.legend()
  for axes in all_axes[len(recorded) :]:
    axes.set_axis_off()
  style.save(figure, file, made_by)
