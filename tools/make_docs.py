"""Pictures and tables of README.md and docs/, made from results and dataclasses: `make docs` begins with it.

python tools/make_docs.py

Tables stand between `<!-- made: NAME -->` and `<!-- end -->`; what is there is replaced.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib as mpl  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from sparse_serve_jax.config import EngineConfig, describe  # noqa: E402
from sparse_serve_jax.plots import style  # noqa: E402
from tools import published  # noqa: E402
from tools.decode_step import decode_step  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
ASSETS = ROOT / "docs" / "assets"
STEPS = RESULTS / "2026-11-26-h200" / "step.jsonl"
BURSTS = {  # of a workload: its folder, and what it is
  "W1": ("2026-11-29-ladder", "64 of 9k on average, 256 out"),
  "W2": ("2026-11-29-ladder", "the same, 2,048 out"),
  "W3": ("2026-11-30-ladder", "20 of 32k, 4,096 out"),
  "W4": ("2026-11-30-ladder", "5 of 128k, 1,024 out"),
}
RUNGS = RESULTS / "2026-11-30-rungs"
REFERENCE = RESULTS / "2026-11-30-accuracy" / "reference" / "summary.json"
BEFORE = RESULTS / "2026-11-26-reference" / "summary.json"  # of the rule of PSA's paper, and more methods
PREFILLS = RESULTS / "2026-11-30-prefill" / "221c08d.jsonl"
SPARSE_PREFILLS = RESULTS / "2026-11-30-accuracy" / "prefill" / "prefill.jsonl"
PREFIXES = RESULTS / "2026-11-30-prefix" / "shares.jsonl"
WAYS = {  # of bench-prefill
  "chunked": "dense, in chunks of 2,048",
  "layer_segmented": "dense, layer-segmented",
  "quarter": "a quarter of the earlier blocks",
  "eighth": "an eighth",
  "cached": "dense, 15/16 in the cache",
}
READ = {  # cases of sparse prefill
  "top_k, cuboid_mean 0.125": "an eighth",
  "top_k, cuboid_mean 0.25": "a quarter",
  "top_k, cuboid_mean 0.5": "a half",
  "threshold, cuboid_mean 0.8": "`threshold` 0.8",
  "threshold, cuboid_mean 0.95": "`threshold` 0.95",
}
ON_REFERENCE = "the reference model, 16,384 tokens; an H200, and four H100 (true mass, the paper's rule); jax 0.11.2"
ON_RUNGS = "one NVIDIA H200, the 8B shape, jax 0.11.2, commit c872f66"
TASKS = ("multi_key", "key_value", "key_value_uuid", "copy", "renumber")
CASES = {
  "dense 1": "dense",
  "cuboid_mean 512": "top-k, 512 tokens",
  "cuboid_mean 2048": "top-k, 2,048 tokens",
  "psa 0.8": "PSA 0.8",
  "psa 0.95": "PSA 0.95",
}
SERIES = {  # of a line: its results and series
  "top-k by true mass": (BEFORE, "oracle"),
  "top-k, cuboid_mean": (REFERENCE, "cuboid_mean"),
  "PSA": (REFERENCE, "psa"),
  "PSA, the paper's rule": (BEFORE, "psa"),
}
_MADE = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.S)


# -------------------------------------------------------------------------------------------------------------- tables


def accuracy_table() -> str:
  """Percent of answers right by task and setting; in brackets the blocks attended to."""
  of = {(row["case"], task): told for row in _at_16k(REFERENCE) for task, told in row["of"].items()}
  lines = [f"| task | {' | '.join(CASES.values())} |", "|---|" + "--:|" * len(CASES)]
  for task in TASKS:
    cells = [f"{of[case, task]['accuracy']:.1%} ({of[case, task]['blocks']:.0f})" for case in CASES]
    lines.append(f"| {task} | {' | '.join(cells)} |")
  return "\n".join(lines).replace("%", " %") + "\n"


def bursts_table() -> str:
  """What dense and sparse_serve make of requests that all come at once."""
  lines = [
    "| dense, then sparse_serve | seconds | tokens/s | mean TTFT, s | mean TBT, ms | mean latency, s | missed HBM "
    "| floor's share |",
    "|---|--:|--:|--:|--:|--:|--:|--:|",
  ]
  for workload, (folder, name) in BURSTS.items():
    dense, sparse = _lines(RESULTS / folder / workload / "cells.jsonl")
    seconds = f"{dense['elapsed_s']:.1f}, {sparse['elapsed_s']:.1f}"
    apart = f"{1e3 * dense['tbt_mean_s']:.1f}, {1e3 * sparse['tbt_mean_s']:.1f}"
    latency = f"{dense['latency_mean_s']:.1f}, {sparse['latency_mean_s']:.1f}"
    gain = f"{dense['throughput_tok_s']:,.0f}, {sparse['throughput_tok_s']:,.0f}: "
    gain += f"{sparse['throughput_tok_s'] / dense['throughput_tok_s']:.2f}x"
    ttft = f"{dense['ttft_mean_s']:.1f}, {sparse['ttft_mean_s']:.1f}"
    floor = f"{dense['floor_share']:.2f}, {sparse['floor_share']:.2f}"
    missed = f"{100 * sparse['missed_share']:.2f} %"
    lines.append(f"| {name} | {seconds} | {gain} | {ttft} | {apart} | {latency} | {missed} | {floor} |")
  return "\n".join(lines) + "\n"


def prefill_table() -> str:
  """Milliseconds to the first token by length and way."""
  rows = {row["case"]: row for row in _lines(PREFILLS)}
  lengths = [tokens for tokens in (2048, 8192, 32000, 131000) if f"1x{tokens} layer_segmented" in rows]
  lines = [f"| tokens | {' | '.join(f'{tokens:,}' for tokens in lengths)} |", "|---|" + "--:|" * len(lengths)]
  floors = (rows[f"1x{tokens} layer_segmented"]["floor_us"] for tokens in lengths)
  lines.append(
    f"| reference: products and cuDNN, each timed alone | {' | '.join(f'{us / 1e3:,.0f}' for us in floors)} |"
  )
  for way, name in WAYS.items():
    cases = (f"1x{tokens} {way}" for tokens in lengths)
    cells = (f"{rows[case]['ttft_ms']:,.0f}" if case in rows else "not run" for case in cases)
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def sparse_prefill_table() -> str:
  """Change in accuracy against dense prefill, in points, of tasks where there is any; in brackets percent of blocks
  read."""
  of = {(row["task"], row["case"].removeprefix("prefill ")): row for row in _lines(SPARSE_PREFILLS)}
  lines = [f"| task | dense, % | {' | '.join(READ.values())} |", "|---|" + "--:|" * (len(READ) + 1)]
  for task in dict.fromkeys(task for task, _ in of if task != "text"):
    dense = of[task, "dense prefill 1"]["accuracy"]
    cells = [f"{100 * (of[task, case]['accuracy'] - dense):+.1f} ({100 * of[task, case]['read']:.0f})" for case in READ]
    if any(of[task, case]["accuracy"] != dense for case in READ):
      lines.append(f"| {task} | {100 * dense:.1f} | {' | '.join(cells)} |".replace("+0.0", "0").replace("-0.0", "0"))
  return "\n".join(lines) + "\n"


def configuration_table() -> str:
  """Every key of a serving configuration."""
  lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
  lines += [
    f"| `{row.key}` | {row.type} | `{json.dumps(row.default)}` | {row.meaning.replace('|', 'or')} |"
    for row in describe(EngineConfig)
  ]
  return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------- plots


def step_plot() -> Figure:
  """Decode steps of the 8B shape, and the floor that their bytes set."""
  rows = [row for row in _lines(STEPS) if row["op"] == "step"]
  figure, axes = style.subplots(size=(7.2, 3.4))
  at = range(len(rows))
  for name, values, color in (("measured", "us", style.COLORS[2]), ("floor: bytes that must move", "floor_us", "0.75")):
    shift = 0.2 if values == "floor_us" else -0.2
    made = axes.barh([y + shift for y in at], [row[values] / 1e3 for row in rows], 0.38, color=color, label=name)
    axes.bar_label(made, fmt="{:.1f}", fontsize=7, padding=2)
  axes.set(yticks=list(at), yticklabels=[row["case"] for row in rows], xlabel="ms a decode step")
  axes.invert_yaxis()
  axes.legend(loc="lower right")
  figure.supxlabel(f"{rows[0]['device']}, jax {rows[0]['jax']}, commit {rows[0]['commit']}", fontsize=7, color="0.4")
  return figure


def accuracy_plot() -> Figure:
  """Accuracy against the blocks that a step reads, a line for each way to select; of the tasks that all rows have."""
  figure, all_axes = style.subplots(1, 2, size=(7.2, 3.2))
  for axes, (group, least) in zip(all_axes, {"retrieval": 0.9, "long_output": 0.4}.items(), strict=True):
    rows = {file: [row for row in _at_16k(file) if row["group"] == group] for file in (REFERENCE, BEFORE)}
    (dense,) = [row["of"] for row in rows[REFERENCE] if row["case"] == "dense 1"]

    def mean(row, key, tasks=tuple(dense)):
      return sum(row["of"][task][key] for task in tasks) / len(tasks)

    for label, (file, series) in SERIES.items():
      chosen = [row for row in rows[file] if row["case"].rpartition(" ")[0] == series]
      line = sorted((mean(row, "blocks"), mean(row, "accuracy")) for row in chosen)
      axes.plot(*zip(*line, strict=True), label=label)
    axes.axhline(mean({"of": dense}, "accuracy"), color="0.6", linewidth=1, linestyle=":", marker="", label="dense")
    title = next(iter(dense)) if len(dense) == 1 else f"{group}: mean of {len(dense)} tasks"
    axes.set(title=title, xlabel="blocks read", ylim=(least, 1.005))
    style.logarithmic(axes, "x")
  all_axes[0].set_ylabel("answers right")
  figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
  figure.supxlabel(ON_REFERENCE, fontsize=7, color="0.4")
  return figure


def batches_plot() -> Figure:
  """Tokens/s and blocks loaded by the largest batch, with and without control by working sets."""
  cells = _lines(RUNGS / "batches" / "cells.jsonl")
  figure, all_axes = style.subplots(1, 2, size=(7.2, 2.8))
  for axes, (key, name) in zip(
    all_axes, {"throughput_tok_s": "tokens/s", "loaded_an_iteration": "blocks loaded an iteration"}.items(), strict=True
  ):
    for way, label in (("none", "no control"), ("working_set", "by working sets")):
      found = (re.fullmatch(rf"sparse_serve batch_control={way} max_batch=(\d+)", cell["rung"]) for cell in cells)
      line = [(int(at[1]), cell[key]) for at, cell in zip(found, cells, strict=True) if at]
      axes.plot(*zip(*line, strict=True), label=label)
    axes.set(xlabel="largest batch", title=name, ylim=(0, None))
  all_axes[0].legend(loc="lower right")
  figure.supxlabel(ON_RUNGS, fontsize=7, color="0.4")
  return figure


def rates_plot() -> Figure:
  """Mean TTFT and tokens/s by the rate at which requests come, a line for each rung."""
  cells = [cell for cell in _lines(RUNGS / "goodput" / "cells.jsonl") if cell["rate"]]
  figure, all_axes = style.subplots(1, 2, size=(7.2, 2.8))
  for axes, (key, name) in zip(
    all_axes, {"ttft_mean_s": "mean TTFT, s", "throughput_tok_s": "tokens/s"}.items(), strict=True
  ):
    for rung in dict.fromkeys(cell["rung"] for cell in cells):
      line = sorted((cell["rate"], cell[key]) for cell in cells if cell["rung"] == rung)
      axes.plot(*zip(*line, strict=True), label=rung)
    axes.set(xlabel="requests a second", title=name, ylim=(0, None))
  all_axes[1].legend(loc="lower right", ncols=2, fontsize=8)
  figure.supxlabel(ON_RUNGS, fontsize=7, color="0.4")
  return figure


def prefix_plot() -> Figure:
  """The share of prompts' blocks that a prefix cache holds, by the tokens of its pool."""
  figure, axes = style.subplots(size=(5.4, 2.8))
  rows = _lines(PREFIXES)
  for trace in dict.fromkeys(row["trace"] for row in rows):
    of = {row["pool_tokens"]: row["share"] for row in rows if row["trace"] == trace}
    most = of.pop(None)
    axes.plot(*zip(*sorted(of.items()), strict=True), label=trace.removesuffix("_trace.jsonl"))
    axes.axhline(most, color="0.6", linewidth=1, linestyle=":", marker="")
  axes.set(xlabel="tokens in the pool (dotted: without bound)", ylabel="share of blocks", xscale="log", ylim=(0, None))
  axes.legend(loc="upper left")
  return figure


def svg_of(figure: Figure) -> str:
  """A figure as text that is the same in each run."""
  with mpl.rc_context({**style.LOOKS, "svg.hashsalt": "docs", "svg.fonttype": "none"}):
    figure.savefig(out := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
  return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


# ----------------------------------------------------------------------------------------------------------------- all


TABLES: dict[str, Callable[[], str]] = {
  "accuracy": accuracy_table,
  "bursts": bursts_table,
  "configuration": configuration_table,
  "prefill": prefill_table,
  "sparse_prefill": sparse_prefill_table,
  "sparseserve": lambda: published.table("SparseServe"),
  "longbench": published.longbench_table,
  "psa": lambda: published.table("PSA"),
}
PICTURES: dict[str, Callable[[], str]] = {
  "decode_step.svg": decode_step,
  "step.svg": lambda: svg_of(step_plot()),
  "batches.svg": lambda: svg_of(batches_plot()),
  "rates.svg": lambda: svg_of(rates_plot()),
  "accuracy.svg": lambda: svg_of(accuracy_plot()),
  "prefix.svg": lambda: svg_of(prefix_plot()),
}


def filled(text: str) -> str:
  """A page with its tables made anew.

  Raises:
    KeyError: no table has that name.
  """
  return _MADE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
  """README.md and the pages of docs/ that are stored."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _at_16k(file: Path) -> list[dict[str, Any]]:
  """Rows of a group's tasks by setting."""
  return [row for row in json.loads(file.read_text(encoding="utf-8"))["by_task"] if row["tokens"] == 16384]


def _lines(file: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
  ASSETS.mkdir(exist_ok=True)
  for name, make in PICTURES.items():
    (ASSETS / name).write_text(make(), encoding="utf-8")
  for page in pages():
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
  main()
