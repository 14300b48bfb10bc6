"""What sparse prefill costs: nats and answers by the share of earlier blocks that tiles of a prompt's queries read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sparse_serve_jax.evaluation.accuracy import Row, of_all_tasks
from sparse_serve_jax.evaluation.cases import DENSE_PREFILL
from sparse_serve_jax.evaluation.intervals import interval

VALUES = ("accuracy", "nats", "prompt_nats")


def compared(rows: Sequence[Row]) -> Iterator[Row]:
  """Of the rows of one length and group, an entry for each case of sparse prefill that all of its tasks have.

  Yields:
    "case", "series", "at"; means over tasks of "read", the share of earlier blocks, of "read_by_layer" [L], of
    "agreement", and of VALUES; of each of these "_more" than dense prefill, with the "_interval" of that, the 95 % one
    of the paired bootstrap over instances. Nothing where dense prefill is not there.
  """
  cases = of_all_tasks(rows)
  dense = next((ours for ours in cases if ours[0]["series"] == DENSE_PREFILL), None)
  if dense is not None:
    for ours in sorted(cases, key=lambda ours: [ours is not dense, ours[0]["series"], ours[0]["at"]]):
      yield _entry(ours, dense)


def _entry(ours: Sequence[Row], dense: Sequence[Row]) -> Row:
  told: Row = {key: ours[0][key] for key in ("case", "series", "at")}
  told |= {key: float(np.mean([row[key] for row in ours])) for key in ("read", "agreement", *VALUES)}
  for key in VALUES:
    told[f"{key}_more"] = told[key] - float(np.mean([row[key] for row in dense]))
    told[f"{key}_interval"] = interval(*([row["each"][key] for row in of] for of in (ours, dense)))
  return told | {"read_by_layer": np.mean([row["read_by_layer"] for row in ours], 0).round(4).tolist()}


# Of the table in `report`.
TITLE = (
  "Sparse prefill\n"
  "Prompts are read in one piece by tiles of 128 queries, each of which reads some of the blocks before it. Blocks "
  "read: their share of all that come before a tile, over tiles, heads and layers; then the layers with the least and "
  "the most. Prompt: nats of a prompt's last tokens, which attend sparsely themselves. Answer: what follows, decoded "
  "densely over the keys and values that a prompt leaves. Differences are from dense prefill, intervals 95 % ones of "
  "the paired bootstrap over instances."
)
HEAD = (
  *("setting", "blocks read", "least layer", "most", "nats of the prompt", "vs dense", "interval"),
  *("nats of the answer", "vs dense", "interval", "right", "vs dense", "interval", "next token that of dense"),
)


def cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  """The line of an entry."""
  line = [of["case"], *(f"{share:.1%}" for share in (of["read"], min(of["read_by_layer"]), max(of["read_by_layer"])))]
  for key, form in (("prompt_nats", ".4f"), ("nats", ".4f"), ("accuracy", ".1%")):
    low, high = of[f"{key}_interval"]
    line += [f"{of[key]:{form}}", f"{of[f'{key}_more']:+{form}}", f"{low:+{form}} to {high:+{form}}"]
  yield [*line, f"{of['agreement']:.1%}"]
