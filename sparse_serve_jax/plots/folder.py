"""Draws what a folder of results holds: rows tell by their file and keys which experiment they are of."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_serve_jax import results
from sparse_serve_jax.evaluation import report
from sparse_serve_jax.files import read_json, read_lines
from sparse_serve_jax.ladder import report as ladder_report
from sparse_serve_jax.ladder.folder import CELLS, read_cells
from sparse_serve_jax.ladder.goodput import goodputs
from sparse_serve_jax.plots import accuracy, benchmarks, ladder, requests, selections

Row = dict[str, Any]
BENCHMARKS = ("kernels.jsonl", "step.jsonl", "prefill.jsonl")  # rows with an "op"
COLUMNS = ("op", "case", "us", "best_us", "floor_us", "device", "commit")  # of their table
WRITTEN = (".png", ".md", ".csv", ".json")  # rows that come while they are drawn are somebody else's
ACCURACY = ("results.jsonl", "prefill.jsonl", "reuse.jsonl")


def draw(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes pictures and tables of everything in a folder that is known.

  Args:
    folder: of --out of a ladder, an accuracy experiment, a run of a workload, benchmarks, or selections.
    out: a folder that is there.

  Returns:
    The files that were written.

  Raises:
    ValueError: the folder holds no such rows, or none that can be drawn, or a line of them is no JSON object.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder")

  def there() -> dict[pathlib.Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix in WRITTEN}

  before = there()
  found = {name: draw_rows for name, draw_rows in _DRAWN.items() if draw_rows(folder, out)}
  if not found:
    raise ValueError(f"{folder} has no rows of an experiment: none of {', '.join(_DRAWN)}")
  written = sorted(file for file, when in there().items() if before.get(file) != when)
  if not written:
    raise ValueError(f"{folder}: nothing of {', '.join(found)} can be drawn")
  return written


def made_by(folder: pathlib.Path, rows: Sequence[Row] = ()) -> str:
  """What made the numbers, in a line: device, commit, command; of the rows' own stamps, or of the folder's run.json."""
  if rows and "device" in rows[-1]:
    commits = ", ".join(dict.fromkeys(str(row.get("commit")) for row in rows))
    return f"{rows[-1]['device']}; commit {commits}"
  if not (folder / results.RUN_FILE).is_file():
    return ""
  run = read_json(folder / results.RUN_FILE)
  return _by(run["parts"][-1], run["setting"].get("endpoint"))


def _by(part: Mapping[str, Any], endpoint: Mapping[str, str] | None = None) -> str:
  """A line of `results.provenance`; the device is not what matters of an endpoint that was asked."""
  program, *arguments = part["command"]
  where = part["device"]["kind"] if endpoint is None else f"{endpoint['model']} at {endpoint['url']}"
  command = shlex.join([pathlib.Path(program).stem, *arguments])
  return f"{where}; commit {part['commit']}; {command[:160]}"


def _read(file: pathlib.Path) -> list[Row]:
  return [row for _, row in read_lines(file)] if file.is_file() else []


def _draw_ladder(folder: pathlib.Path, out: pathlib.Path) -> bool:
  cells = read_cells(folder)
  if cells:
    found = goodputs(cells) if len({cell["rate"] for cell in cells}) > 1 else {}
    ladder_report.write(out, cells, found)
    ladder.write(out, cells, found, made_by(folder, cells))
  return bool(cells)


def _draw_accuracy(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows, prefill, reuse = ([row for row in _read(folder / name) if "op" not in row] for name in ACCURACY)
  kept, whole = (folder / "summary.json").is_file(), all("each" in row for row in (*rows, *prefill))
  if whole and (rows or prefill or reuse):
    told = report.write(out, rows, reuse, prefill)
    accuracy.write(out, told, reuse, made_by(folder))
  elif kept:  # tables are made from rows, which were not kept, or not whole
    accuracy.write(out, report.summary([], []) | read_json(folder / "summary.json"), [], made_by(folder))
  elif not whole:
    raise ValueError(
      f"{folder}: rows without 'each', the values of every instance, and no summary.json: nothing to draw"
    )
  return bool(rows or prefill or reuse or kept)


def _draw_requests(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows = _read(folder / "requests.jsonl")
  if rows:
    requests.draw(rows, out / "requests.png", made_by(folder))
    results.write_table(out / "requests", requests.table(rows))
  return bool(rows)


def _draw_selections(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows = selections.read(folder)
  if rows:
    made = folder / "selections.json"
    selections.draw(rows, out / "selections.png", _by(read_json(made)["made"]) if made.is_file() else "")
    results.write_table(out / selections.TABLE, rows)
  return bool(rows)


def _draw_benchmarks(folder: pathlib.Path, out: pathlib.Path) -> bool:
  rows = benchmarks.newest([row for name in BENCHMARKS for row in _read(folder / name) if "op" in row])
  for op in dict.fromkeys(row["op"] for row in rows):
    of_op = [row for row in rows if row["op"] == op]
    benchmarks.against_floors(of_op, out / f"bench_{op.replace(' ', '_')}.png", made_by(folder, of_op))
  if rows:
    results.write_table(out / "benchmarks", rows, COLUMNS, benchmarks.markdown(rows))
  return bool(rows)


_DRAWN: Mapping[str, Callable[[pathlib.Path, pathlib.Path], bool]] = {
  CELLS: _draw_ladder,
  "results.jsonl, prefill.jsonl, reuse.jsonl, summary.json": _draw_accuracy,
  "requests.jsonl": _draw_requests,
  "kernels.jsonl, step.jsonl": _draw_benchmarks,
  "selections.csv": _draw_selections,
}
