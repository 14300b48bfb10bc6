"""Draws what a folder of results holds: rows tell by their file and keys which experiment they are of."""

from __future__ import annotations

import csv
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_serve_jax import results
from sparse_serve_jax.evaluation import ladder as ladders
from sparse_serve_jax.evaluation import ladder_report, report
from sparse_serve_jax.files import read_json, read_lines
from sparse_serve_jax.plots import accuracy, benchmarks, ladder, requests

Row = dict[str, Any]
BENCHMARKS = ("kernels.jsonl", "step.jsonl", "prefill.jsonl")  # rows with an "op"
COLUMNS = ("op", "case", "us", "best_us", "floor_us", "device", "commit")  # of their table
ACCURACY = ("results.jsonl", "prefill.jsonl", "reuse.jsonl")


def draw(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes pictures and tables of everything in a folder that is known.

  Args:
    folder: of --out of a ladder, an accuracy experiment, a run of a workload, or benchmarks.
    out: a folder that is there.

  Returns:
    The files that were written.

  Raises:
    ValueError: the folder holds no such rows, or a line of them is no JSON object.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder")
  before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
  found = {name: draw_rows for name, draw_rows in _DRAWN.items() if draw_rows(folder, out)}
  if not found:
    raise ValueError(f"{folder} has no rows of an experiment: none of {', '.join(_DRAWN)}")
  return sorted(file for file in out.iterdir() if before.get(file) != file.stat().st_mtime_ns)


def made_by(folder: pathlib.Path, rows: Sequence[Row] = ()) -> str:
  """What made the numbers, in a line: device, commit, command; of the rows' own stamps, or of the folder's run.json."""
  if rows and "device" in rows[-1]:
    commits = ", ".join(dict.fromkeys(str(row.get("commit")) for row in rows))
    return f"{rows[-1]['device']}; commit {commits}"
  if not (folder / results.RUN_FILE).is_file():
    return ""
  part = read_json(folder / results.RUN_FILE)["parts"][-1]
  program, *arguments = part["command"]
  command = shlex.join([pathlib.Path(program).stem, *arguments])
  return f"{part['device']['kind']}; commit {part['commit']}; {command[:160]}"


def _read(file: pathlib.Path) -> list[Row]:
  return [row for _, row in read_lines(file)] if file.is_file() else []


def _draw_ladder(folder: pathlib.Path, out: pathlib.Path) -> bool:
  cells = _read(folder / "cells.jsonl")
  if cells:
    found = ladders.goodputs(cells) if len({cell["rate"] for cell in cells}) > 1 else {}
    ladder_report.write(out, cells, found)
    ladder.draw(cells, {rung: of.rate for rung, of in found.items()}, out / "ladder.png", made_by(folder, cells))
  return bool(cells)


def _draw_accuracy(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows, prefill, reuse = ([row for row in _read(folder / name) if "op" not in row] for name in ACCURACY)
  if rows or prefill or reuse:
    told = report.summary(rows, reuse, prefill)
    report.write(out, told)
    accuracy.write(out, told, reuse, made_by(folder))
  return bool(rows or prefill or reuse)


def _draw_requests(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows = _read(folder / "requests.jsonl")
  if rows:
    requests.draw(rows, out / "requests.png", made_by(folder))
  return bool(rows)


def _draw_benchmarks(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows = benchmarks.newest([row for name in BENCHMARKS for row in _read(folder / name) if "op" in row])
  for op in dict.fromkeys(row["op"] for row in rows):
    of_op = [row for row in rows if row["op"] == op]
    benchmarks.against_floors(of_op, out / f"bench_{op.replace(' ', '_')}.png", made_by(folder, of_op))
  if rows:
    (out / "benchmarks.md").write_text(benchmarks.markdown(rows), encoding="utf-8")
    with (out / "benchmarks.csv").open("w", newline="", encoding="utf-8") as file:
      writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
      writer.writeheader()
      writer.writerows(rows)
  return bool(rows)


_DRAWN: Mapping[str, Callable[[pathlib.Path, pathlib.Path], bool]] = {
  "cells.jsonl": _draw_ladder,
  "results.jsonl, prefill.jsonl, reuse.jsonl": _draw_accuracy,
  "requests.jsonl": _draw_requests,
  "kernels.jsonl, step.jsonl": _draw_benchmarks,
}
