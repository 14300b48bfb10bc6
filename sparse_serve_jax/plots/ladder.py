"""Rungs of a ladder against the rate of arrival."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_serve_jax.ladder.folder import Row
from sparse_serve_jax.ladder.goodput import Goodput
from sparse_serve_jax.plots import style

TIMES = {  # key of a cell -> what it is
  "ttft_mean_s": "mean time to first token, s",
  "tbt_mean_s": "mean time between tokens, s",
}


def write(folder: pathlib.Path, cells: Sequence[Row], found: Mapping[str, Goodput], made_by: str = "") -> None:
  """ladder.png, and ladder_cache.png if some rung keeps blocks outside HBM; of cells that have a rate."""
  cells = [cell for cell in cells if cell["rate"]]
  if not cells:
    return
  draw(cells, found, folder / "ladder.png", made_by)
  if any(_loads(cell) for cell in cells):
    draw_cache(cells, folder / "ladder_cache.png", made_by)


def draw(cells: Sequence[Row], found: Mapping[str, Goodput], file: pathlib.Path, made_by: str = "") -> None:
  """Cells of a ladder against their rate, a line for each rung; its goodput, or if that was not searched the score
  of its answers."""
  figure, all_axes = style.subplots(2, 2, size=(9, 6.8))
  looks = _looks(cells)
  for axes, (key, label) in zip(all_axes.flat, TIMES.items(), strict=False):
    _lines(axes, [{**cell, "shown": cell[key]} for cell in cells], label, looks)
    if any(cell[key] for cell in cells):  # there is no logarithm of nothing
      style.logarithmic(axes, "y")
  _lines(all_axes.flat[2], [{**cell, "shown": cell["throughput_tok_s"]} for cell in cells], "output tokens/s", looks)
  last = all_axes.flat[3]
  scores = {cell["rung"]: cell["score_mean"] for cell in cells if cell["score_mean"] is not None}
  if found:
    told = {rung: _in_short(of) for rung, of in found.items()}
    style.bars(last, {rung: of.rate or 0.0 for rung, of in found.items()}, "goodput, requests/s", told)
  elif scores:
    style.bars(last, scores, "score of the answers")
    last.set(ylim=(0, 1.1))
  else:
    last.set_axis_off()
  style.save(_with_legend(figure, all_axes.flat[0]), file, made_by)


def draw_cache(cells: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Hit rates and blocks loaded of those rungs that load any, against the rate of arrival."""
  looks, loading = _looks(cells), {cell["rung"] for cell in cells if _loads(cell)}
  kept = [cell for cell in cells if cell["rung"] in loading]
  figure, (left, right) = style.subplots(1, 2, size=(9, 3.9))
  _lines(
    left, [{**cell, "shown": cell["hbm_hit_rate"]} for cell in kept], "share of blocks read that were in HBM", looks
  )
  loads = [{**cell, "shown": cell["blocks_loaded"] / cell["output_tokens"]} for cell in kept if cell["output_tokens"]]
  _lines(right, loads, "blocks loaded/output token", looks)
  right.set(ylim=(0, None))
  style.save(_with_legend(figure, left), file, made_by)


def _loads(cell: Row) -> bool:
  return cell["hbm_hit_rate"] is not None and cell["blocks_loaded"] > 0


def _looks(cells: Sequence[Row]) -> dict[str, dict[str, Any]]:
  """How the line of each rung looks, in every picture."""
  rungs = dict.fromkeys(cell["rung"] for cell in cells)
  return dict(zip(rungs, itertools.cycle(style.LOOKS["axes.prop_cycle"]), strict=False))


def _lines(axes: Axes, cells: Sequence[Row], label: str, looks: Mapping[str, Mapping[str, Any]]) -> None:
  """What is "shown" of cells against their rate, with a tick at each rate."""
  for rung in dict.fromkeys(cell["rung"] for cell in cells):
    line = [(cell["rate"], cell["shown"]) for cell in cells if cell["rung"] == rung and cell["shown"] is not None]
    axes.plot(*zip(*sorted(line), strict=True), label=rung, **looks[rung])
  axes.set(xlabel="requests/s", ylabel=label)
  if rates := sorted({cell["rate"] for cell in cells if cell["rate"]}):
    style.logarithmic(axes, "x", rates)


def _in_short(of: Goodput) -> str:
  if of.rate is None:
    return f"< {of.fails_at:.3g}"
  return f"{of.rate:.3g}" if of.fails_at is not None else f"≥ {of.rate:.3g}"


def _with_legend(figure: Figure, axes: Axes) -> Figure:
  handles, labels = axes.get_legend_handles_labels()
  columns = len(labels) if len(labels) <= 5 else -(-len(labels) // 2)
  figure.legend(handles, labels, loc="outside upper center", ncols=columns)
  return figure
