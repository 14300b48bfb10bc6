"""What sparse prefill costs: nats and answers by the share of earlier blocks that tiles of a prompt's queries read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sparse_serve_jax.evaluation.accuracy import Row
from sparse_serve_jax.evaluation.cases import DENSE
from sparse_serve_jax.evaluation.intervals import interval


def compared(rows: Sequence[Row]) -> Iterator[Row]:
  """Of rows of the part prefill, an entry for each length, group and case that all tasks of the group have.

  Yields:
    "tokens", "group", "case", "series", "at"; means over tasks of "read", the share of earlier blocks (1: dense), of
    "accuracy", "nats" and "agreement"; "accuracy_more" and "nats_more" than dense's, each with the 95 % interval of the
    paired bootstrap over instances; "read_by_layer" [L], None of dense.
  """
  for n_tokens, group in itertools.product(*(sorted({row[key] for row in rows}) for key in ("tokens", "group"))):
    chosen = [row for row in rows if (row["tokens"], row["group"]) == (n_tokens, group)]
    of_case: dict[str, list[Row]] = {}
    for row in sorted(chosen, key=lambda row: row["task"]):
      of_case.setdefault(row["case"], []).append(row)
    whole = [ours for ours in of_case.values() if len(ours) == len({row["task"] for row in chosen})]
    dense = next((ours for ours in whole if ours[0]["series"] == DENSE), None)
    for ours in sorted(whole, key=lambda ours: [ours[0]["series"] != DENSE, ours[0]["series"], ours[0]["at"]]):
      if dense is not None:
        yield dict(tokens=n_tokens, group=group) | _entry(ours, dense)


def _entry(ours: Sequence[Row], dense: Sequence[Row]) -> Row:
  told: Row = {key: ours[0][key] for key in ("case", "series", "at")}
  told["read"] = float(np.mean([row.get("read", 1.0) for row in ours]))
  for key in ("accuracy", "nats", "agreement"):
    told[key] = float(np.mean([row[key] for row in ours]))
  for key in ("accuracy", "nats"):
    each = [[row["each"][key] for row in of] for of in (ours, dense)]
    told[f"{key}_more"] = told[key] - float(np.mean([row[key] for row in dense]))
    told[f"{key}_interval"] = interval(*each)
  layers = [row["read_by_layer"] for row in ours if "read_by_layer" in row]
  return told | {"read_by_layer": np.mean(layers, 0).round(4).tolist() if layers else None}


# Of the table in `report`.
TITLE = (
  "Sparse prefill\n"
  "Prompts are read in one piece by tiles of 128 queries, each of which reads some of the blocks before it; what follows "
  "is decoded densely over the keys and values that this leaves. Blocks read: their share of all that come before a "
  "tile, over tiles, heads and layers; then the layers with the least and the most. Intervals are 95 % ones of the "
  "paired bootstrap over instances."
)
HEAD = (
  *("setting", "blocks read", "least layer", "most", "right", "vs dense", "interval", "nats", "vs dense", "interval"),
  "next token that of dense",
)


def cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  """The line of an entry."""
  layers = of["read_by_layer"]
  line = [of["case"], f"{of['read']:.1%}", *("" if layers is None else f"{f(layers):.1%}" for f in (min, max))]
  (low, high), (less, more) = of["accuracy_interval"], of["nats_interval"]
  line += [f"{of['accuracy']:.1%}", f"{of['accuracy_more']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
  line += [f"{of['nats']:.4f}", f"{of['nats_more']:+.4f}", f"{less:+.4f} to {more:+.4f}"]
  yield [*line, f"{of['agreement']:.1%}"]
