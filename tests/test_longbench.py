"""LongBench: tasks, prompts, the run that predicts and goes on, scores of files, the command line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.evaluation import longbench, scorers
from sparse_serve_jax.evaluation.longbench import NAMES, TASKS, Release, Run, Score
from sparse_serve_jax.models import ByteTokenizer, load_model
from sparse_serve_jax.models.tokenizer import load_tokenizer
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Capacity, Plan, StepResult, StepStats
from tests.tiny import SMALL_SERVING

ROOT = Path(__file__).resolve().parent.parent
BYTES = ByteTokenizer()
BOS, EOS, NEWLINE = BYTES.bos_token_id, BYTES.eos_token_ids[0], 10
TEMPLATES = {
  "qasper": "Paper: {context}\n\n Question: {input}\nAnswer:",
  "samsum": "Examples.\n{context}\n\n{input}",
  "trec": "{context}\n{input}",
  "lcc": "{context}Next line:\n",
}
MAX_NEW = {"qasper": 6, "samsum": 8, "trec": 5, "lcc": 4}


def row_of(i: int, **changes: Any) -> dict[str, Any]:
  given = {"context": f"barge {i} " * (i + 1), "input": f"which {i}?", "answers": [f"barge {i}"]}
  return given | {"all_classes": ["barge", "pier"], "length": 1000 * i} | changes


def write_lines(file: Path, rows) -> None:
  file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_release(folder: Path, **n_rows: int) -> Path:
  """A folder in LongBench's layout, with so many self-written rows for each named file."""
  (folder / "config").mkdir(parents=True)
  (folder / "data").mkdir()
  (folder / "config" / "dataset2prompt.json").write_text(json.dumps(TEMPLATES))
  (folder / "config" / "dataset2maxlen.json").write_text(json.dumps(MAX_NEW))
  for name, n in n_rows.items():
    write_lines(folder / "data" / f"{name}.jsonl", [row_of(i) for i in range(n)])
  return folder


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_the_tasks():
  assert len(TASKS) == len(NAMES["all"]) == 21 and list(TASKS) == [task.name for task in TASKS.values()]
  extended = "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count"
  assert NAMES["all_e"] == [f"{name}_e" for name in [*extended.split(), "passage_retrieval_en", "lcc", "repobench-p"]]
  chosen = lambda wanted: {task.name for task in TASKS.values() if wanted(task)}  # noqa: E731
  assert chosen(lambda t: t.first_line) == {"trec", "triviaqa", "samsum", "lsht"}
  assert chosen(lambda t: not t.chat) == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
  assert chosen(lambda t: t.language == "zh") == set("multifieldqa_zh dureader vcsum lsht passage_retrieval_zh".split())
  assert chosen(lambda t: t.metric is scorers.rouge) == {"gov_report", "qmsum", "multi_news", "samsum"}
  assert chosen(lambda t: t.metric is scorers.rouge_zh) == {"dureader", "vcsum"}
  assert chosen(lambda t: t.metric is scorers.classification) == {"trec", "lsht"}
  assert longbench.find_task("lcc_e") is longbench.find_task("lcc") is TASKS["lcc"]


@pytest.mark.parametrize("name", ["qasperr", "musique_e", "_e", "all"])
def test_an_unknown_task(name):
  with pytest.raises(ValueError, match=f"LongBench has no task '{name}'; the nearest is '"):
    longbench.find_task(name)


# -------------------------------------------------------------------------------------------------------------- prompts


def sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def test_prompts_byte_by_byte(tmp_path):
  release = Release.read(write_release(tmp_path))
  row = row_of(2, context="{input} \u2028 港", input="é?\n")
  assert release.prompt("qasper", row) == "Paper: {input} \u2028 港\n\n Question: é?\n\nAnswer:"
  assert sha256(release.prompt("qasper", row))[:16] == "536a64d9c56cec46"
  assert release.prompt("lcc_e", row) == "{input} \u2028 港Next line:\n"


def test_prompts_of_the_official_templates(longbench_dir):
  config = longbench_dir / "config"
  official = {"dataset2prompt.json": "56d22ad4f382", "dataset2maxlen.json": "72966b3c0933"}
  for name, start in official.items():
    assert hashlib.sha256((config / name).read_bytes()).hexdigest().startswith(start)
  release = Release.read(longbench_dir)
  assert release.templates.keys() == release.max_new_tokens.keys() == TASKS.keys()
  prompts = [release.prompt(name, row_of(1, context="A\n barge.", input="Où?")) for name in TASKS]
  assert sha256("\0".join(prompts))[:16] == "500e2f63085fb0d6"
  asked = {name for name, prompt in zip(TASKS, prompts, strict=True) if "Où?" in prompt}
  assert TASKS.keys() - asked == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}


def test_the_middle_is_cut_as_text():
  """1 + 20 tokens; the halves are BOS with "abcd" and "pqrst". BOS is not text, and comes back by encoding."""
  text = "abcdefghijklmnopqrst"
  assert longbench.cut_middle(BYTES, text, 21) == text
  assert longbench.cut_middle(BYTES, text, 20) == "abcdefghi" + "klmnopqrst"
  assert longbench.cut_middle(BYTES, text, 11) == longbench.cut_middle(BYTES, text, 10) == "abcdpqrst"
  assert longbench.encode_prompt(BYTES, TASKS["trec"], text, 10, chat=True) == [BOS, *b"abcdpqrst"]
  assert longbench.cut_middle(BYTES, "ééé", 4) == "\ufffd" + "é"  # BOS and half of an é
  with pytest.raises(ValueError, match="max_tokens=1"):
    longbench.cut_middle(BYTES, text, 1)


@pytest.mark.parametrize("max_tokens", [2, 3, 8, 17, 40])
def test_the_middle_is_cut_by_the_tokenizers_own_tokens(max_tokens):
  """By the formula of the rules, with a tokenizer that merges."""
  tokenizer = load_tokenizer(ROOT / "tests" / "goldens" / "tokenizer")
  text = "the cat sat on the mat, and the other cat sat on the other mat."
  ids, half = tokenizer.encode(text), int(max_tokens / 2)
  expected = text
  if len(ids) > max_tokens:
    expected = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
  assert longbench.cut_middle(tokenizer, text, max_tokens) == expected
  assert (len(ids) > max_tokens) == (expected != text)


@pytest.mark.parametrize("name", TASKS)
def test_examples_and_code_go_without_the_chat_template(name):
  task = TASKS[name]
  raw, chat = (longbench.encode_prompt(BYTES, task, "0123456789", 6, chat) for chat in (False, True))
  assert raw == [BOS, *b"01789"]  # cut first
  assert chat == (list(b"<user>01789\n<assistant>") if task.chat else raw)


def test_room_for_prompts(tmp_path):
  release = Release.read(write_release(tmp_path))
  template = len("<user>\n<assistant>")
  assert release.room_for_prompts(BYTES, 1000, chat=False) == 1000 - max(MAX_NEW.values()) - longbench.SLACK
  assert release.room_for_prompts(BYTES, 1000, chat=True) == 1000 - max(MAX_NEW.values()) - longbench.SLACK - template
  with pytest.raises(
    ValueError, match="requests of 41 tokens have no room for a prompt beside 8 of output, 0 of a chat"
  ):
    release.room_for_prompts(BYTES, 41, chat=False)


# -------------------------------------------------------------------------------------------------------------- the run


class Script:
  """A device that says what it is told, a text for each request, then EOS."""

  def __init__(self, answer: Callable[[str], str], rows: int = 4):
    self.capacity = Capacity(256, 0, rows, 384, n_layers=1, n_kv_heads=1, block_bytes=1, fixed_hbm_bytes=0)
    self._answer = answer
    self.prompts: dict[str, str] = {}

  def submit(self, plan: Plan):
    for work in plan.prefill:
      self.prompts[work.request_id] = self.prompts.get(work.request_id, "") + BYTES.decode(work.tokens.tolist())
    tokens = {work.request_id: self._token(work.request_id, 0) for work in plan.prefill if work.last}
    tokens |= {row.request_id: self._token(row.request_id, row.step + 1) for row in plan.decode}
    return types.SimpleNamespace(result=lambda: StepResult(tokens, {}, StepStats()))

  def _token(self, request_id: str, i: int) -> int:
    said = [*self._answer(request_id).encode().replace(b"$", bytes([255]))]
    return {255: EOS}.get(said[i], said[i]) if i < len(said) else EOS

  def wait(self) -> None:
    pass


def small_config() -> EngineConfig:
  return override(load_config("dense"), [a for a in SMALL_SERVING if not a.startswith("cache.hbm_bytes")])


def scripted(answer: Callable[[str], str]) -> Engine:
  config = types.SimpleNamespace(vocab_size=BYTES.vocab_size)
  return Engine(small_config(), types.SimpleNamespace(config=config, eos_token_ids=(EOS,)), Script(answer))


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
  write_lines(tmp_path / "bench" / "data" / "qasper.jsonl", [row_of(0, answers=["港\u2028"], all_classes=None)])
  (tmp_path / "out").mkdir()
  predict(Run(release, ["qasper"], tmp_path / "out"), scripted(lambda _: "é\n"))
  line = '{"pred": "é\\n", "answers": ["港\u2028"], "all_classes": null, "length": 0}\n'
  assert (tmp_path / "out" / "qasper.jsonl").read_bytes() == line.encode()
  assert Run(release, ["qasper"], tmp_path / "out").n_done == 1


def test_a_newline_ends_samsum_but_not_as_its_first_token(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", samsum=4, samsum_e=1, trec=1))
  (tmp_path / "out").mkdir()
  answers = {"samsum-0": "ab\ncd", "samsum-1": "\nab\ncd", "samsum-2": "$ab$cd", "samsum-3": "\n\nab"}
  answers |= {"samsum_e-0": "\nx\ny", "trec-0": "\na\nb$"}
  predict(Run(release, ["samsum", "samsum_e", "trec"], tmp_path / "out"), scripted(answers.get))
  preds = {name: [row["pred"] for row in rows] for name, rows in lines_of(tmp_path / "out").items()}
  assert preds == {"samsum": ["ab", "\nab", "ab", "\n"], "samsum_e": ["\nx"], "trec": ["\na\nb"]}


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
  assert len(predict(Run(release, names, whole), Engine(config, model, executor), max_live=4)) == 11

  for n in (2, 4):
    engine = Engine(config, model, executor)
    assert len(predict(Run(release, names, parts), engine, max_live=4, n=n)) == n
    engine.cancel_all()
    engine.run()
    with max(parts.iterdir(), key=lambda file: file.stat().st_mtime_ns).open("a") as file:
      file.write('{"pred": "killed while it wr')
  run = Run(release, names, parts)
  assert run.n_rows == 11 and 0 < run.n_done <= 6
  assert len(predict(run, Engine(config, model, executor), max_live=2)) == 11 - run.n_done
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
  write_lines(data / "lcc.jsonl", rows)
  write_lines(data / "trec.jsonl", [row_of(0), row_of(1, context="x" * 700), row_of(2)])
  out.mkdir()
  run = Run(Release.read(bench), ["samsum", "hotpotqa", "qasper", "trec_e", "lcc", "qaspr", "trec"], out)
  predict(run, scripted(said), max_prompt=900)
  n = len(TEMPLATES["trec"].format(**row_of(1, context="x" * 700))) + 1
  assert run.errors == {
    "hotpotqa": f"{bench / 'config' / 'dataset2prompt.json'}: nothing for task 'hotpotqa'",
    "trec_e": f"{data / 'trec_e.jsonl'} is missing",
    "qaspr": "LongBench has no task 'qaspr'; the nearest is 'qasper'",
    "samsum": f"{data / 'samsum.jsonl'}:5: not JSON: Expecting value at column 12",
    "lcc": f"{data / 'lcc.jsonl'}:2: the row lacks 'length'",
    "trec": f"{data / 'trec.jsonl'}:2: request 'trec-1': {n} prompt + 5 output tokens = {n + 5}, but only 384 tokens "
    "would fit (context 384, pool 256 blocks of 8)",
  }
  assert {name: len(rows) for name, rows in lines_of(out).items()} == {"qasper": 3, "samsum": 3, "lcc": 1, "trec": 1}

  del rows[0]["input"]
  write_lines(data / "trec.jsonl", rows)
  (out / "trec.jsonl").unlink()
  run = Run(Release.read(bench), ["trec"], out)
  assert predict(run, scripted(said)) == []
  assert run.errors == {"trec": f"{data / 'trec.jsonl'}:1: the row lacks 'input'"}


def test_predictions_for_other_rows_are_no_beginning(tmp_path):
  release = Release.read(write_release(tmp_path / "bench", qasper=3, lcc=2))
  out = tmp_path / "out"
  out.mkdir()
  predict(Run(release, ["qasper"], out, limit=2), scripted(said))
  write_lines(tmp_path / "bench" / "data" / "qasper.jsonl", [row_of(0), row_of(1, answers=["other"]), row_of(2)])
  run = Run(release, ["qasper", "lcc"], out)
  assert predict(run, scripted(said)) == ["lcc", "lcc"]
  data = tmp_path / "bench" / "data" / "qasper.jsonl"
  assert run.errors == {"qasper": f"{data}:2: line 2 of {out / 'qasper.jsonl'} is a prediction for another row"}


@pytest.mark.parametrize("name", ["dataset2prompt.json", "dataset2maxlen.json"])
def test_a_release_without_a_config_file(tmp_path, name):
  (write_release(tmp_path) / "config" / name).unlink()
  with pytest.raises(ValueError, match=f"{name} is missing"):
    Release.read(tmp_path)


def test_the_digest_tells_releases_apart(tmp_path):
  first = Release.read(write_release(tmp_path / "a"))
  assert first.digest == Release.read(write_release(tmp_path / "b")).digest
  (tmp_path / "b" / "config" / "dataset2maxlen.json").write_text(json.dumps(MAX_NEW | {"lcc": 5}))
  assert first.digest != Release.read(tmp_path / "b").digest


# --------------------------------------------------------------------------------------------------------------- scores


def predicted(pred: str, *answers: str, classes: list[str] | None = None, length: int = 0) -> dict[str, Any]:
  return {"pred": pred, "answers": list(answers), "all_classes": classes, "length": length}


def score(folder: Path, name: str, *rows: dict[str, Any], **options: Any) -> Any:
  write_lines(folder / f"{name}.jsonl", rows)
  made = longbench.score_file(folder / f"{name}.jsonl", **options)
  assert made.n_rows == len(rows)
  return made.value


def test_a_score_is_the_mean_of_the_best_over_answers(tmp_path):
  rows = predicted("old mill", "barn", "mill", "a"), predicted("barge", "barge"), predicted("x", "y"), predicted("x")
  assert score(tmp_path, "qasper", *rows) == round(100 * (2 / 3 + 1) / 4, 2) == 41.67


def test_only_the_first_line_counts_in_few_shot_tasks(tmp_path, monkeypatch):
  rows = predicted("\n\nmill\nmill mill mill", "mill", classes=["mill"]), predicted("\n", "mill", classes=["mill"])
  assert score(tmp_path, "triviaqa", *rows) == score(tmp_path, "trec", *rows) == 50
  assert score(tmp_path, "qasper", *rows) == 20
  later = predicted("pier\nmill", "mill", classes=["mill"])
  assert score(tmp_path, "trec", later) == score(tmp_path, "samsum", later) == 0
  monkeypatch.setattr(longbench.Task, "first_line", False)
  assert score(tmp_path, "triviaqa", *rows) == 20 and score(tmp_path, "trec", later) == 100


def test_the_last_rows_classes_hold_for_all(tmp_path):
  rows = [predicted("mill", "mill", classes=["mill"]), predicted("mill pier", "pier", classes=["pier", "mill"])]
  assert score(tmp_path, "trec", *rows) == 75
  assert score(tmp_path, "trec", *rows[::-1]) == 50  # "pier" is no class then


def test_code_similarity_by_choice(tmp_path):
  row = predicted("XYZa1b2c3d4", "a5b6c7d8XYZ")
  assert (score(tmp_path, "lcc", row), score(tmp_path, "lcc", row, code_sim="indel")) == (27, 36)


def test_bins_of_longbench_e(tmp_path):
  lengths = (0, 3999, 4000, 7999, 8000, 90000)
  rows = [predicted("mill", "mill" if i % 3 else "pier", length=length) for i, length in enumerate(lengths)]
  assert score(tmp_path, "qasper_e", *rows) == {"0-4k": 50, "4-8k": 50, "8k+": 100}
  assert score(tmp_path, "qasper_e", *rows[:2]) == {"0-4k": 50, "4-8k": None, "8k+": None}
  assert score(tmp_path, "trec_e", predicted("\nmill\npier", "mill", classes=["mill", "pier"]))["0-4k"] == 100


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("requests", "", r"requests\.jsonl: LongBench has no task 'requests'"),
    ("qasper", "", r"qasper\.jsonl holds no predictions"),
    ("qasper", '{"pred": ""', r"qasper\.jsonl:1: not JSON"),
    ("qasper", '{"pred": "", "answers": []}\n{"answers": []}', r"qasper\.jsonl:2: the row lacks 'pred'"),
    ("qasper", '{"pred": null, "answers": []}', r"qasper\.jsonl:1: 'pred' should be text, got \[None\]"),
    ("qasper", '{"pred": "", "answers": "mill"}', r"qasper\.jsonl:1: 'answers' should be text, got 'mill'"),
    ("trec", '{"pred": "", "answers": [], "all_classes": null}', r"trec\.jsonl:1: 'all_classes' should be text"),
    ("qasper_e", '{"pred": "", "answers": [], "length": "9"}', r"qasper_e\.jsonl:1: 'length' should be a number"),
    ("passage_retrieval_en", '{"pred": "", "answers": ["7"]}', r"_en\.jsonl:1: a right answer is \"Paragraph \" and"),
  ],
)
def test_what_cannot_be_scored(tmp_path, name, text, message):
  (tmp_path / f"{name}.jsonl").write_text(text)
  with pytest.raises(ValueError, match=message):
    longbench.score_file(tmp_path / f"{name}.jsonl")


def test_a_folder_is_scored_in_longbenchs_order(tmp_path):
  for name in ("trec_e", "lcc", "hotpotqa", "other", "narrativeqa", "qasper"):
    write_lines(tmp_path / f"{name}.jsonl", [predicted("mill", "mill", classes=["mill"])])
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "qasper.jsonl").write_text("{}")
  scores, errors = longbench.score_folder(tmp_path, but=["hotpotqa"])
  assert list(scores) == ["narrativeqa", "lcc", "trec_e"] and list(errors) == ["qasper", "other"]
  assert scores["lcc"] == Score(1, 100.0)


def test_averages():
  """The first row of the official table, GPT-3.5-Turbo-16k in English: categories to 44.0."""
  categories = ("single-document QA", "multi-document QA", "summarization", "few-shot", "synthetic", "code")
  english = dict(zip(categories, (39.8, 38.7, 26.5, 67.1, 37.8, 54.1), strict=True))
  scores = {task.name: Score(1, english[task.category]) for task in TASKS.values() if task.language != "zh"}
  made = longbench.averages(scores)
  assert made["category_mean_en"] == 44.0
  plain = (3 * 39.8 + 3 * 38.7 + 3 * 26.5 + 3 * 67.1 + 2 * 37.8 + 2 * 54.1) / 16
  assert made["task_mean_en_code"] == round(plain, 2) != 44.0
  assert made["category_mean_zh"] is made["task_mean_all"] is None

  scores |= {task.name: Score(1, 10.0) for task in TASKS.values() if task.language == "zh"}
  scores["qasper_e"] = Score(1, {"0-4k": 1.0, "4-8k": None, "8k+": None})
  made = longbench.averages(scores)
  assert made["category_mean_zh"] == round((5 * 10 + 54.1) / 6, 2)
  assert made["task_mean_all"] == round((16 * plain + 50) / 21, 2)
  del scores["qmsum"]
  missing = longbench.averages(scores)
  assert missing == {name: value if name == "category_mean_zh" else None for name, value in made.items()}


# ------------------------------------------------------------------------------------------------ published predictions


@pytest.fixture
def golden(longbench_dir) -> Path:
  """A model's predictions with the scores that the official code gave them."""
  for file in sorted((longbench_dir / "golden").glob("*/result.json")):
    return file.parent
  pytest.skip(f"{longbench_dir} has no golden/*/result.json")


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "gov_report" else []) for name in TASKS]
)
def test_published_scores(golden, name):
  expected = json.loads((golden / "result.json").read_text())[name]
  assert longbench.score_file(golden / f"{name}.jsonl").value == pytest.approx(expected, abs=0.01)


def test_published_scores_need_the_rules(golden, monkeypatch):
  """Each of these is another number without it."""
  expected = json.loads((golden / "result.json").read_text())
  assert longbench.score_file(golden / "lcc.jsonl", "indel").value > expected["lcc"] + 0.5
  monkeypatch.setattr(longbench.Task, "first_line", False)
  for name in ("trec", "triviaqa", "samsum", "lsht"):
    assert abs(longbench.score_file(golden / f"{name}.jsonl").value - expected[name]) > 0.5


# ----------------------------------------------------------------------------------------------------- the command line


def start(*arguments: str, program: str = "-m experiments.longbench") -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *program.split(" ", 1), *arguments],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


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
  assert [line.split()[0] for line in table[1:]] == [*result, *printed["averages"]]
  setting = json.loads((out / "config.json").read_text())
  assert setting["config"]["scheduler"]["max_context"] == 384 and setting["model"]["name"] == "random:tiny"
  room = 384 - max(MAX_NEW.values()) - longbench.SLACK - len("<user>\n<assistant>")
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
    f"error: {out} holds predictions of another setting, give another --out: "
    "config.sparse.token_budget was 384 and is 64; prompts.max_tokens was 326 and is 344; "
    "prompts.chat_template was True and is False\n"
  )


def test_scoring_alone_needs_no_jax(tmp_path):
  write_lines(tmp_path / "qasper.jsonl", [predicted("old mill", "mill"), predicted("a mill", "mill")])
  write_lines(tmp_path / "lcc.jsonl", [predicted("XYZa1b2c3d4", "a5b6c7d8XYZ")])
  write_lines(tmp_path / "lcc_e.jsonl", [predicted("x", "x", length=5000)])
  before = sorted(tmp_path.iterdir())
  program = (
    "-c import sys, runpy; sys.modules['jax'] = None; runpy.run_module('experiments.longbench', run_name='__main__')"
  )
  done = start(f"--score_only={tmp_path}", "--code_sim=indel", program=program)
  assert done.returncode == 0 and not done.stderr, done.stderr
  printed = json.loads(done.stdout.splitlines()[-1])
  assert printed["scores"] == {"qasper": 83.33, "lcc": 36.0, "lcc_e": {"0-4k": None, "4-8k": 100.0, "8k+": None}}
  assert printed["rows"] == {"qasper": 2, "lcc": 1, "lcc_e": 1} and set(printed["averages"].values()) == {None}
  assert sorted(tmp_path.iterdir()) == before

  (tmp_path / "trec.jsonl").write_text("{}\n")
  out = tmp_path / "scores"
  done = start(f"--score_only={tmp_path}", f"--out={out}", program=program)
  assert done.returncode == 1
  assert done.stderr == f"error: trec: {tmp_path / 'trec.jsonl'}:1: the row lacks 'all_classes'\n"
  assert json.loads((out / "result.json").read_text()) == {**printed["scores"], "lcc": 27.0}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--longbench_dir and --out are needed, or --score_only"),
    (["--score_only=absent"], "absent holds no predictions"),
    (["--longbench_dir=absent", "--out=absent"], "dataset2prompt.json is missing"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message):
  done = start(*arguments)
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_folder_of_unknown_origin_is_not_gone_on_with(tmp_path):
  bench = write_release(tmp_path / "bench", qasper=1)
  write_lines(tmp_path / "qasper.jsonl", [predicted("", "barge 0")])
  arguments = [f"--longbench_dir={bench}", f"--out={tmp_path}", *(f"--set={a}" for a in SMALL_SERVING)]
  done = start(*arguments)
  assert done.returncode == 2 and "has .jsonl files but no config.json that says what made them" in done.stderr
