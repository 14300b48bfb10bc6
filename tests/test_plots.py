"""Pictures of result folders: what is drawn, from which rows, and what is said below."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forks

pytest.importorskip("matplotlib")

from sparse_serve_jax.plots import benchmarks, folder, ladder, requests, style

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


def write(file: Path, *rows: dict) -> None:
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
  ("goodput", "score", "shown"),
  [({}, 0.5, "score of the answers"), ({"a": 2.0, "b": None}, 0.5, "goodput, requests/s"), ({}, None, "")],
)
def test_the_plot_shows_what_there_is(goodput, score, shown, drawn, tmp_path):
  times = {"ttft_mean_s": 0.02, "tbt_mean_s": None, "throughput_tok_s": 30.0}
  cells = [{"rung": rung, "rate": rate, "score_mean": score, **times} for rung in "ab" for rate in (1, 2)]
  ladder.draw(cells, goodput, tmp_path / "ladder.png")
  ttft, *_, last = drawn[0][0].axes
  assert last.get_ylabel() == shown and last.axison == bool(shown)
  assert [bar.get_height() for bar in last.patches] == ([2, 0] if goodput else [score] * 2 if score else [])
  drawn[0][0].canvas.draw()
  ticks = [tick.get_text() for tick in ttft.get_xticklabels()]
  assert len(ticks) >= 3 and [list(line.get_xdata()) for line in ttft.get_lines()] == [[1, 2], [1, 2]]


def test_benchmarks_are_drawn_by_op_and_the_newest_row_of_a_case_counts(drawn, tmp_path):
  write(
    tmp_path / "kernels.jsonl",
    dict(BENCH, op="copy", case="a", us=20.0),
    dict(BENCH, op="copy", case="a", us=10.0),
    dict(BENCH, op="copy", case="b", us=30.0),
  )
  write(tmp_path / "prefill.jsonl", dict(BENCH, op="prefill", case="1x2", us=50_000.0))
  files = folder.draw(tmp_path, tmp_path)
  assert {"bench_copy.png", "bench_prefill.png", "benchmarks.csv", "benchmarks.md"} == {file.name for file in files}
  (copy, said), (prefill, _) = drawn
  assert said == "card; commit abc" and copy.axes[0].get_xlabel() == "us" and prefill.axes[0].get_xlabel() == "ms"
  measured = copy.axes[0].get_lines()[1]
  assert list(measured.get_xdata()) == [10, 30]
  assert "| copy | a | 10.0 | 9.0 | 8.0 | 1.25 |" in (tmp_path / "benchmarks.md").read_text()
  assert [row["us"] for row in benchmarks.newest([dict(op="x", case="y", us=n) for n in (1, 2)])] == [2]


def test_requests_are_drawn_by_their_times(drawn, tmp_path):
  rows = [dict(arrival_s=1.0, first_token_s=1.0 + t, token_s=[1 + t, 1.5 + t, 1.75 + t]) for t in (0.5, 0.25)]
  requests.draw([*rows, dict(finish_reason="refused")], tmp_path / "requests.png")
  left, right = drawn[0][0].axes
  assert list(left.get_lines()[0].get_xdata()) == [0.25, 0.5] and "s" in left.get_xlabel()
  assert list(right.get_lines()[0].get_xdata()) == [0.25, 0.25, 0.5, 0.5]


def test_a_folder_of_a_ladder_says_what_made_it(drawn, tmp_path):
  times = dict(ttft_mean_s=0.02, tbt_mean_s=0.1, throughput_tok_s=30.0, score_mean=None)
  more = dict(requests=1, ttft_p99_s=1.0, tbt_p99_s=1.0, latency_mean_s=1.0, scheduling_delay_mean_s=0.1)
  more |= dict(hbm_hit_rate=None, blocks_loaded=0, tokens_as_first=None)
  write(
    tmp_path / "cells.jsonl",
    *(dict(rung="a", rate=rate, keeps_slo=rate < 4, **times, **more) for rate in (1.0, 2.0, 4.0)),
  )
  part = dict(command=["/x/ladder.py", "--out=y z"], commit="abc", device=dict(kind="card"))
  (tmp_path / "run.json").write_text(json.dumps(dict(setting={}, parts=[part])))
  files = {file.name for file in folder.draw(tmp_path, tmp_path)}
  assert files == {"ladder.png", "results.md", "results.csv"}
  ((figure, said),) = drawn
  assert said == "card; commit abc; ladder '--out=y z'"
  assert [bar.get_height() for bar in figure.axes[3].patches] == [2]  # the highest that is served well
  assert "goodput of a: 2 requests/s; 4 is not served well" in (tmp_path / "results.md").read_text()


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
