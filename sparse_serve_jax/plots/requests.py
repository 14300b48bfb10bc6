"""Requests that a workload's run has served."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_serve_jax.plots import style

Row = dict[str, Any]


def draw(rows: Sequence[Row], file: pathlib.Path, made_by: str = "") -> None:
  """How many of the requests had their first token, and their tokens, within what time."""
  first = [row["first_token_s"] - row["arrival_s"] for row in rows if row.get("first_token_s") is not None]
  between = np.concatenate([np.diff(row.get("token_s", [])) for row in rows])
  figure, (left, right) = style.subplots(1, 2, size=(8.5, 3.6))
  for axes, values, label, of in (
    (left, first, "time to first token, s", "share of requests"),
    (right, between, "time between tokens, s", "share of tokens"),
  ):
    axes.set(xlabel=label, ylabel=of, ylim=(0, 1.02))
    if len(values):
      axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", marker="")
    if len(values) and min(values) > 0:
      style.logarithmic(axes, "x")
  style.save(figure, file, made_by)
