"""What the rows of the accuracy experiment say: numbers for machines (`summary`), tables of them (`markdown`).

A row of `rows` is of one task, length and case: what `accuracy.measure` tells, with the keys task, group, tokens, case,
series and at; so is one of `prefill`, of cases of sparse prefill. A row of `reuse` is what `selections.reuse` tells,
with the keys task, tokens, case, and requests and traced, how many requests and steps of each it is of.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sparse_serve_jax import results
from sparse_serve_jax.config import SparseConfig
from sparse_serve_jax.evaluation import equal_bytes, prefill_report, selections
from sparse_serve_jax.evaluation.accuracy import QUANTILES, TEXT, TOLERANCE, Row
from sparse_serve_jax.evaluation.cases import (
  CERTIFIED,
  DEFAULT_METHOD,
  DENSE,
  DENSE_PREFILL,
  IN_GROUPS,
  PSA,
  PSA_MIN_MAX,
  PSA_SHARES,
  RULES,
)
from sparse_serve_jax.evaluation.intervals import bootstrap, interval

LEVELS = (0.98, 0.99)  # shares of dense accuracy; PSA's evaluation asks for 98 % (arXiv 2503.00392)
SOLVED = 0.5  # dense accuracy from which on a task counts as solved
WINDOWS = (1, 2, 4, 8, 12, 16, 32)  # steps w that are shown of working sets; 12 is SparseServe's


def summary(rows: Sequence[Row], reuse: Sequence[Row], prefill: Sequence[Row] = ()) -> dict[str, list[Row]]:
  """Everything but the rows themselves; each entry says what it is."""
  return {
    "accuracies": list(accuracies(rows)),
    "by_task": list(by_task(rows)),
    "text": list(likelihoods(rows)),
    "equal_bytes": list(_of_groups(equal_bytes.compared, rows)),
    "psa_against_fixed": list(psa_against_fixed(rows)),
    "stop_rules": list(stop_rules(rows)),
    "certified": list(certified(rows)),
    "psa_by_head": list(psa_by_head(rows)),
    "prefill": list(_of_groups(prefill_report.compared, prefill)),
    "reuse": [reused(row) for row in reuse],
  }


def accuracies(rows: Sequence[Row]) -> Iterator[Row]:
  """Means over the tasks of each group, by length and case; "more" accuracy than dense, and its 95 % "interval"."""
  for n_tokens, group, chosen in _by_group(rows):
    means = [] if group == TEXT else _means(chosen)
    dense = next((mean for mean in means if mean["series"] == DENSE), None)
    if dense is not None:
      for mean in means:
        more = interval(_each_accuracy(chosen, mean["case"]), _each_accuracy(chosen, dense["case"]))
        told = dict(more=mean["accuracy"] - dense["accuracy"], interval=more)
        yield dict(tokens=n_tokens, group=group) | mean | told


def by_task(rows: Sequence[Row]) -> Iterator[Row]:
  """By length, group and case, of each task "accuracy" and "blocks"."""
  for n_tokens, group, chosen in _by_group(rows):
    for case in dict.fromkeys(row["case"] for row in chosen if group != TEXT):
      ours = sorted((row for row in chosen if row["case"] == case), key=lambda row: row["task"])
      of = {row["task"]: {key: row[key] for key in ("accuracy", "blocks")} for row in ours}
      yield dict(tokens=n_tokens, group=group, case=case, of=of)


def psa_against_fixed(rows: Sequence[Row]) -> Iterator[Row]:
  """The least that PSA and a fixed budget read for a share of dense accuracy: by task, and for the mean of each group.

  Yields:
    "tokens", "of" (a task, or "mean of" the tasks of a group that dense solves), "series" (one of RULES, IN_GROUPS and
    PSA_SHARES that there are rows of; if there are none the default one) and "level". Under "dense", "psa" and "fixed"
    the case with the fewest blocks whose accuracy reaches the level, None where none does; "at" is its threshold, or
    its budget in tokens, and "sure" in how many of the bootstrap's draws it reaches the level. Under "psa_fails" and
    "fixed_fails" the next with fewer blocks, which does not reach it: what is needed lies between the two. And ratios,
    of blocks and of bytes with digests, None where one of their cases is: "fixed_by_psa" and "dense_by_psa";
    "at_least", the budget that fails by the PSA that reaches the level; "at_most", the budget that reaches it by the
    PSA that fails. Dense attends to all full blocks. If dense does not solve a task, all of its entries but "dense" are
    None.
  """
  for n_tokens, group, of_group in _by_group(rows):
    by_task = {task: [row for row in of_group if row["task"] == task] for task in _values(of_group, "task")}
    dense_of = {row["task"]: row["accuracy"] for row in of_group if row["series"] == DENSE}
    of_solved = [row for row in of_group if dense_of.get(row["task"], 0) >= SOLVED]
    for name, chosen in (by_task | {f"mean of {group}": of_solved}).items():
      means = _means(chosen)
      dense = next((case for case in means if case["series"] == DENSE), None)
      measured = {case["series"] for case in means}
      if group == TEXT or dense is None or not measured & {*RULES, *IN_GROUPS, PSA_SHARES, DEFAULT_METHOD}:
        continue
      rules = [rule for rule in (*RULES, *IN_GROUPS, PSA_SHARES) if rule in measured] or [PSA]
      for series, level in itertools.product(rules, LEVELS):
        psa, psa_fails = _least(chosen, means, dense, series, level)
        fixed, fixed_fails = _least(chosen, means, dense, DEFAULT_METHOD, level)
        cases = dict(dense=dense, psa=psa, psa_fails=psa_fails, fixed=fixed, fixed_fails=fixed_fails)
        ratios = {
          "fixed_by_psa": _ratios(fixed, psa),
          "dense_by_psa": _ratios(dense, psa),
          "at_least": _ratios(fixed_fails, psa),
          "at_most": _ratios(fixed, psa_fails),
        }
        yield dict(tokens=n_tokens, of=name, series=series, level=level) | cases | ratios


def _least(
  rows: Sequence[Row], means: Sequence[Row], dense: Row, series: str, level: float
) -> tuple[Row | None, Row | None]:
  """Of a series the case with the fewest blocks that reaches a level of dense accuracy, with how "sure" that is; and
  the one with the next fewer, which does not. Neither, of what dense does not solve.
  """
  if dense["accuracy"] < SOLVED:
    return None, None
  fails = None
  for case in sorted((case for case in means if case["series"] == series), key=lambda case: case["blocks"]):
    if case["accuracy"] + 1e-9 >= level * dense["accuracy"]:
      drawn = bootstrap(_each_accuracy(rows, case["case"]), _each_accuracy(rows, dense["case"]), level)
      return case | {"sure": float((drawn >= -1e-9).mean())}, fails
    fails = case
  return None, fails


def stop_rules(rows: Sequence[Row]) -> Iterator[Row]:
  """What PSA's estimate is worth and what a guarantee costs, by length, group and threshold.

  Yields:
    "tokens", "group", "threshold", and for each series of cases that stops: mean "blocks", "mass" and "estimate_error",
    by which its estimate of the mass is too high; of what stopped the mean "claimed" and "true" mass; and the counts
    "pairs", "stopped", "violations", "short", "stops" and "broken" of `accuracy.summary`, over all tasks; "cost",
    blocks of the certified stop as a multiple of the estimate's on the same ranking. The estimate is first asked after
    one group of ranked blocks, the certified stop before it.
  """
  for n_tokens, group, of_group in _by_group(rows):
    stopping = [row for row in of_group if "pairs" in row]
    for threshold in _values(stopping, "at"):
      chosen = [row for row in stopping if row["at"] == threshold]
      told: Row = {mean["series"]: {key: mean[key] for key in ("blocks", "mass")} for mean in _means(chosen)}
      for series, of in told.items():
        ours = [row for row in chosen if row["series"] == series]
        for key in ("estimate_error", "claimed", "true"):
          of[key] = float(np.mean([row[key] for row in ours]))
        for key in ("pairs", "stopped", "violations", "short", "stops", "broken"):
          of[key] = sum(row[key] for row in ours)
      cost = _ratios(told.get(CERTIFIED), told.get(PSA_MIN_MAX), ("blocks",))
      yield dict(tokens=n_tokens, group=group, threshold=threshold) | told | dict(cost=cost and cost["blocks"])


def certified(rows: Sequence[Row]) -> Iterator[Row]:
  """All "pairs" and "violations" of the certified stop, whatever length, task and threshold; none is to be violated."""
  if chosen := [row for row in rows if row["series"] == CERTIFIED]:
    yield {key: sum(row[key] for row in chosen) for key in ("pairs", "violations")} | dict(tolerance=TOLERANCE)


def psa_by_head(rows: Sequence[Row]) -> Iterator[Row]:
  """Blocks that PSA's rules attend to by layer and KV head, by length, group, series and threshold.

  Yields:
    "tokens", "group", "series", "threshold"; "mean" [L, K] over tokens and "quantiles" [5, L, K], those of QUANTILES
    over tokens; both are means over the tasks.
  """
  for n_tokens, group, of_group in _by_group(rows):
    of_psa = [row for row in of_group if row["series"] in RULES]
    for series, threshold in dict.fromkeys((row["series"], row["at"]) for row in of_psa):
      ours = [row["by_head"] for row in of_psa if (row["series"], row["at"]) == (series, threshold)]
      mean = {key: np.mean([of[key] for of in ours], 0).round(3).tolist() for key in ("mean", "quantiles")}
      yield dict(tokens=n_tokens, group=group, series=series, threshold=threshold) | mean


_OF_TEXT = ("nats", "accuracy", "agreement", "blocks", "bytes", "mass", "error")


def likelihoods(rows: Sequence[Row]) -> Iterator[Row]:
  """Nats a token of ordinary text, by length and case; "more" than dense, with the 95 % "interval" of that; and the
  "agreement" of the most likely next token with dense's, with its "agreement_interval". Both are of the paired
  bootstrap over texts.
  """
  for _, group, chosen in _by_group(rows):
    dense = next((row for row in chosen if row["series"] == DENSE), None)
    if group == TEXT and dense is not None:
      for row in chosen:
        told = {key: row[key] for key in ("tokens", "case", "series", *_OF_TEXT)}
        more = interval([row["each"]["nats"]], [dense["each"]["nats"]])
        agreement = interval([row["each"]["agreement"]], [[0.0] * len(row["each"]["agreement"])])
        yield told | {"more": row["nats"] - dense["nats"], "interval": more, "agreement_interval": agreement}


def reused(row: Row) -> Row:
  """A row of `reuse`, its layers and heads together (each by the blocks it selects), at some windows."""
  told = {key: row[key] for key in ("task", "tokens", "case", "requests", "traced")}
  told["blocks"] = float(np.mean(row["blocks"]))
  for key in ("overlap", "working_set"):
    told[key] = {str(w): round(float(selections.curve(row, key)[w - 1]), 4) for w in WINDOWS}
  return told


def nearest_threshold(thresholds: Sequence[float]) -> float:
  """The one to show where one is shown: nearest to the default, PSA's example."""
  return min(thresholds, key=lambda threshold: abs(threshold - SparseConfig().fixed_threshold))


def _values(rows: Sequence[Row], key: str) -> list:
  """In order of their first row."""
  return list(dict.fromkeys(row[key] for row in rows))


def _by_group(rows: Sequence[Row]) -> Iterator[tuple[int, str, list[Row]]]:
  for n_tokens, group in itertools.product(sorted(_values(rows, "tokens")), sorted(_values(rows, "group"))):
    if chosen := [row for row in rows if row["tokens"] == n_tokens and row["group"] == group]:
      yield n_tokens, group, chosen


def _of_groups(compared: Callable[[Sequence[Row]], Iterator[Row]], rows: Sequence[Row]) -> Iterator[Row]:
  """What a comparison tells of the rows of each length and group."""
  for n_tokens, group, chosen in _by_group(rows):
    for entry in compared(chosen):
      yield dict(tokens=n_tokens, group=group) | entry


def _means(rows: Sequence[Row]) -> list[Row]:
  """Means over tasks of each case that all of the tasks have."""
  n_tasks, means = len(_values(rows, "task")), []
  for name in _values(rows, "case"):
    ours = [row for row in rows if row["case"] == name]
    if len(ours) == n_tasks:
      mean = {key: float(np.mean([row[key] for row in ours])) for key in ("accuracy", "blocks", "bytes", "mass")}
      means.append(dict(case=name, series=ours[0]["series"], at=ours[0]["at"], tasks=n_tasks) | mean)
  return means


def _each_accuracy(rows: Sequence[Row], case: str) -> list[list[float]]:
  """Of each task, in order of their names, of each instance."""
  ours = sorted((row for row in rows if row["case"] == case), key=lambda row: row["task"])
  return [row["each"]["accuracy"] for row in ours]


def _ratios(one: Row | None, other: Row | None, keys: Sequence[str] = ("blocks", "bytes")) -> dict[str, float] | None:
  if one is None or other is None or not all(other[key] for key in keys):  # nothing is read where no block is full
    return None
  return {key: one[key] / other[key] for key in keys}


def in_short(told: dict[str, list[Row]]) -> Row:
  """What fits a line: under "dense" the accuracy of dense attention by group and length, prefilled densely too; under
  "dense_nats" its loss a token of text by length. None is empty."""
  answers = {f"{of['group']} {of['tokens']}": of["accuracy"] for of in told["accuracies"] if of["series"] == DENSE}
  nats = {f"{TEXT} {of['tokens']}": of["nats"] for of in told["text"] if of["series"] == DENSE}
  for of in told["prefill"]:
    if of["series"] == DENSE_PREFILL:
      to, key = (nats, "nats") if of["group"] == TEXT else (answers, "accuracy")
      to.setdefault(f"{of['group']} {of['tokens']}", of[key])
  told_of = {"dense": answers, "dense_nats": nats}
  return {name: {key: round(x, 4) for key, x in of.items()} for name, of in told_of.items() if of}


def write(
  folder: pathlib.Path, rows: Sequence[Row], reuse: Sequence[Row], prefill: Sequence[Row] = ()
) -> dict[str, list[Row]]:
  """Writes the summary of these rows to summary.json, its tables to results.md, and to results.csv a line for each row,
  with all of its numbers but lists, under "file" where it is from. Returns the summary.
  """
  told = summary(rows, reuse, prefill)
  of_files = {"results": rows, "prefill": prefill, "reuse": told["reuse"]}
  lines = [{"file": name, **results.leaves(row)} for name, of in of_files.items() for row in of]
  lines = [{key: value for key, value in line.items() if not isinstance(value, list)} for line in lines]
  results.write_table(folder / "results", lines, markdown=markdown(told))
  results.replace_json(folder / "summary.json", told)
  return told


# Tables


def markdown(told: dict[str, list[Row]]) -> str:
  """The tables of a summary."""
  parts = [_section(told[key], *of) for key, of in _SECTIONS.items() if told[key]]
  return "\n\n".join([_LEGEND, *parts]) + "\n"


def _section(entries: list[Row], title: str, head: Any, split: Sequence[str], cells: Any) -> str:
  """A title, what is to be known of it in its further lines, and a table of entries for each combination of the values
  under `split`; `head` may depend on them. Columns of which no line says anything are left out.
  """
  title, *about = title.split("\n")
  parts = [f"## {title}", *about]
  for values in dict.fromkeys(tuple(entry[key] for key in split) for entry in entries):
    chosen = [entry for entry in entries if tuple(entry[key] for key in split) == values]
    lines = [line for entry in chosen for line in cells(entry, chosen)]
    named = zip(split, values, strict=True)
    name = ", ".join(f"{value} tokens" if key == "tokens" else str(value) for key, value in named)
    names = head if isinstance(head, tuple) else head(chosen)
    said = [any(column) for column in zip(*lines, strict=True)]
    names, *lines = (list(itertools.compress(line, said)) for line in (names, *lines))
    rule = "|".join(["---", *["--:"] * (len(names) - 1)])
    table = [f"| {' | '.join(names)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"### {name}", "\n".join(table)] if name else ["\n".join(table)]
  return "\n\n".join(parts)


def _accuracy_cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  low, high = of["interval"]
  cells = [of["case"], f"{of['accuracy']:.1%}", f"{of['more']:+.1%}", f"{low:+.1%} to {high:+.1%}"]
  yield [*cells, f"{of['blocks']:.1f}", f"{of['bytes']:.1%}", f"{of['mass']:.3f}"]


def _task_head(all_of: list[Row]) -> list[str]:
  return ["setting", *dict.fromkeys(task for entry in all_of for task in entry["of"])]


def _task_cells(of: Row, all_of: list[Row]) -> Iterator[list[str]]:
  each = [of["of"].get(task) for task in _task_head(all_of)[1:]]
  yield [of["case"], *("" if one is None else f"{one['accuracy']:.1%} ({one['blocks']:.0f})" for one in each)]


def _psa_cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  dense = of["dense"]
  cells = [of["of"], of["series"], f"{of['level']:.0%}", f"{dense['accuracy']:.1%}", f"{dense['blocks']:.1f}"]
  for case, fails in ((of["psa"], of["psa_fails"]), (of["fixed"], of["fixed_fails"])):
    none = "none reaches it" if fails else "not measured"
    cells += [none if dense["accuracy"] >= SOLVED else "dense does not solve it", "", ""]
    if case is not None:
      cells[-3:] = [f"{case['at']:g}", f"{case['accuracy']:.1%} ({case['sure']:.0%})", f"{case['blocks']:.1f}"]
  fixed, by_dense = of["fixed_by_psa"], of["dense_by_psa"]
  for key in ("blocks", "bytes"):
    low, high = ("?" if ratio is None else f"{ratio[key]:.2f}" for ratio in (of["at_least"], of["at_most"]))
    cells.append("-" if fixed is None else f"{fixed[key]:.2f} ({low} to {high})")
  yield [*cells, *("-" if by_dense is None else f"{by_dense[key]:.2f}" for key in ("blocks", "bytes"))]


def _stop_cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  for series, ours in of.items():
    if isinstance(ours, dict):
      cells = [f"{series} {of['threshold']:g}", f"{ours['blocks']:.1f}", f"{ours['mass']:.3f}", f"{ours['pairs']:,}"]
      cells += [f"{ours['stopped'] / ours['pairs']:.1%}", f"{ours['claimed']:.3f}", f"{ours['true']:.3f}"]
      cells += [f"{ours['violations']:,}"]
      for key, of_all in (("short", "stopped"), ("broken", "stops")):
        cells += [f"{ours[key] / ours[of_all]:.1%}" if ours[of_all] else "-"]
      yield [*cells, f"{of['cost']:.2f}" if series == CERTIFIED and of["cost"] else ""]


def _head_cells(of: Row, all_of: list[Row]) -> Iterator[list[str]]:
  if of["threshold"] == nearest_threshold([row["threshold"] for row in all_of if row["series"] == of["series"]]):
    mean, quantiles = np.array(of["mean"]), np.array(of["quantiles"]).mean(2)  # [L, K], [5, L]
    for layer, heads in enumerate(mean):
      numbers = heads.mean(), heads.min(), heads.max(), *quantiles[:, layer]
      yield [f"{of['series']} {of['threshold']:g}", str(layer), *(f"{x:.1f}" for x in numbers)]


def _text_cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  low, high = of["interval"]
  cells = [of["case"], f"{of['nats']:.4f}", f"{of['more']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{of['accuracy']:.1%}"]
  least, most = of["agreement_interval"]
  cells += [f"{of['agreement']:.1%}", f"{least:.1%} to {most:.1%}"]
  yield [*cells, f"{of['blocks']:.1f}", f"{of['bytes']:.1%}", f"{of['mass']:.3f}", f"{of['error']:.4f}"]


def _reuse_cells(of: Row, _: list[Row]) -> Iterator[list[str]]:
  cells = [of["task"], of["case"], f"{of['requests']} x {of['traced']}", f"{of['blocks']:.1f}"]
  cells += [f"{of['overlap'][str(w)]:.1%}" for w in WINDOWS]
  yield [*cells, *(f"{of['working_set'][str(w)]:.2f}" for w in WINDOWS[1:])]


_LEGEND = (
  "A setting is a selection method and its budget in tokens, or a stop rule (psa) and its threshold. Blocks: those "
  "that a step attends to, of a layer and KV head. Bytes of dense: their bytes and those of all digests, by the "
  "bytes of all blocks. Mass: the share of the attention that is theirs. Error: the mean over query heads and layers "
  "of |o - o_dense| / |o_dense| of a head's output."
)

# Of each key of a summary: title, head of the tables, what there is a table for, lines of an entry.
_SECTIONS: dict[str, tuple[str, Any, tuple[str, ...], Any]] = {
  "accuracies": (
    "Accuracy by setting\n"
    "Means over tasks, and the difference from dense attention with its 95 % interval. Where no instance differs the "
    "interval has no width; of n instances that are all alike this still allows up to 3 / n of all texts to differ.",
    ("setting", "accuracy", "vs dense", "interval", "blocks", "bytes of dense", "mass"),
    ("tokens", "group"),
    _accuracy_cells,
  ),
  "by_task": ("Accuracy of each task\nIn brackets: blocks attended to.", _task_head, ("tokens", "group"), _task_cells),
  "text": (
    "Ordinary text\nNats a token, and the difference from dense attention; how often the most likely next token is "
    "that of dense attention. Intervals are 95 % ones of the paired bootstrap over texts.",
    (
      *("setting", "nats", "vs dense", "interval", "next token right", "that of dense", "interval"),
      *("blocks", "bytes of dense", "mass", "error"),
    ),
    ("tokens",),
    _text_cells,
  ),
  "equal_bytes": (equal_bytes.TITLE, equal_bytes.HEAD, ("tokens", "group"), equal_bytes.cells),
  "psa_against_fixed": (
    f"PSA against {DEFAULT_METHOD} with a fixed budget\n"
    "For a share of the accuracy of dense attention: the cheapest PSA threshold and the cheapest budget (in tokens) "
    "that reach it, and in brackets after their accuracy how sure that is. Ratios compare these two. In brackets after "
    "a ratio: what it would be with the next cheaper budget, and with the next cheaper threshold, which do not reach "
    "the share; ? where nothing cheaper was measured.",
    (
      *("of", "rule", "share", "dense", "blocks", "PSA at", "accuracy", "blocks", "budget", "accuracy", "blocks"),
      *("fixed / PSA: blocks", "bytes", "dense / PSA: blocks", "bytes"),
    ),
    ("tokens",),
    _psa_cells,
  ),
  "stop_rules": (
    "Stop tests\n"
    "Pairs are of a token and a query head, in every layer. Stopped: those that left blocks unread; of these the mean "
    "attention mass that the test claimed, and the true one. Claimed more: pairs for which it claimed more than the "
    "truth (PSA's where it stopped, the certified one's in any group). Below threshold: of those that stopped, those "
    "whose true mass is below it. Broken stops: of the stops of a KV head, those with a query head below the "
    "threshold, or whose mean is below it if means are tested. Cost: blocks of the certified stop over those of PSA's "
    "on the same ranking.",
    (
      *("setting", "blocks", "mass", "pairs", "stopped", "claimed", "true", "claimed more"),
      *("below threshold", "broken stops", "cost"),
    ),
    ("tokens", "group"),
    _stop_cells,
  ),
  "certified": (
    "The certified stop, all settings\n"
    "Violations: pairs of which a test claimed more than the true mass and the rounding error of float32.",
    ("pairs", "violations", "error"),
    (),
    lambda of, _: [[f"{of['pairs']:,}", f"{of['violations']:,}", f"{of['tolerance']:g}"]],
  ),
  "psa_by_head": (
    "Blocks that PSA attends to, by layer\n"
    "The mean over KV heads, the head with the fewest and the one with the most; then quantiles over tokens.",
    ("setting", "layer", "mean", "least head", "most", *(f"{q:.0%}" for q in QUANTILES)),
    ("tokens", "group"),
    _head_cells,
  ),
  "prefill": (prefill_report.TITLE, prefill_report.HEAD, ("tokens", "group"), prefill_report.cells),
  "reuse": (
    "Reuse of selections\n"
    "Overlap: the share of a step's selected blocks that one of the w steps before it selected too. Working set: the "
    "blocks that any of the last w steps selected, as a multiple of those of one step.",
    (
      *("task", "setting", "requests x steps", "blocks"),
      *(f"overlap, w = {w}" for w in WINDOWS),
      *(f"working set, w = {w}" for w in WINDOWS[1:]),
    ),
    ("tokens",),
    _reuse_cells,
  ),
}
