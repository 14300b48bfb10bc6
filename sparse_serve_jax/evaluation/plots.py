"""Plots of the accuracy experiment, each of what `report` or the rows of `selections.reuse` tell. Needs matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler

from sparse_serve_jax.evaluation import report
from sparse_serve_jax.evaluation.accuracy import Row
from sparse_serve_jax.evaluation.cases import DEFAULT_METHOD, DENSE

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

# Ten colors, then the same dotted, so that no two of up to twenty lines look alike.
plt.rcParams["axes.prop_cycle"] = cycler(linestyle=["-", ":"]) * plt.rcParams["axes.prop_cycle"]


def write(folder: pathlib.Path, told: dict[str, list[Row]], reuse_rows: list[Row]) -> None:
  """All plots of a summary and of rows of `reuse`, as .png files."""
  for name, entries in _by(told["accuracies"], "group", "tokens").items():
    if len(entries) > 1:  # dense alone is no line
      accuracy_by_bytes(entries, folder / f"accuracy_{name}.png")
  for name, entries in _by(told["equal_bytes"], "group", "tokens").items():
    if len(entries) > 1:
      at_equal_bytes(entries, folder / f"equal_bytes_{name}.png")
  for name, entries in _by(told["psa_by_head"], "series", "group", "tokens").items():
    blocks_by_head(nearest(entries), folder / f"{name}.png")
  for name, entries in _by(reuse_rows, "task", "tokens").items():
    reuse(entries, folder / f"reuse_{name}.png")


def ladder(cells: Sequence[Row], goodput: dict[str, float | None], file: pathlib.Path) -> None:
  """Cells of a ladder against their rate, a line for each rung; its goodput, or if that was not searched the score
  of its answers."""
  shown = {"ttft_mean_s": "mean TTFT, s", "tbt_mean_s": "mean TBT, s", "throughput_tok_s": "output tokens/s"}
  figure, all_axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
  rungs = list(dict.fromkeys(cell["rung"] for cell in cells))
  for axes, (key, label) in zip(all_axes.flat, shown.items(), strict=False):
    for rung in rungs:
      line = [(cell["rate"], cell[key]) for cell in cells if cell["rung"] == rung and cell[key] is not None]
      axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=rung)
    axes.set(xlabel="requests/s", ylabel=label)
    if not any(cell[key] for cell in cells):
      continue  # a logarithm of nothing
    axes.set_xscale("log")
    axes.set_yscale("linear" if "throughput" in key else "log")
    for axis in (axes.xaxis, axes.yaxis)[: 1 if "throughput" in key else 2]:  # numbers as people write them
      axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
      axis.set_major_formatter("{x:g}")
      axis.set_minor_formatter(ticker.NullFormatter())
  last, colors = all_axes.flat[3], [line.get_color() for line in all_axes.flat[0].get_lines()]
  scores = {cell["rung"]: cell["score_mean"] for cell in cells if cell["score_mean"] is not None}
  if goodput:
    last.bar(rungs, [goodput.get(rung) or 0.0 for rung in rungs], color=colors)
    last.set(ylabel="goodput, requests/s")
  elif scores:
    last.bar(rungs, [scores.get(rung, 0.0) for rung in rungs], color=colors)
    last.set(ylabel="score of the answers", ylim=(0, 1.02))
  else:
    last.set_axis_off()
  plt.setp(last.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
  figure.legend(*all_axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=len(rungs))
  _save(figure, file)


def accuracy_by_bytes(accuracies: Sequence[Row], file: pathlib.Path) -> None:
  """A group's mean accuracy against the share of dense's bytes that is read, a line for each series."""
  figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
  for series in dict.fromkeys(row["series"] for row in accuracies):
    line = sorted((row["bytes"], row["accuracy"]) for row in accuracies if row["series"] == series)
    style: dict[str, Any] = (
      dict(marker="*", markersize=9, linestyle="") if len(line) == 1 else dict(marker="o", markersize=3)
    )
    axes.plot(*zip(*line, strict=True), label=series, **style)
  title = f"{accuracies[0]['group']}, {accuracies[0]['tokens']} tokens, mean of {accuracies[0]['tasks']} tasks"
  axes.set(xscale="log", xlabel="bytes read, of dense", ylabel="accuracy", ylim=(0, 1.02), title=title)
  figure.legend(fontsize=7, loc="outside right upper")
  _save(figure, file)


def at_equal_bytes(compared: Sequence[Row], file: pathlib.Path) -> None:
  """Entries of `report.at_equal_bytes`: error and nats against the bytes that are read, a line for each series."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
  for series in dict.fromkeys(row["series"] for row in compared if row["series"] != DENSE):
    line = sorted((row["bytes_read"] / 1024, row["error"], row["nats"]) for row in compared if row["series"] == series)
    read, error, nats = zip(*line, strict=True)
    style: dict[str, Any] = dict(marker="*", markersize=9, linestyle="") if len(line) == 1 else dict(marker="o")
    style |= dict(color="black", linestyle="-", linewidth=2) if series == DEFAULT_METHOD else {}
    for axes, values in ((left, error), (right, nats)):
      axes.plot(read, values, label=f"{series}, fixed budget" if series == DEFAULT_METHOD else series, **style)
  left.set(ylabel="error of a head's output, relative to dense", yscale="log")
  right.set(ylabel="nats a token")
  if dense := [row["nats"] for row in compared if row["series"] == DENSE]:
    right.axhline(dense[0], color="gray", linewidth=1, label=DENSE)
  for axes in (left, right):
    axes.set(xlabel="KiB read a step and layer, digests included")
  figure.suptitle(f"{compared[0]['group']}, {compared[0]['tokens']} tokens")
  figure.legend(*right.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
  _save(figure, file)


def blocks_by_head(of_psa: Row, file: pathlib.Path) -> None:
  """An entry of `report.psa_by_head`: a heat map of layers and KV heads, and quantiles over tokens by layer."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
  _heat_map(figure, left, np.array(of_psa["mean"]), "mean blocks")
  quantiles = np.array(of_psa["quantiles"]).mean(2)  # [5, L]
  for low, high in ((0, 4), (1, 3)):
    right.fill_between(np.arange(quantiles.shape[1]), quantiles[low], quantiles[high], alpha=0.25, color="C0")
  right.plot(quantiles[2], marker="o", markersize=3)
  right.set(xlabel="layer", ylabel="blocks: median, 50 % and 90 % of tokens", ylim=(0, None))
  figure.suptitle(f"{of_psa['series']} {of_psa['threshold']:g}: {of_psa['group']}, {of_psa['tokens']} tokens")
  _save(figure, file)


def reuse(rows: Sequence[Row], file: pathlib.Path) -> None:
  """Rows of `selections.reuse` at one task and length: the curves over w, and layers and heads of the middle row."""
  figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
  for axis, key, label in zip(axes[0], ("overlap", "working_set"), ("overlap", "working set / selection"), strict=True):
    for row in sorted(rows, key=lambda row: (row["series"], row["at"])):
      curve = report.reuse_curve(row, key)
      axis.plot(np.arange(1, len(curve) + 1), curve, label=row["case"])
    axis.set(xlabel="steps w", ylabel=label)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
  row = rows[len(rows) // 2]
  _heat_map(figure, axes[1, 0], np.array(row["overlap"])[..., 0], f"{row['case']}: overlap with the step before")
  _heat_map(figure, axes[1, 1], np.array(row["working_set"])[..., 11], f"{row['case']}: working set, w = 12")
  figure.suptitle(f"{row['task']}, {row['tokens']} tokens")
  _save(figure, file)


def nearest(entries: Sequence[Row]) -> Row:
  """The entry of `report.psa_by_head` to show where one is shown."""
  at = report.nearest_threshold([entry["threshold"] for entry in entries])
  return next(entry for entry in entries if entry["threshold"] == at)


def _by(entries: Sequence[Row], *keys: str) -> dict[str, list[Row]]:
  """Entries by their values under keys, which make a name of a file."""
  named: dict[str, list[Row]] = {}
  for entry in entries:
    name = "_".join(str(entry[key]) for key in keys)
    named.setdefault(name.replace(", ", "_").replace(" ", "_"), []).append(entry)
  return named


def _heat_map(figure: Any, axes: Any, values: np.ndarray, title: str) -> None:
  """Of values [L, K]."""
  figure.colorbar(axes.imshow(values, aspect="auto", origin="lower"), ax=axes)
  axes.set(xlabel="KV head", ylabel="layer", title=title, xticks=range(values.shape[1]), yticks=range(values.shape[0]))


def _save(figure: Any, file: pathlib.Path) -> None:
  figure.savefig(file, dpi=150)
  plt.close(figure)
