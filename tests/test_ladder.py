"""The ladder: cells that are run once, what is compiled before, goodput's search, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sparse_serve_jax import workloads
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.evaluation import ladder, ladder_report
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.tiny import SMALL_SERVING

ROOT = Path(__file__).resolve().parent.parent
RUNGS = ("sparse_serve", "psa")
COMMAND = [
  "--model=random:tiny",
  f"--rungs={','.join(RUNGS)}",
  "--rates=5,20",
  "--limit=3",
  "--prompt_tokens=300",
  "--max_new_tokens=6",
  *[f"--set={change}" for change in SMALL_SERVING],
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  """In a process of its own, as commands define the same flags."""
  command = [sys.executable, "-m", "experiments.ladder", *COMMAND, *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_cells_are_run_once_and_told_in_every_form(tmp_path):
  done = run(f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout.splitlines()[-1])
  assert list(told) == list(RUNGS) and all(set(of["throughput_tok_s"]) == {"5", "20"} for of in told.values())
  rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
  assert [(row["rung"], row["rate"]) for row in rows] == [
    ("sparse_serve", None), ("sparse_serve", 5.0), ("sparse_serve", 20.0), ("psa", None), ("psa", 5.0), ("psa", 20.0),
  ]  # fmt: skip
  assert all(row["requests"] == 3 and row["refused"] == 0 for row in rows if row["rate"])
  answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
  assert [row["request_id"] for row in answers] == 2 * [f"needle-{i}" for i in range(3)]
  assert all(len(row["tokens"]) == 6 and 0 <= row["score"] <= 1 for row in answers)
  assert rows[1]["tokens_as_first"] == 1 and "programs compiled" in done.stderr
  with (tmp_path / "results.csv").open() as file:
    assert [float(row["rate"]) for row in csv.DictReader(file)] == [5, 20, 5, 20]
  assert (tmp_path / "results.md").read_text().count("\n| psa |") == 2

  whole = (tmp_path / "cells.jsonl").read_bytes()
  again = run(f"--out={tmp_path}")
  assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == told
  assert (tmp_path / "cells.jsonl").read_bytes() == whole and "programs compiled" not in again.stderr

  other = run("--set=sparse.window_tokens=24", f"--out={tmp_path}")
  assert other.returncode == 2
  assert "configs.sparse_serve.sparse.window_tokens was 16 and is 24" in other.stderr
  assert (tmp_path / "cells.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
  ("names", "changes", "message"),
  [
    (["dense", "sprase"], [], "did you mean 'sparse'?"),
    (["psa", "psa"], [], "the rung psa is given twice"),
    (["psa"], ["cache.load=gather"], "psa: a rung whose parts exclude each other: cache.load='gather'"),
    (RUNGS, ["cache.hbm_bytes=300KiB"], "sparse_serve: cache.hbm_bytes=307200 is below the minimum of .* psa: cache"),
    (["psa"], ["sparse.dense_layers=9"], "psa: sparse.dense_layers=9 is beyond the model's 4"),
  ],
)
def test_rungs_that_cannot_run(names, changes, message):
  model = load_model("random:tiny")
  with pytest.raises(ValueError, match=message):
    ladder.shapes(ladder.read_rungs(names, [*SMALL_SERVING, *changes]), model.config)


def test_a_users_own_rung(tmp_path):
  (tmp_path / "mine.json").write_text('{"extends": "psa", "sparse": {"threshold": 0.5}}')
  rungs = ladder.read_rungs(["dense", str(tmp_path / "mine.json")], ["cache.lanes=3"])
  assert list(rungs) == ["dense", "mine"] and rungs["mine"].sparse.threshold == 0.5
  assert [config.cache.lanes for config in rungs.values()] == [3, 3]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_rates_that_are_none(rate):
  with pytest.raises(ValueError, match="the rate of arrivals must be above 0 and finite"):
    workloads.checked_rate(rate)


def compiled() -> list[str]:
  """Names of what JAX compiles from now on."""
  names: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: names.append(event) if event.endswith("backend_compile_duration") else None
  )
  return names


@pytest.mark.parametrize("prefill", ["layer_segmented", "chunked"])
def test_nothing_is_compiled_afterwards(prefill):
  config = override(
    load_config("sparse_serve"),
    [*SMALL_SERVING, f"scheduler.prefill={prefill}", "scheduler.chunk_tokens=16", "scheduler.max_inject_tokens=512"],
  )
  model, lengths = load_model("random:tiny"), [70, 200, 330]
  executor = JaxExecutor(config, model)
  n = executor.compile(lengths)
  after = compiled()
  engine = Engine(executor)
  for i, length in enumerate(lengths):
    engine.add_request(np.full(length, i), 40, ignore_eos=True)
  ended = engine.run()
  assert [len(request.output_tokens) for request in ended] == [40, 40, 40] and n >= 4
  assert not after


def test_what_is_compiled_changes_nothing():
  config = override(load_config("psa"), SMALL_SERVING)
  model, prompt = load_model("random:tiny"), np.arange(200) % 250
  tokens = []
  for warm in (False, True):
    executor = JaxExecutor(config, model)
    if warm:
      executor.compile([200], sampled=True)
    engine = Engine(executor)
    request = engine.add_request(prompt, 20, ignore_eos=True)
    engine.run()
    tokens.append(request.output_tokens)
  assert tokens[0] == tokens[1]


# ------------------------------------------------------------------------------------------------------------- goodput


@pytest.mark.parametrize("capacity", [0.9, 3.0, 5.2, 99.0])
def test_goodputs_search(capacity):
  tried: list[float] = []

  def serves_well(rate: float) -> bool:
    tried.append(rate)
    return rate <= capacity

  found = ladder.search(serves_well, [4, 1, 2, 8], most_runs=8)
  assert tried[: len(tried)] == list(dict.fromkeys(tried))  # none twice
  if capacity < 1:
    assert found == ladder.Goodput(None, 1) and tried == [1]
  elif capacity > 8:
    assert found == ladder.Goodput(8, None) and tried == [1, 2, 4, 8]
  else:
    assert found.rate and found.fails_at and found.rate <= capacity < found.fails_at <= 1.1 * found.rate


def test_goodputs_search_ends_after_so_many_runs():
  tried: list[float] = []
  found = ladder.search(lambda rate: tried.append(rate) or rate < 1.5, [1, 100], most_runs=2)
  assert len(tried) == 4 and found == ladder.Goodput(1, pytest.approx(10**0.5))


def test_goodput_in_words():
  told = ladder_report._goodputs(
    {"a": ladder.Goodput(None, 1), "b": ladder.Goodput(8, None), "c": ladder.Goodput(1, 2)}
  )
  assert told == [
    "goodput of a: below 1 requests/s, the lowest rate that was tried",
    "goodput of b: 8 requests/s or more, the highest rate that was tried",
    "goodput of c: 1 requests/s; 2 is not served well",
  ]


def test_tokens_up_to_where_they_part():
  assert ladder.share_equal([([1, 2, 3], [1, 2, 4]), ([5], [5, 6]), ([], [])]) == 3 / 5
  assert ladder.share_equal([([], [])]) is None
