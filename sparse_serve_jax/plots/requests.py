"""Requests that a workload's run has served, here or by an endpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_serve_jax.plots import style
from sparse_serve_jax.serving import metrics

Row = dict[str, Any]


def times(rows: Sequence[Row]) -> dict[str, np.ndarray]:
  """By what they are, in seconds, float64 [n]: of the requests that had a token and ended well."""
  ended = [row for row in rows if row.get("first_token_s") is not None and "error" not in row]
  between = [metrics.gaps(row["token_s"], row.get("output_tokens", len(row["token_s"]))) for row in ended]
  return {
    "time to first token, s": np.array([row["first_token_s"] - row["arrival_s"] for row in ended]),
    "time between tokens, s": np.concatenate([np.zeros(0), *between]),
    "latency, s": np.array([row["finish_s"] - row["arrival_s"] for row in ended if row["finish_s"] is not None]),
  }


def table(rows: Sequence[Row]) -> list[Row]:
  """A row for each of `times`: how many they are, their mean and percentiles."""
  return [
    {"": name, "n": len(of)} | {key.split("_")[1]: value for key, value in metrics.distribution("of", of).items()}
    for name, of in times(rows).items()
  ]


def draw(rows: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """How many of the requests had their first token, and their tokens, within what time."""
  figure, both = style.subplots(1, 2, size=(8.5, 3.6))
  shares = ("share of requests", "share of tokens")
  for axes, (label, values), of in zip(both, list(times(rows).items())[:2], shares, strict=True):
    axes.set(xlabel=label, ylabel=of, ylim=(0, 1.02))
    if len(values):
      axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", marker="")
    if len(values) and min(values) > 0:
      style.logarithmic(axes, "x")
  style.save(figure, file, made_by)
