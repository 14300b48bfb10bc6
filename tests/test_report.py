"""What is made of rows: comparisons with known answers, and tables that tell what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparse_serve_jax.evaluation import report, selections
from sparse_serve_jax.evaluation.accuracy import TOLERANCE
from tests.test_selections import drifting


def row(task: str, series: str, at: float, accuracy: float, blocks: float, group: str = "retrieval", **more) -> dict:
  each = {"accuracy": [1.0] * round(10 * accuracy) + [0.0] * round(10 - 10 * accuracy), "nats": [1.0, 2.0, 4.0]}
  each |= {"agreement": [1.0, 0.5, 0.6], "error": [0.1, 0.2, 0.3]}
  told = dict(task=task, group=group, tokens=1024, case=f"{series} {at:g}", series=series, at=at)
  told |= dict(accuracy=accuracy, nats=2.0, blocks=blocks, bytes=blocks / 32, mass=0.9, each=each)
  return told | dict(bytes_read=32.0 * blocks, agreement=0.7, error=0.2) | more


def stop(series: str, at: float, accuracy: float, blocks: float, violations: int = 0, task: str = "a") -> dict:
  by_head = {"mean": [[blocks - 1, blocks + 1]], "quantiles": [[[blocks, blocks]]] * 5}
  counts = dict(pairs=1000, stopped=800, violations=violations, short=violations // 2, estimate_error=0.01 * at)
  counts |= dict(claimed=at + 0.01, true=at - 0.01, stops=200, broken=violations // 4)
  return row(task, series, at, accuracy, blocks, by_head=by_head, **counts)


ROWS = [
  row("a", "dense", 1, 1.0, 32),
  row("a", "cuboid_mean", 128, 0.5, 4),
  row("a", "cuboid_mean", 512, 1.0, 16),
  row("a", "cuboid_mean", 1024, 1.0, 32),
  stop("psa", 0.5, 0.9, 4, 100),
  stop("psa", 0.9, 1.0, 8, 50),
  stop("psa, min_max", 0.5, 0.9, 5, 90),
  stop("certified", 0.5, 1.0, 20),
  row("b", "dense", 1, 0.5, 32),
  row("b", "cuboid_mean", 128, 0.4, 4),
  row("b", "cuboid_mean", 512, 0.5, 16),
  stop("psa", 0.5, 0.4, 4, 100, task="b"),
  stop("psa", 0.9, 0.4, 8, 50, task="b"),
  row("c", "dense", 1, 0.0, 32, "global"),
  row("c", "cuboid_mean", 128, 0.0, 4, "global"),
]


def test_psa_against_fixed():
  found = {(entry["of"], entry["level"]): entry for entry in report.psa_against_fixed(ROWS)}
  a = found["a", 0.98]
  assert (a["psa"]["at"], a["fixed"]["at"], a["dense"]["blocks"]) == (0.9, 512, 32)
  assert a["fixed_by_psa"] == {"blocks": 2, "bytes": 2} and a["dense_by_psa"] == {"blocks": 4, "bytes": 4}
  b = found["b", 0.98]
  assert b["psa"] is None and b["fixed"]["at"] == 512 and b["fixed_by_psa"] is b["dense_by_psa"] is None
  # Of the means, 0.75 for dense, only settings that both tasks have: 1024 tokens is none.
  mean = found["mean of retrieval", 0.99]
  assert mean["dense"]["accuracy"] == 0.75 and mean["fixed"]["at"] == 512 and mean["psa"] is None
  assert b["fixed_fails"]["at"] == 128 and b["psa_fails"]["at"] == 0.9
  assert a["at_least"]["blocks"] == 0.5 and a["at_most"]["blocks"] == 4 and a["psa_fails"]["at"] == 0.5
  assert a["psa"]["sure"] == 1 and mean["fixed"]["sure"] == 1
  c = found["c", 0.99]
  assert c["psa"] is c["fixed"] is c["fixed_fails"] is c["psa_fails"] is None
  lines = report.markdown(report.summary(ROWS, [])).splitlines()
  assert any(line.startswith("| b | psa | 98% | 50.0% | 32.0 | none reaches it |") for line in lines)
  assert any(line.startswith("| c | psa | 98% | 0.0% | 32.0 | dense does not solve it |") for line in lines)


def test_what_was_not_measured_is_not_compared():
  dense = row("a", "dense", 1, 1.0, 32)
  assert not list(report.psa_against_fixed([dense, row("a", "random", 128, 0.1, 4)]))
  line = (
    report.markdown(report.summary([dense, stop("psa", 0.9, 1.0, 8)], [])).split("| a | psa | 98% |")[1].split("\n")[0]
  )
  assert "not measured" in line and "none reaches it" not in line


def test_what_reads_nothing_has_no_ratios():
  """Of contexts that are shorter than a block."""
  dense, psa = row("a", "dense", 1, 1.0, 0), stop("psa", 0.9, 1.0, 0)
  first, *_ = report.psa_against_fixed([dense, psa])
  assert first["psa"]["blocks"] == 0 and first["dense_by_psa"] is None
  rules = [stop("certified", 0.9, 1.0, 8), stop("psa, min_max", 0.9, 1.0, 0)]
  assert [entry["cost"] for entry in report.stop_rules(rules)] == [None]
  assert report.markdown(report.summary([dense, psa, *rules], []))


def test_levels_are_reached_in_spite_of_rounding():
  rows = [row("a", "dense", 1, 0.5, 32), row("a", "psa", 0.9, 0.98 * 0.5 - 1e-12, 8)]
  assert next(report.psa_against_fixed(rows))["psa"]["at"] == 0.9


def test_how_sure_it_is_that_a_level_is_reached():
  """98 of 100, where dense has all: exactly 98 %, so that about half of the draws are there, and 95 % nearly all."""
  dense, psa = row("a", "dense", 1, 1.0, 32), row("a", "psa", 0.9, 0.98, 8)
  dense["each"]["accuracy"], psa["each"]["accuracy"] = [1.0] * 100, [1.0] * 98 + [0.0] * 2
  found = {entry["level"]: entry for entry in report.psa_against_fixed([dense, psa])}
  assert 0.4 < found[0.98]["psa"]["sure"] < 0.8 and found[0.99]["psa"] is None
  drawn = report.bootstrap([psa["each"]["accuracy"]], [dense["each"]["accuracy"]], 0.95)
  assert drawn.mean() == pytest.approx(0.03, abs=1e-3) and 0.95 < (drawn >= 0).mean() < 1


def test_stop_rules():
  first, second = report.stop_rules([r for r in ROWS if r["task"] == "a"])
  assert first["threshold"] == 0.5 and first["cost"] == 4 and first["certified"]["violations"] == 0
  counts = {"pairs": 1000, "stopped": 800, "violations": 100, "short": 50, "stops": 200, "broken": 25}
  assert first["psa"] == {"blocks": 4, "mass": 0.9, "estimate_error": 0.005, "claimed": 0.51, "true": 0.49} | counts
  assert second["threshold"] == 0.9 and second["cost"] is None and "certified" not in second
  assert list(report.certified(ROWS)) == [{"pairs": 1000, "violations": 0, "tolerance": TOLERANCE}]
  both = next(entry for entry in report.stop_rules(ROWS) if entry["threshold"] == 0.9)
  assert (both["psa"]["pairs"], both["psa"]["violations"]) == (2000, 100)
  other = [*ROWS, *(stop("psa, last_group, every_head", 0.5, 0.9, 5, 40, task=task) for task in "ab")]
  lines = report.markdown(report.summary(other, [])).splitlines()
  assert "| psa 0.5 | 4.0 | 0.900 | 2,000 | 80.0% | 0.510 | 0.490 | 200 | 6.2% | 12.5% |" in lines
  assert any(line.startswith("| psa, last_group, every_head 0.5 | 5.0 |") for line in lines)


def test_every_rule_has_its_comparison_and_its_blocks_by_head():
  name = "psa, least, every_head"
  rows = [*ROWS, *(stop(name, at, 1.0, 6 * at, task="a") for at in (0.5, 0.9))]
  found = [entry for entry in report.psa_against_fixed(rows) if entry["of"] == "a" and entry["level"] == 0.98]
  assert [(entry["series"], entry["psa"]["at"], entry["psa"]["blocks"]) for entry in found] == [
    ("psa", 0.9, 8),
    (name, 0.5, 3),
  ]
  assert found[1]["fixed_by_psa"]["blocks"] == pytest.approx(16 / 3) and found[1]["psa_fails"] is None
  heads = {(entry["series"], entry["threshold"]): entry["mean"] for entry in report.psa_by_head(rows)}
  assert heads == {
    ("psa", 0.5): [[3, 5]], ("psa", 0.9): [[7, 9]], (name, 0.5): [[2, 4]], (name, 0.9): [[4.4, 6.4]]
  }  # fmt: skip
  lines = report.markdown(report.summary(rows, [])).splitlines()
  assert any(line.startswith(f"| {name} 0.9 | 0 | 5.4 | 4.4 | 6.4 |") for line in lines)


def test_agreement_has_an_interval_over_texts():
  (only,) = report.likelihoods([row("text", "dense", 1, 0.3, 32, "text")])
  low, high = only["agreement_interval"]
  assert 0.5 <= low < only["agreement"] == 0.7 < high <= 1
  line = next(
    line
    for line in report.markdown(report.summary([row("text", "dense", 1, 0.3, 32, "text")], [])).split("\n")
    if line.startswith("| dense 1 | 2.0000")
  )
  assert f"| 70.0% | {low:.1%} to {high:.1%} |" in line


def test_by_task():
  found = {(entry["group"], entry["case"]): entry["of"] for entry in report.by_task(ROWS)}
  assert found["retrieval", "cuboid_mean 1024"] == {"a": {"accuracy": 1.0, "blocks": 32}}
  assert found["retrieval", "psa 0.9"]["b"] == {"accuracy": 0.4, "blocks": 8}
  lines = report.markdown(report.summary(ROWS, [])).splitlines()
  assert "| setting | a | b |" in lines and "| setting | c |" in lines
  assert "| cuboid_mean 1024 | 100.0% (32) |  |" in lines and "| psa 0.9 | 100.0% (8) | 40.0% (8) |" in lines


def test_likelihoods_and_accuracies():
  sparse = row("text", "psa", 0.9, 0.2, 8, "text", nats=2.5)
  sparse["each"]["nats"] = [1.5, 2.5, 4.5]
  (dense, psa) = report.likelihoods([row("text", "dense", 1, 0.3, 32, "text"), sparse])
  assert dense["more"] == 0 and psa["more"] == 0.5
  np.testing.assert_allclose(psa["interval"], (0.5, 0.5))
  told = {(entry["group"], entry["case"]): entry for entry in report.accuracies(ROWS)}
  worse = told["retrieval", "cuboid_mean 128"]
  assert worse["more"] == pytest.approx(-0.3) and worse["interval"][0] < -0.3 < worse["interval"][1] < 0
  assert ("retrieval", "cuboid_mean 1024") not in told


def test_the_interval_is_paired():
  dense, worse = [1] * 80 + [0] * 20, [0] * 10 + [1] * 70 + [0] * 20
  low, high = report.interval([worse], [dense])
  assert low < -0.1 < high < -0.03
  assert report.interval([dense], [dense]) == (0, 0)
  # Tasks are given, not drawn: of one that always and one that never fails nothing is uncertain.
  np.testing.assert_allclose(report.interval([[0] * 10, [1] * 10], [[1] * 10, [1] * 10]), (-0.5, -0.5))


def prefill_row(series: str, at: float, nats: list[float], read: float, task: str = "a") -> dict:
  told = row(task, series, at, 0.5, 32, read=read, read_by_layer=[read / 2, 3 * read / 2], prompt_nats=2.5)
  told["nats"], told["each"] = float(np.mean(nats)), told["each"] | {"nats": nats, "prompt_nats": [2.0, 2.5, 3.0]}
  return told


def test_sparse_prefill_beside_dense():
  rows = [
    prefill_row("prefill top_k, mean", 0.5, [1.5, 2.5, 4.5], 0.5),
    prefill_row("prefill top_k, mean", 0.25, [2.0, 3.0, 5.0], 0.25),
    prefill_row("dense prefill", 1, [1.0, 2.0, 4.0], 1.0),
    prefill_row("dense prefill", 1, [1.0, 2.0, 4.0], 1.0, "b"),
    prefill_row("prefill top_k, mean", 0.5, [1.1, 2.1, 4.1], 0.6, "b"),
  ]
  dense, half = report.summary([], [], rows)["prefill"]  # a quarter is not there of both tasks
  assert dense["nats_more"] == 0 and half["nats_more"] == pytest.approx(0.3) and half["at"] == 0.5
  np.testing.assert_allclose(half["nats_interval"], (0.3, 0.3))
  assert half["read"] == pytest.approx(0.55) and half["read_by_layer"] == [0.275, 0.825]
  lines = report.markdown(report.summary([], [], rows)).splitlines()
  assert any(
    line.startswith("| prefill top_k, mean 0.5 | 55.0% | 27.5% | 82.5% | 2.5000 | +0.0000 |") for line in lines
  )


def test_what_no_line_says_has_no_column_and_plain_tables_come_first():
  rows = [row("text", series, at, 0.3, blocks, "text") for series, at, blocks in (("dense", 1, 32), ("mean", 64, 2))]
  lines = report.markdown(report.summary(rows, [])).splitlines()
  assert lines[0].startswith("A setting is ")
  assert next(line for line in lines if line.startswith("## ")) == "## Ordinary text"
  heads = [line for line in lines if line.startswith("| setting |")]
  assert heads[1] == "| setting | blocks | KiB | mass | error | nats vs dense | agreement |"
  assert {line.count("|") for line in lines if line.startswith("| mean 64 |")} == {head.count("|") for head in heads}


def test_every_part_of_a_summary_has_a_table():
  reuse = selections.reuse(drifting()) | dict(task="recite", tokens=1024, case="psa 0.9", requests=2, traced=44)
  rows = [*ROWS, row("text", "dense", 1, 0.3, 32, "text")]
  told = report.summary(rows, [reuse], [prefill_row("dense prefill", 1, [1.0, 2.0, 4.0], 1.0)])
  assert all(told.values()) and json.loads(json.dumps(told)) == json.loads(json.dumps(told, allow_nan=False))
  assert report.markdown(told).count("\n## ") == len(told)
  overlap = np.array(reuse["overlap"])[..., 11]
  assert overlap.min() < told["reuse"][0]["overlap"]["12"] < overlap.max()
  assert report.nearest_threshold([0.5, 0.9, 0.98]) == 0.98  # 0.95 by default
