"""Sweeps in several processes: actors of a Ray of this machine alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests import forks, jsonl
from tests.test_ladder import COMMAND, RUNGS

pytest.importorskip("ray")

SWEEP = ["--model=random:tiny", "--lengths=640", "--text_lengths=600", "--instances=2", "--budgets=128", "--workers=0"]
SWEEP += [
  "--methods=cuboid_mean",
  "--thresholds=0.5",
  "--tasks=key_value,single_text",
  "--requests=1",
  "--trace_steps=40",
]
SWEEP += ["--steps=128"]


def cells(rows: list[dict]) -> list[tuple]:
  return sorted((row["task"], row["tokens"], row["case"], json.dumps(row, sort_keys=True)) for row in rows)


@pytest.mark.slow
def test_accuracy_is_that_of_one_process_and_goes_on(tmp_path):
  def run(name: str, *more: str) -> subprocess.CompletedProcess[str]:
    done = forks.start("experiments.accuracy", *SWEEP, f"--out={tmp_path / name}", *more)
    assert done.returncode == 0, done.stderr
    return done

  one = run("one", "--parts=tasks,text,selections")
  part = run("many", "--parts=tasks", "--tasks=single_text")
  before = (tmp_path / "many" / "results.jsonl").read_text()
  many = run("many", "--parts=tasks,text,selections", "--ray")
  assert (tmp_path / "many" / "results.jsonl").read_text().startswith(before) and len(before.splitlines()) == 3
  assert json.loads(part.stdout.splitlines()[-1])["rows"] == 3
  for name, n in (("results", 9), ("reuse", 4)):
    ours, theirs = (jsonl.read(tmp_path / folder / f"{name}.jsonl") for folder in ("many", "one"))
    assert cells(ours) == cells(theirs) and len(ours) == n
  told = [json.loads(done.stdout.splitlines()[-1]) for done in (one, many)]
  assert told[0] | {"out": ""} == told[1] | {"out": ""}
  assert (tmp_path / "many" / "results.md").read_text() == (tmp_path / "one" / "results.md").read_text()
  traces = [sorted(file.name for file in (tmp_path / name / "traces").iterdir()) for name in ("one", "many")]
  assert traces[0] == traces[1] != []
  parts = json.loads((tmp_path / "many" / "run.json").read_text())["parts"]
  assert len(parts) == 2 and parts[0]["device"]["platform"] == "cpu" and "--ray" in parts[1]["command"]


@pytest.mark.soak
def test_the_ladder_has_the_same_rows(tmp_path):
  def run(name: str, *more: str) -> list[dict]:
    done = forks.start("experiments.ladder", *COMMAND, f"--out={tmp_path / name}", *more)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout.splitlines()[-1])) == list(RUNGS)
    return jsonl.read(tmp_path / name / "cells.jsonl")

  one, many = run("one"), run("many", "--ray")
  of = [sorted((row["rung"], row["rate"] or 0.0, sorted(row)) for row in rows) for rows in (one, many)]
  assert of[0] == of[1] and len(many) == 6
  assert all(row["requests"] == 3 and row["tokens_as_first"] > 0 for row in many if row["rate"])
  answers = [sorted(jsonl.read(tmp_path / name / "answers.jsonl"), key=json.dumps) for name in ("one", "many")]
  assert answers[0] == answers[1]
  assert run("many", "--ray") == many


@pytest.mark.slow
def test_what_goes_wrong_elsewhere_is_told_in_a_line(tmp_path):
  done = forks.start("experiments.accuracy", *SWEEP, f"--out={tmp_path}", "--parts=tasks", "--steps=8", "--ray")
  assert done.returncode == 2 and "8 decode steps end before" in done.stderr.splitlines()[-1]


WARNING = """
import select, sys, warnings
from sparse_serve_jax import cluster
from sparse_serve_jax.server import replicas

def warn(*_, **__):
  warnings.warn("a word to the user")

def start():
  warnings.showwarning = warnings._showwarning_orig  # as in a process of its own
  replicas.runtime.configure, replicas.load_model_here = warn, lambda *_, **__: 1 / 0
  try:
    replicas.Replica().start(None, "", None, 1.0, False, 1)
  except ZeroDivisionError:
    pass

cluster.once(warn)
cluster.once(start)
select.select([sys.stdin], [], [], 30)  # until what they told is here
"""


@pytest.mark.slow
def test_warnings_of_other_processes_are_lines_of_the_log():
  """Neither file and line of this package, nor its source."""
  command, told = [sys.executable, "-c", WARNING], list[str]()
  environment = os.environ | {"RAY_DEDUP_LOGS": "0"}  # otherwise Ray keeps the second for seconds
  with subprocess.Popen(
    command, cwd=forks.ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True,
  ) as process:  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for line in process.stdout:
      told += [line.rstrip()] * ("a word to the user" in line)
      if len(told) == 2:
        process.stdin.close()
  assert process.returncode == 0 and len(told) == 2
  assert all(re.search(r"\(\w+ pid=\d+\)\S* a word to the user$", line) for line in told), told
