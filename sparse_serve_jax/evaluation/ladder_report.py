"""Tables of a ladder's cells: text for a terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_serve_jax.evaluation.ladder import Goodput, Row

# Head of a column, the key of a cell, and what its number is shown with.
_COLUMNS = (
  ("rung", "rung", "{}"),
  ("requests/s", "rate", "{:g}"),
  ("finished", "requests", "{}"),
  ("TTFT s", "ttft_mean_s", "{:.3f}"),
  ("p99", "ttft_p99_s", "{:.3f}"),
  ("TBT s", "tbt_mean_s", "{:.4f}"),
  ("p99", "tbt_p99_s", "{:.4f}"),
  ("latency s", "latency_mean_s", "{:.2f}"),
  ("delay s", "scheduling_delay_mean_s", "{:.2f}"),
  ("tokens/s", "throughput_tok_s", "{:.1f}"),
  ("hit rate", "hbm_hit_rate", "{:.3f}"),
  ("blocks loaded", "blocks_loaded", "{:,}"),
  ("score", "score_mean", "{:.3f}"),
  ("as first", "tokens_as_first", "{:.3f}"),
  ("served well", "keeps_slo", "{}"),
)

MEANING = """\
Times are means and 99th percentiles: TTFT to the first token, TBT between tokens, latency from arrival to end, delay
until a request is first worked on. Hit rate: of the blocks that decode attended to, those that were in HBM. Score: the
mean of judged answers. As first: the share of the first rung's tokens that come out the same, up to where they part.
Served well: 99 % of the times between tokens are at most 25 decode iterations of the first rung alone, and the mean
delay is at most 2 s. Goodput is the highest rate that is served well."""


def text(cells: Sequence[Row], found: Mapping[str, Goodput]) -> str:
  """Columns for a terminal."""
  rows = [[head for head, _, _ in _COLUMNS], *map(_shown, cells)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
  lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
  return "\n".join([*lines, MEANING, *_goodputs(found)])


def markdown(cells: Sequence[Row], found: Mapping[str, Goodput]) -> str:
  """The same as Markdown."""
  heads = [head for head, _, _ in _COLUMNS]
  rows = [heads, ["---", *["--:"] * (len(heads) - 1)], *map(_shown, cells)]
  table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  return "\n\n".join([table, MEANING, *_goodputs(found)]) + "\n"


def write(folder: pathlib.Path, cells: Sequence[Row], found: Mapping[str, Goodput]) -> None:
  """Writes results.md, and results.csv with every key of the cells."""
  (folder / "results.md").write_text(markdown(cells, found), encoding="utf-8")
  with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(key for cell in cells for key in cell)))
    writer.writeheader()
    writer.writerows(cells)


def in_short(cells: Sequence[Row], found: Mapping[str, Goodput]) -> dict[str, Any]:
  """What fits a line: of each rung its tokens a second by rate, its score and goodput."""
  told: dict[str, Any] = {}
  for cell in cells:
    of = told.setdefault(cell["rung"], {"throughput_tok_s": {}, "score_mean": cell["score_mean"]})
    of["throughput_tok_s"][f"{cell['rate']:g}"] = cell["throughput_tok_s"]
  for rung, goodput in found.items():
    told[rung]["goodput_req_s"] = goodput.rate
  return told


def _shown(cell: Row) -> list[str]:
  cell = {**cell, "keeps_slo": "yes" if cell["keeps_slo"] else "no"}
  values = [(cell[key], form) for _, key, form in _COLUMNS]
  return ["-" if value is None else form.format(value) for value, form in values]


def _goodputs(found: Mapping[str, Goodput]) -> list[str]:
  return [f"goodput of {rung}: {_said(of)}" for rung, of in found.items()]


def _said(of: Goodput) -> str:
  if of.rate is None:
    return f"below {of.fails_at:.3g} requests/s, the lowest rate that was tried"
  if of.fails_at is None:
    return f"{of.rate:.3g} requests/s or more, the highest rate that was tried"
  return f"{of.rate:.3g} requests/s; {of.fails_at:.3g} is not served well"
