"""LongBench: the run that predicts and goes on, and the command line."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_serve_jax import workloads
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.evaluation import longbench
from sparse_serve_jax.evaluation.longbench import Release, Run
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import DecodeRow, Plan, PrefillWork, StepResult, StepStats
from sparse_serve_jax.workloads import WorkloadConfig
from sparse_serve_jax.workloads.longbench import SLACK
from tests import forks, jsonl
from tests.longbench import (
  BYTES,
  EOS,
  MAX_NEW,
  ROOT,
  TEMPLATES,
  predicted,
  row_of,
  write_release,
)
from tests.tiny import SMALL_SERVING

# -------------------------------------------------------------------------------------------------------------- the run


class Script:
  """A device that says what it is told, a text for each request, then EOS; and an underscore for what is banned."""

  def __init__(self, answer: Callable[[str], str], rows: int = 4):
    config = types.SimpleNamespace(vocab_size=BYTES.vocab_size)
    self.config, self.model = small_config(), types.SimpleNamespace(config=config, eos_token_ids=(EOS,))
    self.shape = CacheShape(
      K=1, L=1, M=256, P=0, R=rows, S=8, D=4, E=0, dtype="float32", offload=False, max_context=384, slab_tokens=0
    )
    self._answer = answer
    self.prompts: dict[str, str] = {}

  def begin(self) -> None:
    pass

  def submit(self, plan: Plan):
    for work in plan.works:
      self.prompts[work.request_id] = self.prompts.get(work.request_id, "") + BYTES.decode(work.tokens.tolist())
    tokens = {work.request_id: self._token(work, 0) for work in plan.works if work.last}
    tokens |= {row.request_id: self._token(row, row.step + 1) for row in plan.decode}
    return types.SimpleNamespace(result=lambda: StepResult(tokens, {}, StepStats()), on_delivered=lambda: None)

  def _token(self, of: PrefillWork | DecodeRow, i: int) -> int:
    said = [*self._answer(of.request_id).encode().replace(b"$", bytes([255]))]
    token = {255: EOS}.get(said[i], said[i]) if i < len(said) else EOS
    return ord("_") if token in of.sampling.banned else token

  def wait(self) -> None:
    pass


def small_config() -> EngineConfig:
  small = [a for a in SMALL_SERVING if not a.startswith("cache.hbm_bytes")]
  return override(load_config("dense"), [*small, "cache.prefix=false"])  # so that the device sees whole prompts


def scripted(answer: Callable[[str], str]) -> Engine:
  return Engine(Script(answer))


def said(request_id: str) -> str:
  """Of different lengths, so that requests end in another order than they came."""
  return request_id.removesuffix("_e")[-1] * (5 - int(request_id[-1]) % 4)


def predict(run: Run, engine: Engine, max_live: int = 3, n: int | None = None, max_prompt: int = 60) -> list[str]:
  """Names of the first n predictions, all by default."""
  return list(itertools.islice(run.predict(engine, BYTES, max_prompt, chat=False, max_live=max_live), n))


def lines_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
  return {f.stem: [json.loads(x) for x in f.read_text("utf-8").split("\n")[:-1]] for f in folder.glob("*.jsonl")}


def test_predictions_stand_in_the_official_format_and_order(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=7, qasper_e=3, lcc=2))
  (tmp_path / "out").mkdir()
  run = Run(release, ["qasper", "qasper_e", "lcc", "qasper"], tmp_path / "out")
  assert (run.n_rows, run.n_done) == (12, 0)
  engine = scripted(said)
  assert sorted(predict(run, engine)) == ["lcc"] * 2 + ["qasper"] * 7 + ["qasper_e"] * 3 and not run.errors
  written = lines_of(tmp_path / "out")
  for name, n in (("qasper", 7), ("qasper_e", 3), ("lcc", 2)):
    limit = MAX_NEW[name.removesuffix("_e")]
    assert written[name] == [
      {
        "pred": said(f"{name}-{i}")[:limit],
        "answers": [f"barge {i}"],
        "all_classes": ["barge", "pier"],
        "length": 1000 * i,
      }
      for i in range(n)
    ]
  prompts = engine._executor.prompts
  assert prompts["qasper-0"] == "Paper: barge 0 \n\n Question: which 0?\nAnswer:"
  assert len(prompts["qasper-6"]) == 59 and prompts["qasper-6"].endswith("Question: which 6?\nAnswer:")  # cut


def test_a_prediction_waits_for_those_before_it(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=3))
  out = tmp_path / "out"
  out.mkdir()
  seen = []
  answers = {"qasper-0": "long", "qasper-1": "", "qasper-2": "so"}
  for _ in Run(release, ["qasper"], out).predict(scripted(answers.get), BYTES, 60, chat=False, max_live=3):
    seen.append([row["pred"] for row in lines_of(out).get("qasper", [])])
  assert seen == [[], [], ["long", "", "so"]]


def test_text_is_written_as_it_is(tmp_path):
  """Not escaped, as the official rows; a line separator of Unicode ends no line."""
  release = Release.read(write_release(tmp_path / "bench"))
  jsonl.write(tmp_path / "bench" / "data" / "qasper.jsonl", [row_of(0, answers=["港\u2028"], all_classes=None)])
  (tmp_path / "out").mkdir()
  predict(Run(release, ["qasper"], tmp_path / "out"), scripted(lambda _: "é\n"))
  line = '{"pred": "é\\n", "answers": ["港\u2028"], "all_classes": null, "length": 0}\n'
  assert (tmp_path / "out" / "qasper.jsonl").read_bytes() == line.encode()
  assert Run(release, ["qasper"], tmp_path / "out").n_done == 1


def test_a_newline_ends_samsum_and_nothing_that_ends_it_comes_first(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", samsum=4, samsum_e=1, trec=1))
  (tmp_path / "out").mkdir()
  answers = {"samsum-0": "ab\ncd", "samsum-1": "\nab\ncd", "samsum-2": "$ab$cd", "samsum-3": "\n\nab"}
  answers |= {"samsum_e-0": "\nx\ny", "trec-0": "\na\nb$"}
  predict(Run(release, ["samsum", "samsum_e", "trec"], tmp_path / "out"), scripted(answers.get))
  preds = {name: [row["pred"] for row in rows] for name, rows in lines_of(tmp_path / "out").items()}
  assert preds == {"samsum": ["ab", "_ab", "_ab", "_"], "samsum_e": ["_x"], "trec": ["\na\nb"]}


def test_few_prompts_are_read_ahead(tmp_path, monkeypatch):
  """And the engine is kept busy: as many requests as are allowed, in one batch."""
  release = Release.read(write_release(tmp_path / "bench", qasper=9))
  (tmp_path / "out").mkdir()
  read, ended, live = [], 0, []
  prompt = Release.prompt
  monkeypatch.setattr(Release, "prompt", lambda *a: read.append(a) or prompt(*a))
  engine = scripted(said)
  for _ in Run(release, ["qasper"], tmp_path / "out").predict(engine, BYTES, 60, chat=False, max_live=3):
    ended += 1
    live.append(len(read) - ended)
  assert max(live) == 2 and len(read) == ended == 9  # a moment after one of three has ended


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
  """On the tiny random model, whose predictions are noise: greedy, whoever else is in the batch."""
  release = Release.read(write_release(tmp_path / "bench", qasper=5, trec_e=3, samsum=3))
  names = ["qasper", "trec_e", "samsum"]
  model, config = load_model("random:tiny"), override(load_config("sparse_serve"), SMALL_SERVING)
  executor = JaxExecutor(config, model)
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  whole.mkdir()
  parts.mkdir()
  assert len(predict(Run(release, names, whole), Engine(executor), max_live=4)) == 11

  for n in (2, 4):
    engine = Engine(executor)
    assert len(predict(Run(release, names, parts), engine, max_live=4, n=n)) == n
    engine.cancel_all()
    engine.run()
    with max(parts.iterdir(), key=lambda file: file.stat().st_mtime_ns).open("a") as file:
      file.write('{"pred": "killed while it wr')
  run = Run(release, names, parts)
  assert run.n_rows == 11 and 0 < run.n_done <= 6
  assert len(predict(run, Engine(executor), max_live=2)) == 11 - run.n_done
  assert [file.read_bytes() for file in sorted(parts.iterdir())] == [f.read_bytes() for f in sorted(whole.iterdir())]
  assert len({row["pred"] for row in lines_of(parts)["qasper"]}) > 2


def test_a_limit_that_grows(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=5))
  (tmp_path / "out").mkdir()
  for limit, n_done, n_rows in ((2, 0, 2), (4, 2, 4), (1, 1, 1), (None, 4, 5)):
    run = Run(release, ["qasper"], tmp_path / "out", limit)
    assert (run.n_done, run.n_rows) == (n_done, n_rows)
    assert len(predict(run, scripted(said))) == n_rows - n_done
  assert [row["pred"][0] for row in lines_of(tmp_path / "out")["qasper"]] == list("01234")


def test_what_is_wrong_with_a_task_is_reported_and_the_rest_runs(tmp_path):
  bench = write_release(tmp_path / "bench", qasper=3, samsum=3, trec=4, lcc=3)
  data, out = bench / "data", tmp_path / "out"
  with (data / "samsum.jsonl").open("a") as file:
    file.write('\n{"context":}\n')
  rows = [row_of(0), row_of(1), row_of(2)]
  del rows[1]["length"]
  jsonl.write(data / "lcc.jsonl", rows)
  jsonl.write(data / "trec.jsonl", [row_of(0), row_of(1, context="x" * 700), row_of(2)])
  out.mkdir()
  run = Run(Release.read(bench), ["samsum", "hotpotqa", "qasper", "trec_e", "lcc", "qaspr", "trec"], out)
  predict(run, scripted(said), max_prompt=900)
  n = len(TEMPLATES["trec"].format(**row_of(1, context="x" * 700))) + 1
  assert run.errors == {
    "hotpotqa": f"{bench / 'config' / 'dataset2prompt.json'}: nothing for task 'hotpotqa'",
    "trec_e": f"{data / 'trec_e.jsonl'} is missing",
    "qaspr": "LongBench has no task 'qaspr'; the nearest is 'qasper'",
  }
  found = lines_of(out)
  assert {name: len(rows) for name, rows in found.items()} == {"qasper": 3, "samsum": 4, "lcc": 3, "trec": 3}
  wrong = {(name, i): row["error"] for name, rows in found.items() for i, row in enumerate(rows) if "error" in row}
  assert wrong == {
    ("samsum", 3): f"{data / 'samsum.jsonl'}:5: not JSON: Expecting value, column 12",
    ("lcc", 1): f"{data / 'lcc.jsonl'}:2: the row lacks 'length'",
    ("trec", 1): f"{data / 'trec.jsonl'}:2: request 'trec-1': {n} prompt + 5 output tokens = {n + 5}, but only 384 "
    "tokens would fit (the context, or the pool of 256 blocks of 8)",
  }
  assert found["samsum"][3] == {"pred": "", "answers": [], "all_classes": None, "length": None} | {
    "error": wrong["samsum", 3]
  }
  scores, errors = longbench.score_folder(out)
  assert scores["samsum"].n_rows == 4 and errors.keys() == {"samsum", "lcc", "trec"}
  with pytest.raises(ValueError, match=r"samsum\.jsonl:5: not JSON"):
    predict(Run(Release.read(bench), ["samsum"], tmp_path / "out", strict=True), scripted(said))

  del rows[0]["input"]
  jsonl.write(data / "trec.jsonl", rows)
  (out / "trec.jsonl").unlink()
  run = Run(Release.read(bench), ["trec"], out)
  predict(run, scripted(said))
  assert lines_of(out)["trec"][0]["error"] == f"{data / 'trec.jsonl'}:1: the row lacks 'input'" and not run.errors


def test_half_of_a_character_ends_its_row_alone(tmp_path):
  """An empty prediction with its error keeps the lines in step; the row is tried again until it is mended."""
  bench = write_release(tmp_path / "bench", qasper=4, trec=2)
  release, data, out = Release.read(bench), bench / "data" / "qasper.jsonl", tmp_path / "out"
  out.mkdir()
  rows = [row_of(0), row_of(1, context="half \ud83d"), row_of(2), row_of(3, answers=["\ud83d"])]
  jsonl.write(data, rows, ensure_ascii=True)
  names, error = ["qasper", "trec"], f"{data}:2: 'context' has the lone surrogate '\\ud83d' at character 5"
  run = Run(release, names, out)
  assert sorted(predict(run, scripted(said))) == ["qasper"] * 2 + ["trec"] * 2 and not run.errors
  written = lines_of(out)["qasper"]
  assert [row["pred"] for row in written] == [said("qasper-0"), "", said("qasper-2")[: MAX_NEW["qasper"]], ""]
  assert [row.get("error") for row in written[:3]] == [None, error, None]
  assert written[3]["error"].startswith(f"{data}:4: 'answers' has the lone surrogate")
  assert [row["answers"] for row in written] == [row["answers"] for row in rows]

  scores, errors = longbench.score_folder(out)
  assert scores["qasper"].n_rows == 4 and len(scores["qasper"].errors) == 2 and "trec" in scores
  assert errors == {"qasper": f"2 of 4 rows have no prediction and count as empty ones, the first for: {error}"}

  before = (out / "qasper.jsonl").read_bytes()
  run = Run(release, names, out)
  assert (run.n_rows, run.n_done) == (6, 4) and predict(run, scripted(said)) == []
  assert (out / "qasper.jsonl").read_bytes() == before
  jsonl.write(data, [row_of(i) for i in range(4)])
  assert predict(Run(release, names, out), scripted(said)) == ["qasper"] * 2
  assert [row["pred"] for row in lines_of(out)["qasper"]] == [
    said(f"qasper-{i}")[: MAX_NEW["qasper"]] for i in range(4)
  ]
  assert longbench.score_folder(out)[1] == {} and [file.suffix for file in out.iterdir()] == [".jsonl"] * 2


def test_what_is_served_is_what_is_evaluated(tmp_path):
  """One reader: a workload's requests are those of a run, token by token."""
  bench, out = write_release(tmp_path / "bench", qasper=5, samsum=2, trec_e=2), tmp_path / "out"
  out.mkdir()
  engine = scripted(said)
  names, asked, add = ("qasper", "samsum", "trec_e"), [], engine.add_request

  def spied(prompt, max_new_tokens, *, request_id, **options):
    asked.append((request_id, list(prompt), max_new_tokens, options))
    return add(prompt, max_new_tokens, request_id=request_id, **options)

  engine.add_request = spied
  release = Release.read(bench)
  room = release.room_for_prompts(BYTES, 120, chat=True)
  list(Run(release, names, out).predict(engine, BYTES, room, chat=True, max_live=3))
  items = workloads.read(WorkloadConfig("longbench", path=str(bench), tasks=names))(BYTES, 120)
  assert asked == [(item.id, item.prompt.tolist(), item.max_new_tokens, item.options) for item in items]
  assert len(asked) == 9 and max(len(prompt) for _, prompt, _, _ in asked) > room  # some were cut


def test_predictions_for_other_rows_are_no_beginning(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=3, lcc=2))
  out = tmp_path / "out"
  out.mkdir()
  predict(Run(release, ["qasper"], out, limit=2), scripted(said))
  jsonl.write(tmp_path / "bench" / "data" / "qasper.jsonl", [row_of(0), row_of(1, answers=["other"]), row_of(2)])
  run = Run(release, ["qasper", "lcc"], out)
  assert predict(run, scripted(said)) == ["lcc", "lcc"]
  data = tmp_path / "bench" / "data" / "qasper.jsonl"
  assert run.errors == {"qasper": f"{data}:2: line 2 of {out / 'qasper.jsonl'} is a prediction for another row"}


def test_the_digest_tells_releases_apart(tmp_path):
  first = Release.read(write_release(tmp_path / "a"))
  assert first.digest == Release.read(write_release(tmp_path / "b")).digest
  (tmp_path / "b" / "config" / "dataset2maxlen.json").write_text(json.dumps(MAX_NEW | {"lcc": 5}))
  assert first.digest != Release.read(tmp_path / "b").digest


# ----------------------------------------------------------------------------------------------------- the command line


start = functools.partial(forks.start, "experiments.longbench")


@pytest.mark.slow
def test_the_program(tmp_path):
  bench, out = write_release(tmp_path / "bench", qasper=3, trec_e=2, lcc=2), tmp_path / "out"
  small = [f"--set={assignment}" for assignment in SMALL_SERVING]
  arguments = [f"--longbench_dir={bench}", "--config=sparse_serve", f"--out={out}", *small]
  done = start(*arguments, "--tasks=qasper,trec_e,samsum", "--limit=2")
  assert done.returncode == 1, done.stderr
  assert done.stderr.splitlines() == [f"error: samsum: {bench / 'data' / 'samsum.jsonl'} is missing"]
  *table, last = done.stdout.splitlines()
  printed = json.loads(last)
  result = json.loads((out / "result.json").read_text())
  assert printed["scores"] == result and list(result) == ["qasper", "trec_e"]
  assert printed["rows"] == {"qasper": 2, "trec_e": 2} and list(printed["errors"]) == ["samsum"]
  assert table[0].split() == ["score", "rows", *longbench.BINS]
  assert [line.split()[0] for line in table[1:]] == [*result, "unofficial:"] and not printed["averages"]
  assert table[-1].split(": ")[1].split("; ") == printed["unofficial"]
  setting = json.loads((out / "run.json").read_text())["setting"]
  assert setting["config"]["scheduler"]["max_context"] == 384 and setting["model"]["name"] == "random:tiny"
  room = 384 - max(MAX_NEW.values()) - SLACK - len("<user>\n<assistant>")
  assert setting["prompts"]["max_tokens"] == room and setting["prompts"]["chat_template"] is True
  first = {file.name: file.read_bytes() for file in out.glob("*.jsonl")}
  assert first["qasper.jsonl"].count(b"\n") == 2

  done = start(*arguments, "--tasks=qasper,lcc")  # the same, and more of it
  assert done.returncode == 0 and not done.stderr, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["rows"] == {"qasper": 3, "lcc": 2, "trec_e": 2}
  assert (out / "qasper.jsonl").read_bytes().startswith(first["qasper.jsonl"])
  assert (out / "trec_e.jsonl").read_bytes() == first["trec_e.jsonl"]

  done = start(*arguments, "--tasks=lcc", "--set=sparse.token_budget=64", "--nochat_template")
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == (
    f"error: {out} holds another run, choose another folder: "
    "config.sparse.token_budget was 384 and is 64; prompts.max_tokens was 326 and is 344; "
    "prompts.chat_template was True and is False\n"
  )


def test_scoring_alone_needs_no_jax(tmp_path):
  jsonl.write(tmp_path / "qasper.jsonl", [predicted("old mill", "mill"), predicted("a mill", "mill")])
  jsonl.write(tmp_path / "lcc.jsonl", [predicted("XYZa1b2c3d4", "a5b6c7d8XYZ")])
  jsonl.write(tmp_path / "lcc_e.jsonl", [predicted("x", "x", length=5000)])
  before = sorted(tmp_path.iterdir())
  program = (
    "import sys, runpy; sys.modules['jax'] = None; runpy.run_module('experiments.longbench', run_name='__main__')"
  )

  def score(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, f"--score_only={tmp_path}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

  done = score("--code_sim=indel")
  assert done.returncode == 0 and not done.stderr, done.stderr
  printed = json.loads(done.stdout.splitlines()[-1])
  assert printed["scores"] == {"qasper": 83.33, "lcc": 36.0, "lcc_e": {"0-4k": None, "4-8k": 100.0, "8k+": None}}
  assert printed["rows"] == {"qasper": 2, "lcc": 1, "lcc_e": 1} and printed["averages"] == {}
  assert printed["unofficial"] == [
    *("2 of the 21 tasks of LongBench", "1 of the 13 tasks of LongBench-E", "2 rows of qasper, which has 200"),
    *("1 rows of lcc, which has 500", "1 rows of lcc_e, which has 300", "code compared by indel"),
  ]
  assert sorted(tmp_path.iterdir()) == before

  (tmp_path / "trec.jsonl").write_text("{}\n")
  out = tmp_path / "scores"
  done = score(f"--out={out}")
  assert done.returncode == 1
  assert done.stderr == f"error: trec: {tmp_path / 'trec.jsonl'}:1: the row lacks 'all_classes'\n"
  assert json.loads((out / "result.json").read_text()) == {**printed["scores"], "lcc": 27.0}


def test_predictions_of_v1_are_not_written_where_they_are_read_as_e(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=2, qasper_e=2))
  out = tmp_path / "pred_e" / "llama"
  out.mkdir(parents=True)
  run = Run(release, ["qasper", "qasper_e"], out)
  assert predict(run, scripted(said)) == ["qasper_e"] * 2 and list(lines_of(out)) == ["qasper_e"]
  assert run.errors == {"qasper": f"{out}: qasper.jsonl in a folder pred_e is read as qasper_e: choose another folder"}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--longbench_dir and --out are needed, or --score_only"),
    (["--score_only=absent", "--out="], "flag --out=: a folder needs a name"),
    (["--score_only=absent"], "--score_only: absent is no folder"),
    (["--longbench_dir=absent", "--out=absent"], "dataset2prompt.json is missing"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message):
  done = start(*arguments)
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line
