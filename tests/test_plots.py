"""Pictures of result folders: what is drawn, from which rows, and what is said below."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import forks, jsonl

pytest.importorskip("matplotlib")

from sparse_serve_jax.ladder.goodput import Goodput
from sparse_serve_jax.plots import accuracy, benchmarks, folder, ladder, style

ROOT = Path(__file__).resolve().parent.parent
BENCH = dict(best_us=9.0, floor_us=8.0, device="card", commit="abc", spread=0.0)


@pytest.fixture
def drawn(monkeypatch):
  """Figures that are saved, and what is said below them."""
  figures = []
  save = style.save

  def keep(figure, file, made_by=""):
    figures.append((figure, made_by))
    return save(figure, file, made_by)

  monkeypatch.setattr(style, "save", keep)
  return figures


def test_no_two_lines_look_alike():
  looks = list(style.LOOKS["axes.prop_cycle"])
  assert len(looks) == 32 == len({(look["color"], look["linestyle"], look["marker"]) for look in looks})


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [(1, 10, ["1", "2", "5", "10"]), (1, 10000, ["1", "10", "100", "1000", "10000"]), (21, 29, None), (0.9, 1.1, None)],
)
def test_logarithmic_axes_have_ticks(low, high, expected):
  figure, axes = style.subplots()
  axes.plot([low, high], [1, 2])
  axes.set_xlim(low, high)
  style.logarithmic(axes, "x")
  figure.canvas.draw()
  left, right = axes.get_xlim()
  places = [(at, text.get_text()) for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)]
  shown = [text for at, text in places if left <= at <= right]
  assert shown == expected if expected else len(shown) >= 3


@pytest.mark.parametrize(
  ("at", "shown"),
  [
    ([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"]),
    ([1, 1.03, 1.06, 2, 4, 100], ["1.06", "2", "4", "100"]),  # those that crowd are left out
    ([3], ["3"]),
  ],
)
def test_ticks_stand_at_what_was_measured(at, shown):
  figure, axes = style.subplots()
  axes.plot(at, at)
  style.logarithmic(axes, "x", at)
  figure.canvas.draw()
  assert [tick.get_text() for tick in axes.get_xticklabels()] == shown


TIMES = {"ttft_mean_s": 0.02, "tbt_mean_s": None, "throughput_tok_s": 30.0}
GOOD = {"a": Goodput(2.0, 4.0), "b": Goodput(None, 1.0), "c": Goodput(2.0, None)}


@pytest.mark.parametrize(
  ("found", "score", "shown", "bars"),
  [
    ({}, 0.5, "score of the answers", {"0.5": 0.5}),
    (GOOD, 0.5, "goodput, requests/s", {"2": 2, "< 1": 0, "≥ 2": 2}),
    ({}, None, "", {}),
  ],
)
def test_the_plot_shows_what_there_is(found, score, shown, bars, drawn, tmp_path):
  cells = [{"rung": rung, "rate": rate, "score_mean": score, **TIMES} for rung in "abc" for rate in (1, 2)]
  ladder.draw(cells, found, tmp_path / "ladder.png")
  ttft, tbt, throughput, last = drawn[0][0].axes
  assert [axes.get_ylabel().split(", ")[-1] for axes in (ttft, tbt, throughput)] == ["s", "s", "output tokens/s"]
  assert last.get_ylabel() == shown and last.axison == bool(shown)
  heights = {text.get_text(): bar.get_height() for bar, text in zip(last.patches, last.texts, strict=True)}
  assert heights == bars
  drawn[0][0].canvas.draw()
  assert [tick.get_text() for tick in ttft.get_xticklabels()] == ["1", "2"]
  assert [list(line.get_xdata()) for line in ttft.get_lines()] == [[1, 2]] * 3


def test_a_rung_looks_the_same_in_all_pictures(drawn, tmp_path):
  """And rungs that load nothing are not drawn beside those that do."""
  cache = {"a": (1.0, 0), "b": (0.5, 400), "c": (0.75, 100)}
  cells = [
    dict(rung=rung, rate=rate, score_mean=None, output_tokens=100, hbm_hit_rate=hits, blocks_loaded=loads, **TIMES)
    for rung, (hits, loads) in cache.items()
    for rate in (2, 1)
  ]
  ladder.write(tmp_path, cells, {})
  assert sorted(file.name for file in tmp_path.iterdir()) == ["ladder.png", "ladder_cache.png"]
  looks = [
    {line.get_label(): (line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
    for figure, _ in drawn
  ]
  assert set(looks[0]) == set("abc") and looks[1] == {rung: looks[0][rung] for rung in "bc"}
  hits, loads = drawn[1][0].axes
  assert [list(line.get_ydata()) for line in hits.get_lines()] == [[0.5, 0.5], [0.75, 0.75]]
  assert [list(line.get_ydata()) for line in loads.get_lines()] == [[4, 4], [1, 1]]


def test_benchmarks_are_drawn_by_op_and_the_newest_row_of_a_case_counts(drawn, tmp_path):
  copies = [
    dict(BENCH, op="copy", case="a", us=20.0),
    dict(BENCH, op="copy", case="a", us=10.0),
    dict(BENCH, op="copy", case="b", us=30.0, baselines={"memcpy": 90.0}),
  ]
  jsonl.write(tmp_path / "kernels.jsonl", copies)
  jsonl.write(tmp_path / "prefill.jsonl", [dict(BENCH, op="prefill", case="1x2", us=50_000.0)])
  files = folder.draw(tmp_path, tmp_path)
  assert {"bench_copy.png", "bench_prefill.png", "benchmarks.csv", "benchmarks.md"} == {file.name for file in files}
  (copy, said), (prefill, _) = drawn
  assert (
    said == "card; commit abc"
    and copy.axes[0].get_xlabel() == "time, us"
    and prefill.axes[0].get_xlabel() == "time, ms"
  )
  lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in copy.axes[0].get_lines()}
  assert lines == {"floor": ([8, 8], [0, 1]), "memcpy": ([90], [1]), "measured": ([10, 30], [0, 1])}
  assert "| copy | a | 10.0 | 9.0 | 8.0 | 1.25 |" in (tmp_path / "benchmarks.md").read_text()
  assert [row["us"] for row in benchmarks.newest([dict(op="x", case="y", us=n) for n in (1, 2)])] == [2]


def test_requests_are_drawn_by_their_times(drawn, tmp_path):
  rows = [
    dict(arrival_s=1.0, first_token_s=1.0 + t, token_s=[1 + t, 1.5 + t, 1.75 + t], finish_s=3.0) for t in (0.5, 0.25)
  ]
  rows[0]["output_tokens"] = 4  # the last two came together
  failed = rows[0] | dict(finish_reason="error", error="cut")
  jsonl.write(tmp_path / "requests.jsonl", [*rows, failed, dict(finish_reason="refused", error="no prompt")])
  part = dict(command=["bench", "--rate=2"], commit="abc", device=dict(kind="cpu"))
  setting = dict(endpoint=dict(url="http://h:1", model="m"))
  (tmp_path / "run.json").write_text(json.dumps(dict(setting=setting, parts=[part])))
  files = {file.name for file in folder.draw(tmp_path, tmp_path)}
  assert files == {"requests.png", "requests.md", "requests.csv"}
  ((figure, said),) = drawn
  assert said == "m at http://h:1; commit abc; bench --rate=2"  # not the client's device
  left, right = figure.axes
  assert list(left.get_lines()[0].get_xdata()) == [0.25, 0.5] and left.get_xlabel().endswith(", s")
  assert list(right.get_lines()[0].get_xdata()) == [0, 0.25, 0.25, 0.5, 0.5]
  head, _, ttft, tbt, latency = (tmp_path / "requests.md").read_text().splitlines()
  assert head == "|  | n | mean | p50 | p90 | p99 |"
  assert ttft.startswith("| time to first token, s | 2 | 0.375 |") and latency.startswith("| latency, s | 2 | 2 |")
  assert tbt.startswith("| time between tokens, s | 5 | 0.3 | 0.25 |")
  assert (tmp_path / "requests.csv").read_text().splitlines()[2].startswith('"time between tokens, s",5,0.3,0.25,')


def test_requests_none_of_which_had_a_token(drawn, tmp_path):
  jsonl.write(tmp_path / "requests.jsonl", [dict(finish_reason="refused", error="no prompt")])
  folder.draw(tmp_path, tmp_path)
  assert "| latency, s | 0 |  |" in (tmp_path / "requests.md").read_text() and not drawn[0][0].axes[0].get_lines()


def test_selections_are_drawn_with_what_is_drawn_like_them(drawn, tmp_path):
  rows = ["source,like,blocks,misses at 3,misses at 1.5", "real,real,64,0.01,0.2", "held:0.2,real,64,,0.3"]
  (tmp_path / "of_real.csv").write_text("\n".join(rows) + "\n")
  (tmp_path / "other.csv").write_text("a,b\n1,2\n")
  for _ in range(2):  # its own table is no source the second time
    names = {file.name for file in folder.draw(tmp_path, tmp_path)}
    assert names == {"selections.png", "selections.md", "selections.csv"}
    assert (tmp_path / "selections.csv").read_text().splitlines() == rows
  (axes,) = drawn[0][0].axes
  lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
  assert lines == {"recorded": ([1.5, 3], [0.2, 0.01]), "held:0.2": ([1.5], [0.3])} and axes.get_title() == "real"
  assert "| held:0.2 | real | 64 |  | 0.3 |" in (tmp_path / "selections.md").read_text()


def test_a_summary_is_drawn_where_rows_were_not_kept(drawn, tmp_path):
  """One of before there were other rules."""
  summary = json.loads((ROOT / "experiments/results/2026-11-26-reference/summary.json").read_text())
  summary["accuracies"] = [row for row in summary["accuracies"] if (row["group"], row["tokens"]) == ("global", 16384)]
  summary["psa_by_head"] = [row for row in summary["psa_by_head"] if (row["group"], row["tokens"]) == ("text", 512)]
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  assert {file.name for file in folder.draw(tmp_path, tmp_path)} == {"accuracy_global_16384.png", "psa_text_512.png"}


def test_layers_of_a_model_that_has_few_and_reads_all(drawn, tmp_path):
  of_psa = {"series": "psa", "threshold": 0.95, "group": "text", "tokens": 2048, "mean": [[62.6] * 2] * 4}
  accuracy.blocks_by_head(of_psa | {"quantiles": [[[n] * 2] * 4 for n in (62, 62, 63, 63, 63)]}, tmp_path / "a.png")
  by_layer = next(axes for figure, _ in drawn for axes in figure.axes if axes.get_xlabel() == "layer")
  assert all(at == round(at) for at in by_layer.get_xticks())  # there is no layer 0.5
  assert by_layer.get_ylim()[1] >= 64  # no line on the edge


def test_rows_without_their_instances_are_not_drawn(drawn, tmp_path):
  """As those that are kept in the tree."""
  source = ROOT / "experiments/results/2026-11-30-accuracy/reference"
  shutil.copy(source / "results.jsonl", tmp_path)
  with pytest.raises(ValueError, match="rows without 'each', the values of every instance, and no summary.json"):
    folder.draw(tmp_path, tmp_path)
  shutil.copy(source / "summary.json", tmp_path)  # of which only tables of documents are made
  with pytest.raises(ValueError, match="nothing of results.jsonl, .*summary.json can be drawn"):
    folder.draw(tmp_path, tmp_path)


def test_a_folder_of_a_ladder_says_what_made_it(drawn, tmp_path):
  times = dict(ttft_mean_s=0.02, tbt_mean_s=0.1, throughput_tok_s=30.0, score_mean=None)
  more = dict(requests=1, ttft_p99_s=1.0, tbt_p99_s=1.0, latency_mean_s=1.0, scheduling_delay_mean_s=0.1)
  more |= dict(hbm_hit_rate=None, blocks_loaded=0, tokens_as_first=None)
  alone = dict(rung="a", rate=None, iteration_s=0.1, prompt_tokens=9)
  cells = [dict(rung="a", rate=rate, keeps_slo=rate < 4, **times, **more) for rate in (1.0, 2.0, 4.0)]
  jsonl.write(tmp_path / "cells.jsonl", [alone, *cells])
  part = dict(command=["/x/ladder.py", "--out=y z"], commit="abc", device=dict(kind="card"))
  (tmp_path / "run.json").write_text(json.dumps(dict(setting={}, parts=[part])))
  files = {file.name for file in folder.draw(tmp_path, tmp_path)}
  assert files == {"ladder.png", "results.md", "results.csv"}
  ((figure, said),) = drawn
  assert said == "card; commit abc; ladder '--out=y z'"
  assert [bar.get_height() for bar in figure.axes[3].patches] == [2]  # the highest that is served well
  assert "goodput of a: 2 requests/s; 4 is not served well" in (tmp_path / "results.md").read_text()


def test_what_others_write_meanwhile_is_not_what_was_drawn(tmp_path, monkeypatch):
  def drawn(source, out):
    for name in ("requests.jsonl", ".lock", "requests.md"):
      (out / name).write_text("{}\n")
    return True

  monkeypatch.setattr(folder, "_DRAWN", {"requests.jsonl": drawn})
  assert folder.draw(tmp_path, tmp_path) == [tmp_path / "requests.md"]


def test_a_folder_without_rows_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"has no rows of an experiment: none of cells\.jsonl"):
    folder.draw(tmp_path, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "said"),
  [((), "which folder?"), (("absent",), "absent is no folder"), (("tests",), "no rows of an experiment")],
)
def test_the_command_refuses_in_a_line(arguments, said, tmp_path):
  done = forks.start("experiments.plot", *arguments, f"--out={tmp_path}")
  assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_the_command_draws_what_is_in_the_tree(tmp_path):
  done = forks.start("experiments.plot", "experiments/results/2026-11-26-h200", f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  files = json.loads(done.stdout.splitlines()[-1])["files"]
  assert f"{tmp_path}/bench_step.png" in files and all(Path(file).stat().st_size > 100 for file in files)
