"""Rows of the benchmarks: what was timed, against the floor that its bytes or products set."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_serve_jax.plots import style

Row = dict[str, Any]


def newest(rows: Sequence[Row]) -> list[Row]:
  """Of each op and case the last row: a benchmark adds to what is there."""
  return list({(row["op"], row["case"]): row for row in rows}.values())


def against_floors(rows: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Points for each case of one op, on a logarithmic axis: its time, the floor, and what one would use instead."""
  figure, axes = style.subplots(size=(8.5, 1.6 + 0.24 * len(rows)))
  scale, unit = (1e3, "ms") if max(row["us"] for row in rows) >= 1e4 else (1.0, "us")
  at = np.arange(len(rows))
  times, floors = ([row[key] / scale for row in rows] for key in ("us", "floor_us"))
  axes.hlines(at, floors, times, color=style.KEPT, linewidth=2)
  axes.plot(floors, at, "D", color="0.5", markerfacecolor="white", label="floor")
  for name, marker in zip(
    dict.fromkeys(name for row in rows for name in row.get("baselines", {})), "x+|*12", strict=False
  ):
    others = [(row["baselines"][name] / scale, y) for y, row in enumerate(rows) if name in row.get("baselines", {})]
    axes.plot(*zip(*others, strict=True), marker, color="0.35", markersize=6, label=name)
  axes.plot(times, at, "o", color="black", label="measured")
  for y, time, floor in zip(at, times, floors, strict=True):
    text = f"{time:,.0f}" if time >= 1000 else f"{time:.3g}"
    beside = axes.get_yaxis_transform()  # the axes' right edge, where no marker is
    axes.text(1.01, y, f"{text} {unit}, {time / floor:.2f}x", transform=beside, va="center", fontsize=7)
  axes.set(yticks=at, yticklabels=[row["case"] for row in rows], xlabel=f"time, {unit}", title=rows[0]["op"])
  axes.margins(y=0.6 / len(rows))
  style.logarithmic(axes, "x")
  axes.invert_yaxis()
  figure.legend(loc="outside upper right", ncols=5)
  style.save(figure, file, made_by)


def markdown(rows: Sequence[Row]) -> str:
  """A table of all rows."""
  lines = ["| op | case | us | best | floor us | times the floor |", "|---|---|--:|--:|--:|--:|"]
  for row in rows:
    numbers = (row["us"], row["best_us"], row["floor_us"])
    told = [f"{n:.1f}" for n in numbers] + [f"{row['us'] / row['floor_us']:.2f}"]
    lines.append(f"| {row['op']} | {row['case']} | {' | '.join(told)} |")
  return "\n".join(lines) + "\n"
