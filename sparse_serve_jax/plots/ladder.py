"""Rungs of a ladder against the rate of arrival."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from sparse_serve_jax.evaluation.ladder import Row
from sparse_serve_jax.plots import style

SHOWN = {  # key of a cell -> what it is
  "ttft_mean_s": "mean time to first token, s",
  "tbt_mean_s": "mean time between tokens, s",
  "throughput_tok_s": "output tokens/s",
}


def draw(cells: Sequence[Row], goodput: Mapping[str, float | None], file: pathlib.Path, made_by: str = "") -> None:
  """Cells of a ladder against their rate, a line for each rung; its goodput, or if that was not searched the score
  of its answers."""
  figure, all_axes = style.subplots(2, 2, size=(9, 6.8))
  rungs = list(dict.fromkeys(cell["rung"] for cell in cells))
  for axes, (key, label) in zip(all_axes.flat, SHOWN.items(), strict=False):
    for rung in rungs:
      line = [(cell["rate"], cell[key]) for cell in cells if cell["rung"] == rung and cell[key] is not None]
      axes.plot(*zip(*line, strict=True), label=rung)
    axes.set(xlabel="requests/s", ylabel=label)
    if any(cell[key] for cell in cells):  # there is no logarithm of nothing
      if any(cell["rate"] for cell in cells):
        style.logarithmic(axes, "x")
      if "throughput" not in key:
        style.logarithmic(axes, "y")
  last = all_axes.flat[3]
  scores = {cell["rung"]: cell["score_mean"] for cell in cells if cell["score_mean"] is not None}
  if goodput:
    style.bars(last, {rung: goodput.get(rung) or 0.0 for rung in rungs}, "goodput, requests/s")
  elif scores:
    style.bars(last, scores, "score of the answers")
    last.set(ylim=(0, 1.1))
  else:
    last.set_axis_off()
  handles = all_axes.flat[0].get_legend_handles_labels()
  figure.legend(*handles, loc="outside upper center", ncols=min(6, len(rungs)))
  style.save(figure, file, made_by)
