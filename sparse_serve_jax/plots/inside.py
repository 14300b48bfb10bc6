"""Drawings of what `inside` tells, each on axes that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.image import AxesImage

from sparse_serve_jax.evaluation.inside import Step
from sparse_serve_jax.plots.style import HIT, KEPT, MISS


def rows_by_head(axes: Axes, values: np.ndarray, mark: int | None = None, **options: Any) -> AxesImage:
  """An image of `values` [L, K, N]: a row for each layer and KV head, a column for each block.

  Args:
    axes: where.
    values: -inf is left white.
    mark: a block that an arrow points to.
    **options: as of imshow.
  """
  n_layers, n_heads, n = values.shape
  image = axes.imshow(np.where(np.isfinite(values), values, np.nan).reshape(-1, n), **options)
  axes.set(xlabel="block of the prompt", ylabel="layer", yticks=np.arange(n_layers) * n_heads + (n_heads - 1) / 2)
  axes.set_yticklabels([str(layer) for layer in range(n_layers)])
  for layer in range(1, n_layers):
    axes.axhline(layer * n_heads - 0.5, color="white", linewidth=1.5)
  if mark is not None:
    arrow = dict(arrowstyle="-|>", color=MISS)
    axes.annotate("", (mark, -0.5), (0, 16), textcoords="offset points", arrowprops=arrow, annotation_clip=False)
  return image


def numbers_by_head(axes: Axes, values: np.ndarray, form: str = "{:.0f}", **options: Any) -> AxesImage:
  """An image of `values` [L, K] with the numbers in it, in the format `form`: a column for each layer. `options` are as
  of imshow."""
  image = axes.imshow(values.T, **options)
  middle = (image.norm.vmin + image.norm.vmax) / 2  # pyright: ignore[reportOperatorIssue]  an image has both
  for (layer, head), value in np.ndenumerate(values):
    color = "white" if value > middle else "black"
    axes.text(layer, head, form.format(value), ha="center", va="center", color=color, fontsize="small")
  axes.set(xlabel="layer", ylabel="KV head", xticks=range(values.shape[0]), yticks=range(values.shape[1]))
  return image


def stops(axes: Axes, by_score: np.ndarray, by_mass: np.ndarray, at: Mapping[str, int], claims: tuple[int, np.ndarray]):
  """Curves of the attention mass that is left against the blocks read, and where lists end.

  Args:
    axes: where.
    by_score: [N], the share of the mass that has been read after each block in the order of the digests.
    by_mass: [N], in that of an oracle.
    at: blocks read, by the name of who stops there.
    claims: blocks of a group, and the share [J] that the stop test takes for read after each.
  """
  n, (size, shares) = np.arange(1, len(by_score) + 1), claims
  ends = np.minimum(size * np.arange(1, len(shares) + 1), len(by_score))
  for x, of, look in (
    (n, by_mass, dict(color=KEPT, label="order of an oracle")),
    (n, by_score, dict(color=HIT, label="order of the digests")),
    (ends, shares, dict(color="tab:blue", marker=".", linestyle="", label="what the stop test takes for left")),
  ):
    some = of < 1 - 1e-6  # a logarithm of nothing
    axes.semilogy(x[some], 1 - of[some], **look)
  for (name, where), style in zip(at.items(), ("-", "--", ":"), strict=False):
    axes.axvline(where, color=MISS, linestyle=style, linewidth=1, label=f"{name} stops")
  axes.set(xlabel="blocks read", ylabel="attention mass left")


def residency(axes: Axes, steps: Sequence[Step], layer: int, head: int) -> None:
  """Blocks of one layer and KV head over the steps of a request: in a slot, read there, or read from DRAM."""
  n = steps[-1].selected.shape[-1]
  image = np.zeros((n, len(steps)))
  for t, step in enumerate(steps):
    read, there = step.selected[layer, head], step.resident[layer, head]
    image[: len(read), t] = np.where(read, np.where(there, 2, 3), there)
  axes.imshow(image, cmap=ListedColormap(["white", KEPT, HIT, MISS]), vmin=-0.5, vmax=3.5, origin="lower")
  axes.set(xlabel="decode step", ylabel="block")
  for color, label in ((HIT, "read from its slot"), (MISS, "read from DRAM"), (KEPT, "in a slot, not read")):
    axes.plot([], [], "s", color=color, label=label)
