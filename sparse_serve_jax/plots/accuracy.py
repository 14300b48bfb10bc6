"""The accuracy experiment: what `report` or the rows of `selections.reuse` tell."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_serve_jax.evaluation import report, selections
from sparse_serve_jax.evaluation.accuracy import Row
from sparse_serve_jax.evaluation.cases import DEFAULT_METHOD, DENSE, DENSE_PREFILL, PSA
from sparse_serve_jax.plots import style

_POINT: dict[str, Any] = dict(marker="*", markersize=9, linestyle="")  # a series with one entry


def write(folder: pathlib.Path, told: dict[str, list[Row]], reuse_rows: list[Row], made_by: str = "") -> None:
  """All plots of a summary and of rows of `reuse`, as .png files, each with a line on what made it."""
  for name, entries in _by(told["accuracies"], "group", "tokens").items():
    if len(entries) > 1:  # dense alone is no line
      accuracy_by_bytes(entries, folder / f"accuracy_{name}.png", made_by)
  for name, entries in _by(told["equal_bytes"], "group", "tokens").items():
    if len(entries) > 1:
      at_equal_bytes(entries, folder / f"equal_bytes_{name}.png", made_by)
  of_psa = [{"series": PSA} | entry for entry in told["psa_by_head"]]  # older summaries had this rule only
  for name, entries in _by(of_psa, "series", "group", "tokens").items():
    blocks_by_head(nearest(entries), folder / f"{name}.png", made_by)
  for name, entries in _by(told.get("prefill", []), "group", "tokens").items():
    if len(entries) > 1:
      prefill_by_share(entries, folder / f"prefill_{name}.png", made_by)
  for name, entries in _by(reuse_rows, "task", "tokens").items():
    reuse(entries, folder / f"reuse_{name}.png", made_by)


def accuracy_by_bytes(accuracies: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """A group's mean accuracy against the share of dense's bytes that is read, a line for each series."""
  figure, axes = style.subplots(size=(8.5, 4.5))
  for series in dict.fromkeys(row["series"] for row in accuracies):
    line = sorted((row["bytes"], row["accuracy"]) for row in accuracies if row["series"] == series)
    axes.plot(*zip(*line, strict=True), label=series, **_POINT if len(line) == 1 else {})
  title = f"{accuracies[0]['group']}, {accuracies[0]['tokens']} tokens, mean of {accuracies[0]['tasks']} tasks"
  axes.set(xlabel="bytes read, of dense", ylabel="accuracy", ylim=(0, 1.02), title=title)
  style.logarithmic(axes, "x")
  figure.legend(fontsize=7, loc="outside right upper")
  style.save(figure, file, made_by)


def at_equal_bytes(compared: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Entries of `equal_bytes.compared`: error and nats against the bytes that are read, a line for each series."""
  figure, (left, right) = style.subplots(1, 2, size=(12, 5))
  for series in dict.fromkeys(row["series"] for row in compared if row["series"] != DENSE):
    line = sorted((row["bytes_read"] / 1024, row["error"], row["nats"]) for row in compared if row["series"] == series)
    read, error, nats = zip(*line, strict=True)
    look: dict[str, Any] = dict(_POINT) if len(line) == 1 else {}
    look |= dict(color="black", linestyle="-", linewidth=2) if series == DEFAULT_METHOD else {}
    for axes, values in ((left, error), (right, nats)):
      axes.plot(read, values, label=f"{series}, fixed budget" if series == DEFAULT_METHOD else series, **look)
  left.set(ylabel="error of a head's output, relative to dense")
  style.logarithmic(left, "y")
  right.set(ylabel="nats a token")
  if dense := [row["nats"] for row in compared if row["series"] == DENSE]:
    right.axhline(dense[0], color="gray", linewidth=1, label=DENSE)
  for axes in (left, right):
    axes.set(xlabel="KiB read a step and layer, digests included")
  figure.suptitle(f"{compared[0]['group']}, {compared[0]['tokens']} tokens")
  figure.legend(*right.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
  style.save(figure, file, made_by)


def prefill_by_share(compared: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Entries of `prefill_report.compared`: nats of the prompt and accuracy, beside those of dense prefill, against the
  share of earlier blocks that is read, a line for each series.
  """
  figure, axes = style.subplots(1, 2, size=(12, 4.5))
  for series in dict.fromkeys(row["series"] for row in compared if row["series"] != DENSE_PREFILL):
    of = sorted((row for row in compared if row["series"] == series), key=lambda row: row["read"])
    look = _POINT if len(of) == 1 else dict(marker="o", markersize=3)
    for ax, key in zip(axes, ("prompt_nats_more", "accuracy_more"), strict=True):
      ax.plot([row["read"] for row in of], [row[key] for row in of], label=series, **look)
  for ax, name in zip(axes, ("nats of the prompt", "accuracy"), strict=True):
    ax.axhline(0, color="gray", linewidth=1)
    ax.set(xlabel="share of the earlier blocks that is read", ylabel=f"change in {name} from dense prefill")
  figure.suptitle(f"{compared[0]['group']}, {compared[0]['tokens']} tokens")
  figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
  style.save(figure, file, made_by)


def blocks_by_head(of_psa: Row, file: pathlib.Path, made_by: str = "") -> None:
  """An entry of `report.psa_by_head`: a heat map of layers and KV heads, and quantiles over tokens by layer."""
  figure, (left, right) = style.subplots(1, 2, size=(9, 4.5))
  _heat_map(figure, left, np.array(of_psa["mean"]), "mean blocks")
  quantiles = np.array(of_psa["quantiles"]).mean(2)  # [5, L]
  for low, high in ((0, 4), (1, 3)):
    right.fill_between(
      np.arange(quantiles.shape[1]), quantiles[low], quantiles[high], alpha=0.25, color=style.COLORS[2]
    )
  right.plot(quantiles[2])
  right.set(xlabel="layer", ylabel="blocks: median, 50 % and 90 % of tokens", ylim=(0, 1 + quantiles.max()))
  right.locator_params("x", integer=True)
  figure.suptitle(f"{of_psa['series']} {of_psa['threshold']:g}: {of_psa['group']}, {of_psa['tokens']} tokens")
  style.save(figure, file, made_by)


def reuse(rows: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """Rows of `selections.reuse` at one task and length: the curves over w, and layers and heads of the middle row."""
  figure, axes = style.subplots(2, 2, size=(10.5, 8))
  for axis, key, label in zip(axes[0], ("overlap", "working_set"), ("overlap", "working set / selection"), strict=True):
    for row in sorted(rows, key=lambda row: (row["series"], row["at"])):
      curve = selections.curve(row, key)
      axis.plot(np.arange(1, len(curve) + 1), curve, label=row["case"])
    axis.set(xlabel="steps w", ylabel=label)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
  row = rows[len(rows) // 2]
  _heat_map(figure, axes[1, 0], np.array(row["overlap"])[..., 0], f"{row['case']}: overlap with the step before")
  _heat_map(figure, axes[1, 1], np.array(row["working_set"])[..., 11], f"{row['case']}: working set, w = 12")
  figure.suptitle(f"{row['task']}, {row['tokens']} tokens")
  style.save(figure, file, made_by)


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


def _heat_map(figure: Figure, axes: Axes, values: np.ndarray, title: str) -> None:
  """Of values [L, K]."""
  figure.colorbar(axes.imshow(values, aspect="auto", origin="lower"), ax=axes)
  axes.set(xlabel="KV head", ylabel="layer", title=title, xticks=range(values.shape[1]), yticks=range(values.shape[0]))
