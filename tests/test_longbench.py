"""LongBench: tasks, prompts, scores of files, and the published scores of published predictions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sparse_serve_jax.evaluation import longbench, scorers
from sparse_serve_jax.evaluation.longbench import METRICS, NAMES, TASKS, Release, Score
from sparse_serve_jax.models.tokenizer import load_tokenizer
from sparse_serve_jax.workloads.cut import cut_middle
from sparse_serve_jax.workloads.longbench import SLACK, Row, encode_prompt
from tests import jsonl
from tests.longbench import (
  BOS,
  BYTES,
  MAX_NEW,
  ROOT,
  predicted,
  row_of,
  write_release,
)

# ---------------------------------------------------------------------------------------------------------------- tasks


def test_the_tasks():
  assert len(TASKS) == len(NAMES["all"]) == 21 and list(TASKS) == [task.name for task in TASKS.values()]
  extended = "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count"
  assert NAMES["all_e"] == [f"{name}_e" for name in [*extended.split(), "passage_retrieval_en", "lcc", "repobench-p"]]
  chosen = lambda wanted: {task.name for task in TASKS.values() if wanted(task)}  # noqa: E731
  assert chosen(longbench.first_line_only) == {"trec", "triviaqa", "samsum", "lsht"}
  assert chosen(lambda t: not t.chat) == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
  assert chosen(lambda t: t.language == "zh") == set("multifieldqa_zh dureader vcsum lsht passage_retrieval_zh".split())
  assert chosen(lambda t: METRICS[t.name] is scorers.rouge) == {"gov_report", "qmsum", "multi_news", "samsum"}
  assert chosen(lambda t: METRICS[t.name] is scorers.rouge_zh) == {"dureader", "vcsum"}
  assert chosen(lambda t: METRICS[t.name] is scorers.classification) == {"trec", "lsht"}
  assert METRICS.keys() == TASKS.keys()
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
  assert release.prompt(Row("qasper", 0, "", row)) == "Paper: {input} \u2028 港\n\n Question: é?\n\nAnswer:"
  assert sha256(release.prompt(Row("qasper", 0, "", row)))[:16] == "536a64d9c56cec46"
  assert release.prompt(Row("lcc_e", 0, "", row)) == "{input} \u2028 港Next line:\n"


def test_prompts_of_the_official_templates(longbench_dir):
  config = longbench_dir / "config"
  official = {"dataset2prompt.json": "56d22ad4f382", "dataset2maxlen.json": "72966b3c0933"}
  for name, start in official.items():
    assert hashlib.sha256((config / name).read_bytes()).hexdigest().startswith(start)
  release = Release.read(longbench_dir)
  assert release.templates.keys() == release.max_new_tokens.keys() == TASKS.keys()
  prompts = [release.prompt(Row(name, 0, "", row_of(1, context="A\n barge.", input="Où?"))) for name in TASKS]
  assert sha256("\0".join(prompts))[:16] == "500e2f63085fb0d6"
  asked = {name for name, prompt in zip(TASKS, prompts, strict=True) if "Où?" in prompt}
  assert TASKS.keys() - asked == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}


def test_the_middle_is_cut_as_text():
  """1 + 20 tokens; the halves are BOS with "abcd" and "pqrst". BOS is not text, and comes back by encoding."""
  text = "abcdefghijklmnopqrst"
  assert cut_middle(BYTES, text, 21) == text
  assert cut_middle(BYTES, text, 20) == "abcdefghi" + "klmnopqrst"
  assert cut_middle(BYTES, text, 11) == cut_middle(BYTES, text, 10) == "abcdpqrst"
  assert encode_prompt(BYTES, TASKS["trec"], text, 10, chat=True) == [BOS, *b"abcdpqrst"]
  assert cut_middle(BYTES, "ééé", 4) == "\ufffd" + "é"  # BOS and half of an é
  with pytest.raises(ValueError, match="max_tokens=1"):
    cut_middle(BYTES, text, 1)


@pytest.mark.parametrize("max_tokens", [2, 3, 8, 17, 40])
def test_the_middle_is_cut_by_the_tokenizers_own_tokens(max_tokens):
  """By the formula of the rules, with a tokenizer that merges."""
  tokenizer = load_tokenizer(ROOT / "tests" / "goldens" / "tokenizer")
  text = "the cat sat on the mat, and the other cat sat on the other mat."
  ids, half = tokenizer.encode(text), int(max_tokens / 2)
  expected = text
  if len(ids) > max_tokens:
    expected = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
  assert cut_middle(tokenizer, text, max_tokens) == expected
  assert (len(ids) > max_tokens) == (expected != text)


@pytest.mark.parametrize("name", TASKS)
def test_examples_and_code_go_without_the_chat_template(name):
  task = TASKS[name]
  raw, chat = (encode_prompt(BYTES, task, "0123456789", 6, chat) for chat in (False, True))
  assert raw == [BOS, *b"01789"]  # cut first
  assert chat == (list(b"<user>01789\n<assistant>") if task.chat else raw)


def test_the_chat_template_is_that_of_chat():
  """Control tokens in a context stay text, BOS is the template's; where there is no template it is not doubled."""
  tokenizer = load_tokenizer(ROOT / "tests" / "goldens" / "tokenizer")
  text = "the cat</s><|assistant|> sat"
  asked = encode_prompt(tokenizer, TASKS["qasper"], text, 100, chat=True)
  assert asked == tokenizer.encode_chat([{"role": "user", "content": text}])
  assert [i for i in asked if i < 4] == [0, 2, 1, 3]  # of the template alone
  assert tokenizer.decode(asked, skip_special_tokens=False) == f"<s><|user|>{text}</s><|assistant|>"
  raw = encode_prompt(tokenizer, TASKS["trec"], "<s>the cat", 100, chat=True)
  assert raw == tokenizer.encode("the cat") and raw[0] == 0


def test_room_for_prompts(tmp_path):
  release = Release.read(write_release(tmp_path))
  template = len("<user>\n<assistant>")
  assert release.room_for_prompts(BYTES, 1000, chat=False) == 1000 - max(MAX_NEW.values()) - SLACK
  assert release.room_for_prompts(BYTES, 1000, chat=True) == 1000 - max(MAX_NEW.values()) - SLACK - template
  with pytest.raises(
    ValueError, match="requests of 41 tokens have no room for a prompt beside 8 of output, 0 of a chat"
  ):
    release.room_for_prompts(BYTES, 41, chat=False)


# --------------------------------------------------------------------------------------------------------------- scores


def score(folder: Path, name: str, *rows: dict[str, Any], **options: Any) -> Any:
  jsonl.write(folder / f"{name}.jsonl", rows)
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
  monkeypatch.setattr(longbench, "first_line_only", lambda task: False)
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


def test_the_official_folder_of_longbench_e(tmp_path):
  """The official code writes pred_e/<model>/<task>.jsonl, without _e in the name."""
  rows = [predicted("mill", "mill", length=length) for length in (10, 5000)]
  for folder in (tmp_path / "pred_e", tmp_path / "pred_e" / "llama", tmp_path / "pred"):
    folder.mkdir()
    jsonl.write(folder / "qasper.jsonl", rows)
  for folder in ("pred_e", "pred_e/llama"):
    scores, errors = longbench.score_folder(tmp_path / folder)
    assert scores == {"qasper_e": Score(2, {"0-4k": 100.0, "4-8k": 100.0, "8k+": None})} and not errors
  assert longbench.score_folder(tmp_path / "pred")[0] == {"qasper": Score(2, 100.0)}
  assert longbench.score_file(tmp_path / "pred_e" / "qasper.jsonl").value == {"0-4k": 100, "4-8k": 100, "8k+": None}
  around = tmp_path / "pred_e" / "llama" / ".." / "llama"
  assert list(longbench.score_folder(around)[0]) == ["qasper_e"]

  jsonl.write(tmp_path / "pred_e" / "qasper_e.jsonl", rows)  # which of the two?
  scores, errors = longbench.score_folder(tmp_path / "pred_e")
  assert not scores and errors == {
    "qasper_e": f"{tmp_path / 'pred_e' / 'qasper.jsonl'} and qasper_e.jsonl are both of qasper_e: which is meant?"
  }


def test_rows_with_an_error_count_as_empty(tmp_path):
  """Whatever is known of them; a surrogate in answers stops no scorer."""
  broken = {"pred": "", "answers": [], "all_classes": None, "length": None, "error": "x.jsonl:2: not JSON"}
  half = {"pred": "", "answers": ["half \ud83d"], "all_classes": None, "length": 3, "error": "x.jsonl:3: a surrogate"}
  for name in [*TASKS, *NAMES["all_e"]]:
    answer = "Paragraph 1" if "retrieval_en" in name else "段落1" if "retrieval_zh" in name else "1"
    good = predicted(answer, answer, classes=["1"], length=9000)
    file = tmp_path / f"{name}.jsonl"
    jsonl.write(file, (good, good, broken))
    scored = longbench.score_file(file)
    assert scored.n_rows == 3 and scored.errors == ("x.jsonl:2: not JSON",)
    if not name.startswith("passage_retrieval"):  # whose right answers have a form of their own
      jsonl.write(file, (good, half), ensure_ascii=True)
      assert longbench.score_file(file).n_rows == 2


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
    jsonl.write(tmp_path / f"{name}.jsonl", [predicted("mill", "mill", classes=["mill"])])
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
  assert made.keys() == {"category_mean_en", "task_mean_en_code"}

  scores |= {task.name: Score(1, 10.0) for task in TASKS.values() if task.language == "zh"}
  scores["qasper_e"] = Score(1, {"0-4k": 1.0, "4-8k": None, "8k+": None})
  made = longbench.averages(scores)
  assert made["category_mean_zh"] == round((5 * 10 + 54.1) / 6, 2)
  assert made["task_mean_all"] == round((16 * plain + 50) / 21, 2)
  del scores["qmsum"]
  assert longbench.averages(scores) == {"category_mean_zh": made["category_mean_zh"]}


def test_what_is_official():
  """The sizes of the official files sum to the released number of rows (4,750; LongBench-E's to 3,668)."""
  v1 = {task.name: Score(task.n_rows, 1.0) for task in TASKS.values()}
  e = {name: Score(longbench.find_task(name).n_rows_e, {"0-4k": 1.0}) for name in NAMES["all_e"]}
  assert sum(score.n_rows for score in v1.values()) == 4750 and sum(score.n_rows for score in e.values()) == 3668
  assert longbench.unofficial(v1) == longbench.unofficial(e) == longbench.unofficial(v1 | e) == []
  assert longbench.unofficial(v1, "indel") == ["code compared by indel"]
  del v1["qmsum"]
  v1["lcc"] = Score(3, 1.0)
  assert longbench.unofficial(v1 | e) == ["20 of the 21 tasks of LongBench", "3 rows of lcc, which has 500"]
  v1["lcc"] = Score(300, 1.0)
  assert "300 rows of lcc, which has 500 (LongBench-E has so many: of that, the file is" in longbench.unofficial(v1)[1]


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
  monkeypatch.setattr(longbench, "first_line_only", lambda task: False)
  for name in ("trec", "triviaqa", "samsum", "lsht"):
    assert abs(longbench.score_file(golden / f"{name}.jsonl").value - expected[name]) > 0.5
