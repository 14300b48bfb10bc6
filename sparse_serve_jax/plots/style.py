"""One style for all pictures: readable in grey, units at the axes, and below them what made the numbers."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_serve_jax.files import writing

# From dark to light and back, so that neighbours differ in grey too (Okabe and Ito's colors, which all people can tell
# apart). Dashes and markers say the rest: with 8 colors, 4 dashes and 9 markers no two of 32 lines look alike.
COLORS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#999999", "#009E73", "#CC79A7")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")
MISS, HIT, KEPT = "#d62728", "#222222", "#cccccc"
LOOKS: dict[Any, Any] = {
  "axes.prop_cycle": cycler(
    color=[COLORS[i % 8] for i in range(32)],
    linestyle=[DASHES[i // 8] for i in range(32)],
    marker=[MARKERS[i % 9] for i in range(32)],
  ),
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlesize": "medium",
  "figure.constrained_layout.use": True,
  "image.cmap": "Greys",
  "image.aspect": "auto",
  "image.interpolation": "nearest",
  "legend.fontsize": "small",
  "legend.frameon": False,
  "lines.markersize": 4,
  "savefig.dpi": 120,
}


def use() -> None:
  """Gives all figures that are made from now on the `LOOKS`."""
  mpl.rcParams.update(LOOKS)


def subplots(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.5, 4.5)) -> tuple[Figure, Any]:
  """A figure in the style, its `size` in inches, and its axes, `rows` x `columns`, as of `plt.subplots`.

  It is for a file, not for a screen.
  """
  with mpl.rc_context(LOOKS):
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns)


def save(figure: Figure, file: pathlib.Path, made_by: str = "") -> pathlib.Path:
  """Writes a figure to a `file`, with a line below it, `made_by`, on what made its numbers. Returns the file."""
  for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
    if legend is not None:
      legend.set_frame_on(False)
  if made_by:
    figure.supxlabel(made_by, fontsize=6, color="0.4", x=0.01, ha="left")
  with mpl.rc_context(LOOKS), writing(file):
    figure.savefig(file)
  plt.close(figure)
  return file


def logarithmic(axes: Axes, which: str, at: Sequence[float] | None = None) -> None:
  """Makes the axis `which`, "x" or "y", logarithmic.

  Its ticks are those of `at` that are not too close to each other; without `at` they are three or more."""
  axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
  (axes.set_xscale if which == "x" else axes.set_yscale)("log")
  low, high = sorted(axis.get_view_interval())
  subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
  ticks = ticker.LogLocator(subs=subs).tick_values(low, high)
  shown = [tick for tick in ticks if low <= tick <= high]
  shown = shown if at is None else _apart(at, 0.07 * math.log(high / low))
  axis.set_major_locator(ticker.FixedLocator(shown) if at or len(shown) > 2 else ticker.MaxNLocator(4))
  axis.set_major_formatter("{x:g}")
  axis.set_minor_locator(ticker.NullLocator())


def _apart(values: Sequence[float], least: float) -> list[float]:
  """Of ascending values those whose logarithms are so far apart, from the last one down."""
  kept: list[float] = []
  for value in reversed(values):
    if not kept or math.log(kept[0] / value) >= least:
      kept.insert(0, value)
  return kept


def bars(axes: Axes, values: Mapping[str, float], label: str, told: Mapping[str, str] | None = None) -> None:
  """A bar for each name of `values`, told apart by hatches and colors, with its value above, or what is `told` of it.

  The axis has the `label`.
  """
  for i, (name, value) in enumerate(values.items()):
    bar = axes.bar(name, value, color=COLORS[i % 8], hatch=HATCHES[i // 8 % 8], edgecolor="white")
    axes.bar_label(bar, [told[name] if told else f"{value:.3g}"], fontsize=7)
  axes.set(ylabel=label)
  plt.setp(axes.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
