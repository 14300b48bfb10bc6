"""The command that serves a workload: what it writes and prints, what it goes on with, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from sparse_serve_jax import tasks
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands import run as serve
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.models import ByteTokenizer, load_model
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.workloads import ArrivalConfig, arrival_times
from tests import jsonl
from tests.test_timeline import check_form, slices
from tests.tiny import SMALL_SERVING

SMALL = [f"--set={assignment}" for assignment in SMALL_SERVING] + ["--ignore_eos", "--max_new_tokens=6"]
NEEDLES = ["--workload=needle", "--prompt_tokens=300", "--limit=6"]
pytestmark = pytest.mark.usefixtures("not_configured")


def in_process(*arguments: str, small: list[str] = SMALL) -> int:
  """`python -m experiments.serve`, but for the process. Returns the exit status."""
  with flagsaver.flagsaver():
    flags.FLAGS(["serve", *small, *arguments])
    try:
      with cli.endings(serve._VERBOSE.value, ""):
        return serve.main()
    except SystemExit as ended:
      assert isinstance(ended.code, int)
      return ended.code


def rows_of(folder: Path) -> list[dict]:
  return jsonl.read(folder / "requests.jsonl")


@pytest.fixture
def no_model(monkeypatch):
  """Whoever loads a model fails."""

  def load(*_, **__):
    raise AssertionError("a model is loaded")

  monkeypatch.setattr(serve, "load_model_here", load)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_row_for_every_request(tmp_path, capsys):
  """Times stand in the order in which things happened; two runs give the same tokens."""
  for name in ("one", "two"):
    assert in_process(*NEEDLES, "--rate=200", f"--out={tmp_path / name}") == 0
  rows = rows_of(tmp_path / "one")
  assert {row["request_id"] for row in rows} == {f"needle-{i}" for i in range(6)}
  arrivals = {row["request_id"]: row["arrival_s"] for row in rows}
  assert arrivals["needle-0"] > 0 and sorted(arrivals.values()) == [arrivals[f"needle-{i}"] for i in range(6)]
  for row in rows:
    assert (row["finish_reason"], len(row["output_token_ids"]), len(row["token_s"])) == ("length", 6, 6)
    assert 160 < row["prompt_tokens"] <= 293
    assert row["text"] == ByteTokenizer().decode(row["output_token_ids"])
    times = [row["arrival_s"], row["scheduled_s"], row["first_token_s"], *row["token_s"], row["finish_s"]]
    assert times == sorted(times) and row["token_s"][0] == row["first_token_s"]
  tokens = [{row["request_id"]: row["output_token_ids"] for row in rows_of(tmp_path / n)} for n in ("one", "two")]
  assert tokens[0] == tokens[1]
  (part,) = json.loads((tmp_path / "one" / "run.json").read_text())["parts"]
  assert 0 < part["sizes"]["cache.dram_bytes"] <= 2**30 and part["sizes"]["scheduler.max_context"] >= 293 + 6
  summary = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert summary["requests"] == 6 and summary["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)

  trace = json.loads((tmp_path / "one" / "timeline.json").read_text())
  check_form(trace)
  assert [slices(trace, 2, line)[-1][0] for line in range(1, 7)] == ["decode"] * 6


def test_audits_are_told_and_written(tmp_path, capsys):
  psa = ["--set=sparse.policy=psa", "--set=sparse.threshold=auto:0.6", "--set=sparse.audit=0.1"]
  assert in_process(*NEEDLES, *psa, "--max_new_tokens=16", f"--out={tmp_path / 'out'}") == 0
  table, told = (said := capsys.readouterr().out).split("{")[0], json.loads(said.splitlines()[-1])
  rows = jsonl.read(tmp_path / "out" / "audits.jsonl")
  stops = [share for row in rows for share, n in zip(row["true_share"], row["unread_blocks"], strict=True) if n]
  assert told["audited_stops"] == len(stops) > 0 and told["audits"] <= len(rows)
  assert 0 < told["audit_blocks"] <= 0.1 * told["blocks_attended"]
  assert told["audit_true_share"] == pytest.approx(sum(map(sum, stops)) / sum(map(len, stops)), abs=1e-5)
  assert rows[0]["threshold"] == pytest.approx(0.6) and told["psa_threshold"] != pytest.approx(0.6)
  assert "audit_kept_share" in table and {row["request_id"] for row in rows} <= {f"needle-{i}" for i in range(6)}


def test_what_cannot_run_is_refused_and_the_rest_runs(tmp_path, capsys):
  """A file of prompts needs no --workload."""
  prompts = [
    {"request_id": "long", "prompt": "x" * 500},
    {"request_id": "good", "prompt": "A good one.", "max_new_tokens": 4},
    {"request_id": "foreign", "prompt_token_ids": [1, 2, 99999]},
    {"prompt_token_ids": [5, 6, 7], "max_new_tokens": 40},
    {"request_id": "half", "prompt": "half \ud83d"},
    {"request_id": "begin", "prompt": "", "max_new_tokens": 1},
    {"request_id": "empty", "prompt": "", "add_special_tokens": False},
  ]
  file = jsonl.write(tmp_path / "in.txt", prompts, ensure_ascii=True)
  assert in_process(f"--jsonl={file}", f"--out={tmp_path / 'out'}") == 1
  said = capsys.readouterr()
  summary = json.loads(said.out.splitlines()[-1])
  assert (summary["requests"], summary["refused"], summary["output_tokens"]) == (3, 4, 4 + 6 + 1)
  rows = {row["request_id"]: row for row in rows_of(tmp_path / "out")}
  assert set(rows) == {"long", "good", "foreign", "line-4", "half", "begin", "empty"}
  refused = ("half", "long", "foreign", "empty")
  assert [rows[name]["finish_reason"] for name in refused] == ["refused"] * 4
  assert "501 prompt + 6 output tokens = 507, but only 384 tokens would fit" in rows["long"]["error"]
  assert (
    "99999 at position 2" in rows["foreign"]["error"]
    and f"{file}:5: 'prompt' has the lone surrogate" in rows["half"]["error"]
  )
  refusals = [line for line in said.err.splitlines() if line.startswith("refused: ")]
  assert refusals == [f"refused: {rows[name]['error']}" for name in refused]  # each is told once
  assert rows["begin"]["prompt_tokens"] == 1 and "the prompt is empty" in rows["empty"]["error"]

  config, model = override(load_config("sparse_serve"), SMALL_SERVING), load_model("random:tiny")
  assert in_process(f"--jsonl={file}", f"--out={tmp_path / 'out'}") == 1  # nothing is left, and four have no answer

  engine = Engine(JaxExecutor(config, model))
  request = engine.add_request(ByteTokenizer().encode("A good one."), 4, ignore_eos=True)
  engine.run()
  assert rows["good"]["output_token_ids"] == request.output_tokens


def test_compiling_is_told_where_it_is_in_the_times(capsys, monkeypatch):
  monkeypatch.setattr(serve, "TOLD_S", 0.0)
  with serve._compiling_told():
    jax.jit(lambda x: x * 16.0 + 11.0)(np.ones(7)).block_until_ready()
  assert re.fullmatch(
    r"times hold \d+\.\d s in which 1 programs were compiled, or found compiled\n", capsys.readouterr().err
  )
  monkeypatch.setattr(serve, "TOLD_S", 1e-9)
  with serve._compiling_told():
    pass
  assert not capsys.readouterr().err


def test_answers_are_judged_where_there_is_a_judge(tmp_path, capsys, monkeypatch):
  """By the text that their row has, next to what was to be answered."""
  for name, factor in (("single_text", 1), ("key_value", 100)):
    judge = lambda text, made, factor=factor: factor * len(text) / len(made.answers)  # noqa: E731
    monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(tasks.TASKS[name], score=judge))
  workload = {"source": "needle", "tasks": ["single_text", "key_value"], "limit": 3, "prompt_tokens": 300}
  (tmp_path / "w.json").write_text(json.dumps(workload))
  assert in_process(f"--workload={tmp_path / 'w.json'}", f"--out={tmp_path / 'out'}") == 0
  rows = {row["request_id"]: row for row in rows_of(tmp_path / "out")}
  assert [rows[f"needle-{i}"]["task"] for i in range(3)] == ["single_text", "key_value", "single_text"]
  made = tasks.make("key_value", 300, 1, ByteTokenizer(), split="eval")
  assert rows["needle-1"]["answers"] == list(made.answers)
  for i, factor in enumerate([1, 100, 1]):
    assert rows[f"needle-{i}"]["score"] == factor * len(rows[f"needle-{i}"]["text"]) > 0
  said = capsys.readouterr().out.splitlines()
  scores = [row["score"] for row in rows.values()]
  assert json.loads(said[-1])["score_mean"] == sum(scores) / 3 and said[-2].startswith("score_mean ")

  file = jsonl.write(tmp_path / "in.txt", [{"prompt": "not judged"}])
  assert in_process(f"--jsonl={file}", f"--out={tmp_path / 'other'}") == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["score_mean"] is None
  assert "score" not in rows_of(tmp_path / "other")[0]


def test_a_trace_is_served_as_it_came(tmp_path, capsys):
  """Its lengths, and its times unless there is a rate; what is too long is refused."""
  file = tmp_path / "trace.csv"
  lengths = [(40, 3), (200, 2), (900, 1), (40, 5)]
  lines = [f"2023-11-16 18:17:0{i * 0.2:.7f},{n},{m}\n" for i, (n, m) in enumerate(lengths)]
  file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
  small = [flag for flag in SMALL if flag not in ("--ignore_eos", "--max_new_tokens=6")]

  def run(name: str, *more: str) -> dict[str, dict]:
    status = in_process(f"--trace={file}", f"--out={tmp_path / name}", *more, small=small)
    rows = {row["request_id"]: row for row in rows_of(tmp_path / name)}
    assert status == any(row["finish_reason"] == "refused" for row in rows.values())
    return rows

  rows = run("trace")
  ended = [rows[f"trace-{i}"] for i in (0, 1, 3)]
  assert [(row["prompt_tokens"], len(row["output_token_ids"])) for row in ended] == [(40, 3), (200, 2), (40, 5)]
  assert [row["arrival_s"] for row in ended] == pytest.approx([0, 0.2, 0.6], abs=0.01)
  assert rows["trace-2"]["finish_reason"] == "refused" and rows["trace-2"]["prompt_tokens"] == 900
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["output_tokens"] == 3 + 2 + 5
  setting = json.loads((tmp_path / "trace" / "run.json").read_text())["setting"]
  assert setting["prompts"] and setting["workload"]["path"] == str(file)

  named = {"source": "trace", "arrivals": {"process": "trace", "options": {"path": str(file)}}}
  (tmp_path / "named.json").write_text(json.dumps(named))
  fewer = (f"--workload={tmp_path / 'named.json'}", "--rate=50", "--limit=3")
  poisson = run("poisson", *fewer, "--prompt_tokens=100", "--max_new_tokens=2")
  assert [poisson[f"trace-{i}"]["prompt_tokens"] for i in range(3)] == [40, 100, 100]
  expected = arrival_times(ArrivalConfig("poisson", 50.0), 3)
  assert [poisson[f"trace-{i}"]["arrival_s"] for i in range(3)] == pytest.approx(expected, abs=1e-3)

  (tmp_path / "twice.json").write_text('{"source": "trace", "arrivals": {"process": "trace", "rate": 1}}')
  twice = run("twice", f"--workload={tmp_path / 'twice.json'}", "--rate=10", "--prompt_tokens=100", "--seed=4")
  assert [twice[f"trace-{i}"]["arrival_s"] for i in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3], abs=0.01)
  assert json.loads((tmp_path / "twice" / "run.json").read_text())["setting"]["workload"]["seed"] == 4


def test_all_refused(tmp_path, capsys):
  file = jsonl.write(tmp_path / "in.txt", [{"prompt": "x" * 500}, {"prompt": "y" * 500}])
  assert in_process(f"--jsonl={file}", f"--out={tmp_path / 'out'}") == 1
  summary = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (summary["requests"], summary["refused"], summary["hbm_hit_rate"]) == (0, 2, None)
  assert in_process(f"--jsonl={file}", f"--out={tmp_path / 'out'}") == 1  # nothing is left to do, and nothing was done
  again = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert again.keys() == summary.keys() and (again["requests"], again["refused"], again["ttft_mean_s"]) == (0, 2, None)


# ----------------------------------------------------------------------------------------------------- going on with it


def interrupted_after(rows: int, file: Path, step) -> Iterator:
  """As `step`, until the file has so many rows."""

  def stepping(self: Engine):
    if file.exists() and len(file.read_text().splitlines()) >= rows:
      raise KeyboardInterrupt
    return step(self)

  return stepping


def test_an_interrupted_run_keeps_its_rows_and_is_gone_on_with(tmp_path, capsys, monkeypatch):
  file = tmp_path / "requests.jsonl"
  command = [*NEEDLES, f"--out={tmp_path}", "--set=cache.lanes=1"]
  with monkeypatch.context() as patch:
    patch.setattr(Engine, "step", interrupted_after(2, file, Engine.step))
    assert in_process(*command) == 130
  first = file.read_text()
  assert len(rows_of(tmp_path)) == 2 and capsys.readouterr().err.splitlines()[-1] == "interrupted"
  check_form(json.loads((tmp_path / "timeline.json").read_text()))

  with file.open("a") as torn:
    torn.write('{"request_id": "needle-4", "outp')  # as a process that was killed leaves it
  assert in_process(*command) == 0
  said = capsys.readouterr()
  assert file.read_text().startswith(first)
  assert sorted(row["request_id"] for row in rows_of(tmp_path)) == [f"needle-{i}" for i in range(6)]
  assert json.loads(said.out.splitlines()[-1])["requests"] == 4
  assert f"2 requests had rows in {tmp_path} before; the numbers are of the others" in said.err
  assert (tmp_path / "timeline-after-2.json").is_file()
  assert len(json.loads((tmp_path / "run.json").read_text())["parts"]) == 2

  whole = file.read_bytes()
  monkeypatch.setattr(serve, "load_model_here", None)  # nothing is loaded for this
  assert in_process(*command) == 0
  said, rows = capsys.readouterr(), rows_of(tmp_path)
  assert file.read_bytes() == whole
  told = json.loads(said.out.splitlines()[-1])
  assert told["requests"] == 6 and told["output_tokens"] == sum(len(row["output_token_ids"]) for row in rows)
  assert told["ttft_mean_s"] == pytest.approx(sum(row["first_token_s"] - row["arrival_s"] for row in rows) / 6)
  assert told["score_mean"] == sum(row["score"] for row in rows) / 6 and told["throughput_tok_s"] is None
  assert f"nothing is left to run: all 6 requests have rows in {tmp_path}" in said.err
  assert not (tmp_path / "timeline-after-6.json").exists()

  monkeypatch.undo()
  run = json.loads((tmp_path / "run.json").read_text())
  for part in run["parts"]:  # as before it was noted how many there are
    part.pop("requests", None)
  (tmp_path / "run.json").write_text(json.dumps(run))
  assert in_process(*command) == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == told and file.read_bytes() == whole


def test_another_runs_folder_is_refused_with_the_difference(tmp_path, capsys, monkeypatch):
  prompts = jsonl.write(tmp_path / "in.txt", [{"prompt": "one"}])
  command = [f"--jsonl={prompts}", f"--out={tmp_path / 'out'}"]
  assert in_process(*command) == 0
  whole = (tmp_path / "out" / "requests.jsonl").read_bytes()
  monkeypatch.setattr(serve, "load_model_here", None)  # nothing is loaded for this
  for change, told in [
    (["--set=sparse.token_budget=64"], "config.sparse.token_budget was 384 and is 64"),
    (["--rate=2"], "workload.arrivals.process was 'all_at_once' and is 'poisson'"),
    (["--seed=3"], "seed was 0 and is 3"),
    (["--dtype=bfloat16"], "model.dtype was None and is 'bfloat16'"),
  ]:
    assert in_process(*command, *change) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds another run, choose another folder" in line and told in line
  jsonl.write(prompts, [{"prompt": "another"}])
  assert in_process(*command) == 2 and "prompts was " in capsys.readouterr().err
  assert (tmp_path / "out" / "requests.jsonl").read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--set=sparse.token_bugdet=64"], "unknown key 'sparse.token_bugdet'; the nearest is 'sparse.token_budget'"),
    (["--config=spars_serve"], "configs/serving has no 'spars_serve'; there are: dense"),
    (["--workload=needles"], "configs/workloads has no 'needles'; there are: jsonl"),
    (["--workload=longbench"], "a workload of longbench needs --longbench_dir"),
    (["--workload=longbench", "--longbench_dir=absent"], "dataset2prompt.json is missing"),
    (["--workload=jsonl"], "a workload of jsonl needs --jsonl"),
    (["--workload=trace"], "a workload of trace needs --trace"),
    (["--trace=absent.csv"], "absent.csv is missing"),
    (["--trace=a", "--workload=text"], "--trace is for a workload of trace, and text is one of text"),
    (["--jsonl=absent.txt"], "absent.txt is missing"),
    (["--jsonl=a", "--workload=needle"], "--jsonl is for a workload of jsonl, and needle is one of needle"),
    (["--jsonl=a", "--longbench_dir=b"], "--longbench_dir is for a workload of longbench, and jsonl is one of jsonl"),
    (["--rate=0"], "the rate of arrivals must be above 0"),
    (["--rate=inf"], "the rate of arrivals must be above 0 and finite, in requests a second, got inf"),
  ],
)
def test_mistakes_end_in_one_line_before_a_model_is_loaded(arguments, message, capsys, no_model):
  assert in_process(*arguments) == 2
  said = capsys.readouterr()
  (line,) = said.err.splitlines()
  assert line.startswith("error: ") and message in line and not said.out
  with pytest.raises((ValueError, OSError)):
    in_process(*arguments, "--verbose")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--set=cache.hbm_bytes=100"], "cache.hbm_bytes=100 is below the minimum of"),
    (["--model=random:huge"], "configs/models has no 'huge'; there are:"),
    (["--model=absent"], "'absent' is no model"),
    (
      ["--model=meta-llama/Llama-3.2-1B"],
      "nothing is downloaded. `hf download meta-llama/Llama-3.2-1B --local-dir DIR`",
    ),
    (["--set=sparse.dense_layers=99"], "sparse.dense_layers=99 is beyond the model's 4"),
    (["--set=scheduler.max_context=99999999"], "scheduler.max_context=99999999 is beyond the model's"),
  ],
)
def test_what_does_not_fit_the_model_ends_in_one_line(arguments, message, capsys):
  assert in_process(*arguments) == 2
  said = capsys.readouterr()
  (line,) = said.err.splitlines()
  assert line.startswith("error: ") and message in line and not said.out


@pytest.mark.parametrize(
  ("row", "fault"),
  [
    (b'{"request_id": "a", "prompt": "z"}', "the request_id 'a' is that of {file}:1 too"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 16 of the line"),
    (b'{"prompt": "half \\ud83d"}', "'prompt' has the lone surrogate '\\ud83d' at character 5"),
    (b'{"prompt": 5}', '"prompt" is a text, got 5'),
  ],
)
def test_a_row_that_is_wrong_is_told_before_a_model_is_loaded(tmp_path, capsys, no_model, row, fault):
  file = jsonl.write(tmp_path / "in.txt", [{"request_id": "a", "prompt": "x"}, {"prompt": "y"}])
  fault = fault.format(file=file)
  file.write_bytes(file.read_bytes() + row)
  with pytest.raises(AssertionError, match="a model is loaded"):  # for the other rows
    in_process(f"--jsonl={file}")
  assert capsys.readouterr().err == f"refused: {file}:3: {fault}\n"
  assert in_process(f"--jsonl={file}", "--strict") == 2
  assert capsys.readouterr().err == f"error: {file}:3: {fault}\n"


def test_a_byte_order_mark_is_no_part_of_the_prompts(tmp_path, capsys, no_model):
  file = jsonl.write(tmp_path / "in.txt", [{"prompt": "x"}])
  file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
  with pytest.raises(AssertionError, match="a model is loaded"):
    in_process(f"--jsonl={file}", "--strict")
  assert in_process(f"--jsonl={tmp_path}") == 2
  assert capsys.readouterr().err == f"error: {tmp_path} is a directory, a file is wanted\n"
