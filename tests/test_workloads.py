"""Workloads: where prompts come from."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.serving import workload

BOS = ByteTokenizer.bos_token_id
TOKENIZER = ByteTokenizer()


def text(ids) -> str:
  return TOKENIZER.decode(ids.tolist() if isinstance(ids, np.ndarray) else ids)


def write_lines(file, rows) -> None:
  file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
  """A folder laid out like LongBench's, of two tasks."""
  (tmp_path / "config").mkdir()
  (tmp_path / "data").mkdir()
  templates = {"qa": "Read {context} and answer {input}:", "summary": "Sum up: {context}"}
  (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(templates))
  (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps({"qa": 32, "summary": 512}))
  write_lines(tmp_path / "data" / "qa.jsonl", [{"context": f"c{i}", "input": f"i{i}", "answers": []} for i in range(3)])
  write_lines(tmp_path / "data" / "qa_e.jsonl", [{"context": "a\u2028b", "input": "é"}])
  write_lines(tmp_path / "data" / "summary.jsonl", [{"context": "{x}", "input": ""}])
  return tmp_path


# ----------------------------------------------------------------------------------------------------------- LongBench


def test_longbench_reads_every_file_with_the_base_tasks_template(folder):
  items = workload.longbench(TOKENIZER, folder, max_prompt_tokens=100)
  assert [(item.id, text(item.prompt), item.max_new_tokens) for item in items] == [
    ("qa-0", "Read c0 and answer i0:", 32),
    ("qa-1", "Read c1 and answer i1:", 32),
    ("qa-2", "Read c2 and answer i2:", 32),
    ("qa_e-0", "Read a\u2028b and answer é:", 32),
    ("summary-0", "Sum up: {x}", 512),
  ]
  assert all(item.prompt.dtype == np.int32 and item.prompt[0] == BOS for item in items)


def test_longbench_limit_is_per_file_and_later_lines_are_not_read(folder):
  with (folder / "data" / "qa.jsonl").open("a") as file:
    file.write("broken\n")
  items = workload.longbench(TOKENIZER, folder, max_prompt_tokens=100, limit=2)
  assert [item.id for item in items] == ["qa-0", "qa-1", "qa_e-0", "summary-0"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: (f / "config" / "dataset2maxlen.json").unlink(), r"dataset2maxlen\.json is missing"),
    (lambda f: (f / "config" / "dataset2prompt.json").write_text("{\n"), r"dataset2prompt\.json:2: not JSON"),
    (lambda f: write_lines(f / "data" / "odd_e.jsonl", []), r"odd_e\.jsonl: task 'odd' has no template"),
    (
      lambda f: (f / "data" / "qa.jsonl").write_text('{"context": "", "input": ""}\n{"a"\n'),
      r"qa\.jsonl:2: not JSON: Exp",
    ),
    (lambda f: (f / "data" / "qa.jsonl").write_text("[]\n"), r"qa\.jsonl:1: a row is a JSON object, got list"),
    (
      lambda f: write_lines(f / "data" / "qa.jsonl", [{"context": ""}]),
      r"qa\.jsonl:1: the row lacks 'input', which the te",
    ),
    (lambda f: [file.unlink() for file in (f / "data").iterdir()], r"has no \.jsonl files"),
  ],
)
def test_longbench_errors_name_file_and_line(folder, change, message):
  change(folder)
  with pytest.raises(ValueError, match=message):
    workload.longbench(TOKENIZER, folder, max_prompt_tokens=100)


def test_real_longbench(longbench_dir):
  items = workload.longbench(TOKENIZER, longbench_dir, max_prompt_tokens=512, limit=1)
  names = [item.id.removesuffix("-0") for item in items]
  assert len(set(names)) == len(names) == len(list((longbench_dir / "data").glob("*.jsonl")))
  assert max(len(item.prompt) for item in items) == 512


# ---------------------------------------------------------------------------------------------------------- truncation


def test_truncation_keeps_both_ends_and_tokenizes_again():
  # 1 + 20 tokens; the halves are BOS + "abcd" and "pqrst", and BOS comes back by encoding
  assert workload.truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 10) == [BOS, *b"abcdpqrst"]
  assert workload.truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 11) == [BOS, *b"abcdpqrst"]  # half of 11 is 5
  assert workload.truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 21) == [BOS, *b"abcdefghijklmnopqrst"]


def test_truncation_holds_its_limit_though_broken_characters_grow():
  for limit in range(2, 60):
    ids = workload.truncate_middle(TOKENIZER, "é中🙂" * 40, limit)
    assert limit - 1 <= len(ids) <= limit and ids[0] == BOS


def test_truncation_of_a_long_text_is_linear():
  long = "x" * 4_000_000
  start = time.perf_counter()
  assert len(workload.truncate_middle(TOKENIZER, long, 2048)) == 2048
  assert time.perf_counter() - start < 5  # what is quadratic takes hours


def test_truncation_needs_two_tokens():
  with pytest.raises(ValueError, match="max_tokens=1"):
    workload.truncate_middle(TOKENIZER, "abc", 1)


# -------------------------------------------------------------------------------------------------------------- needle


def test_needles_are_as_long_as_asked_for_and_hold_their_key():
  items = workload.needle(TOKENIZER, 5, prompt_tokens=700, max_new_tokens=9, seed=3)
  keys = []
  for item in items:
    prompt = text(item.prompt)
    keys.append(prompt.split("The secret key is ")[1][:5])
    assert keys[-1].isdigit() and prompt.endswith("Answer: the secret key is")
    assert 680 <= len(item.prompt) <= 700 and item.max_new_tokens == 9
  assert len(set(keys)) == 5 and len({item.id for item in items}) == 5


def test_needles_depend_on_the_seed_alone():
  first, again, other = (workload.needle(TOKENIZER, 2, 300, 4, seed) for seed in (1, 1, 2))
  for a, b, c in zip(first, again, other, strict=True):
    assert a.prompt.tolist() == b.prompt.tolist() != c.prompt.tolist()


def test_a_needle_needs_room():
  with pytest.raises(ValueError, match="a prompt of 20 tokens has no room"):
    workload.needle(TOKENIZER, 1, prompt_tokens=20, max_new_tokens=1)


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl(tmp_path):
  file = tmp_path / "rows.jsonl"
  write_lines(
    file, [{"prompt": "hello"}, {"prompt_token_ids": [5, 6], "max_new_tokens": 3, "request_id": "x"}, {"prompt": "far"}]
  )
  items = workload.jsonl(TOKENIZER, file, max_new_tokens=7, limit=2)
  assert [(item.id, item.prompt.tolist(), item.max_new_tokens) for item in items] == [
    ("line-1", [BOS, *b"hello"], 7),
    ("x", [5, 6], 3),
  ]


def test_jsonl_cuts_ids_and_texts(tmp_path):
  file = tmp_path / "rows.jsonl"
  write_lines(file, [{"prompt_token_ids": list(range(10))}, {"prompt": "abcdefgh"}])
  first, second = workload.jsonl(TOKENIZER, file, max_new_tokens=7, max_prompt_tokens=5)
  assert first.prompt.tolist() == [0, 1, 7, 8, 9]
  assert second.prompt.tolist() == [BOS, *b"agh"]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("{}", 'either "prompt" or "prompt_token_ids", this one has'),
    ('{"prompt": "a", "prompt_token_ids": [1]}', "either"),
    ('{"prompt": 5}', '"prompt" is a text, got int'),
    ('{"prompt_token_ids": "1 2"}', "is a list of token ids"),
    ('{"prompt_token_ids": [1, true]}', "is a list of token ids"),
    ('{"prompt_token_ids": [99999999999]}', "is a list of token ids"),
    ('{"prompt": "a", "max_new_tokens": "9"}', "is a number of tokens, got '9'"),
    ("{", "not JSON"),
  ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, row, message):
  file = tmp_path / "rows.jsonl"
  file.write_text('{"prompt": "fine"}\n\n' + row + "\n")
  with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{message}"):
    workload.jsonl(TOKENIZER, file, max_new_tokens=7)


def test_jsonl_file_is_missing(tmp_path):
  with pytest.raises(ValueError, match=r"none\.jsonl is missing"):
    workload.jsonl(TOKENIZER, tmp_path / "none.jsonl", max_new_tokens=7)


# ------------------------------------------------------------------------------------------------------------ arrivals


def test_arrivals():
  assert workload.arrival_times(3, None).tolist() == [0, 0, 0]
  times = workload.arrival_times(20_000, rate=4.0, seed=1)
  gaps = np.diff(times, prepend=0)
  assert gaps.min() >= 0
  assert np.mean(gaps) == pytest.approx(0.25, rel=0.03) and np.std(gaps) == pytest.approx(0.25, rel=0.05)
  assert np.mean(gaps > 0.25 * np.log(100)) == pytest.approx(0.01, rel=0.3)  # the tail is not clipped
  assert (
    times.tolist() == workload.arrival_times(20_000, 4.0, 1).tolist() != workload.arrival_times(20_000, 4.0, 2).tolist()
  )
  with pytest.raises(ValueError, match="got 0"):
    workload.arrival_times(1, 0)
