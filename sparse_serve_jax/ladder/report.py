"""Tables of a ladder's cells: text for a terminal, Markdown, CSV."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_serve_jax import results
from sparse_serve_jax.ladder.folder import Row
from sparse_serve_jax.ladder.goodput import Goodput

# Head of a column, the key of a cell, and what its number is shown with.
_COLUMNS = (
  ("rung", "rung", "{}"),
  ("requests/s", "rate", "{}"),
  ("finished", "requests", "{}"),
  ("TTFT s", "ttft_mean_s", "{:.3f}"),
  ("p99", "ttft_p99_s", "{:.3f}"),
  ("TBT s", "tbt_mean_s", "{:.4f}"),
  ("p99", "tbt_p99_s", "{:.4f}"),
  ("latency s", "latency_mean_s", "{:.2f}"),
  ("delay s", "scheduling_delay_mean_s", "{:.2f}"),
  ("tokens/s", "throughput_tok_s", "{:.1f}"),
  ("missed", "missed_share", "{:.2%}"),
  ("loaded/iteration", "loaded_an_iteration", "{:.1f}"),
  ("step ms", "decode_step_s", "{:.2f}"),
  ("floor s", "floor_s", "{:.1f}"),
  ("of the time", "floor_share", "{:.3f}"),
  ("score", "score_mean", "{:.3f}"),
  ("as first", "tokens_as_first", "{:.3f}"),
  ("served well", "keeps_slo", "{}"),
)

MEANING = """\
Times are means and 99th percentiles: TTFT to the first token, TBT between tokens, latency from arrival to end, delay
until a request is first worked on. Missed: of the blocks that decode attended to, those that were not in HBM. Loaded:
blocks read from DRAM, per iteration. Step: the median decode step with no piece of a prompt beside it. Floor: the least
time that prompts, steps and misses take at the device's own rates; then its share of the time in which there was work.
Score: the mean of judged answers. As first: the share of the first rung's tokens that come out the same, up to where
they part. Served well: 99 % of the times between tokens are at most 25 decode iterations of the first rung alone, and
the mean delay is at most 2 s. Goodput is the highest rate that is served well."""


# Goodput of a rung by that of the one before it, "dense" before the first: SparseServe, Fig. 13; Llama3-8B, LWM-7B.
PAPER = {
  "sparse": (1.13, 1.20),
  "sparse_offload": (1.12, 1.33),
  "flash_transfer": (1.19, 1.88),
  "working_set": (1.11, 1.33),
  "sparse_serve": (1.10, 1.25),
}


def text(cells: Sequence[Row], found: Mapping[str, Goodput]) -> str:
  """Columns for a terminal."""
  rows = [[head for head, _, _ in _COLUMNS], *map(_shown, cells)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
  lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
  return "\n".join([*lines, MEANING, *_goodputs(found), *_against_first(cells)])


def markdown(cells: Sequence[Row], found: Mapping[str, Goodput]) -> str:
  """The same as Markdown."""
  heads = [head for head, _, _ in _COLUMNS]
  rows = [heads, ["---", *["--:"] * (len(heads) - 1)], *map(_shown, cells)]
  table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  return "\n\n".join([table, MEANING, *_goodputs(found), *_against_first(cells)]) + "\n"


def write(folder: pathlib.Path, cells: Sequence[Row], found: Mapping[str, Goodput]) -> None:
  """Writes results.md, and results.csv with every key of the cells."""
  results.write_table(folder / "results", cells, markdown=markdown(cells, found))


def in_short(cells: Sequence[Row], found: Mapping[str, Goodput]) -> dict[str, Any]:
  """What fits a line: of each rung its tokens a second by rate, its score and goodput."""
  told: dict[str, Any] = {}
  for cell in cells:
    of = told.setdefault(cell["rung"], {"throughput_tok_s": {}, "score_mean": cell["score_mean"]})
    rate = f"{cell['rate']:g}"
    of["throughput_tok_s"][rate] = cell["throughput_tok_s"]
    of.setdefault("ttft_mean_s", {})[rate] = cell["ttft_mean_s"]
    of.setdefault("floor_share", {})[rate] = cell.get("floor_share")
  for rung, goodput in found.items():
    told[rung]["goodput_req_s"] = goodput.rate
  return told


def _shown(cell: Row) -> list[str]:
  step = cell.get("decode_step_s")
  cell = {**cell, "decode_step_s": step and 1e3 * step, "keeps_slo": {True: "yes", False: "no"}.get(cell["keeps_slo"])}
  cell["rate"] = f"{cell['rate']:g}" if cell["rate"] else "at once"
  values = [(cell.get(key), form) for _, key, form in _COLUMNS]
  return ["-" if value is None else form.format(value) for value, form in values]


def _goodputs(found: Mapping[str, Goodput]) -> list[str]:
  lines, rungs, of_paper = [], list(found), {*itertools.pairwise(["dense", *PAPER])}
  for before, rung in zip([None, *rungs], rungs, strict=False):
    line, rate = f"goodput of {rung}: {_said(found[rung])}", found[rung].rate
    first, last = found[rungs[0]].rate, found[before].rate if before else None
    if rate and last and first:
      line += f"; {rate / last:.2f} times {before}, {rate / first:.2f} in all"
      if (before, rung) in of_paper:
        line += "; the paper has {:.2f} (Llama3-8B), {:.2f} (LWM-7B)".format(*PAPER[rung])
    lines.append(line)
  return lines


def _against_first(cells: Sequence[Row]) -> list[str]:
  """Mean TTFT and tokens a second beside those of the first rung, at each rate."""
  first, lines = {cell["rate"]: cell for cell in cells if cell["rung"] == cells[0]["rung"]}, []
  for cell in cells:
    of = first.get(cell["rate"], cell)
    if of is not cell and all(c["ttft_mean_s"] and c["throughput_tok_s"] for c in (of, cell)):
      lines.append(
        f"{cell['rung']} {_rate(cell)}: {cell['ttft_mean_s'] / of['ttft_mean_s']:.2f} times the mean TTFT of "
        f"{of['rung']}, {cell['throughput_tok_s'] / of['throughput_tok_s']:.2f} times its tokens/s"
      )
  return lines


def _rate(cell: Row) -> str:
  return f"at {cell['rate']:g} requests/s" if cell["rate"] else "at once"


def _said(of: Goodput) -> str:
  if of.rate is None:
    return f"below {of.fails_at:.3g} requests/s, the lowest rate that was tried"
  if of.fails_at is None:
    return f"{of.rate:.3g} requests/s or more, the highest rate that was tried"
  return f"{of.rate:.3g} requests/s; {of.fails_at:.3g} is not served well"
