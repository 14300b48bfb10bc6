"""Traces: their files, requests of their lengths, and requests that arrive as theirs did or in bursts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_serve_jax import tasks, workloads
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.workloads import ArrivalConfig, WorkloadConfig, arrival_times, load_workload, read_trace, times_of
from sparse_serve_jax.workloads.generated import lengths
from tests import jsonl

TOKENIZER = ByteTokenizer()
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake(folder: Path, *rows: tuple[float, int, int], name: str = "trace.jsonl") -> str:
  """A file of (milliseconds, prompt, output); prompts begin alike."""
  keys = ("timestamp", "input_length", "output_length")
  ids = [list(range(-(-row[1] // 512))) for row in rows]
  lines = zip(rows, ids, strict=True)
  jsonl.write(folder / name, [dict(zip(keys, row, strict=True)) | {"hash_ids": of} for row, of in lines])
  return str(folder / name)


def azure(folder: Path, *lines: str, end: str = "\n") -> str:
  (folder / "trace.csv").write_bytes(end.join(lines).encode())
  return str(folder / "trace.csv")


OF_TIME = '"timestamp" is milliseconds, a number from 0 to below 1e+15'
OF_TOKENS = "is a number of tokens, an integer from 1 to 2147483647"


def items_of(source: str, tokenizer: Any = TOKENIZER, **changes: Any) -> list[Any]:
  return workloads.read(WorkloadConfig(source, **changes))(tokenizer, 1 << 20)


# --------------------------------------------------------------------------------------------------------------- files


def test_mooncakes_trace(tmp_path):
  trace = read_trace(mooncake(tmp_path, (250, 6758, 500), (250, 13, 1), (3250.5, 126195, 2)))
  assert len(trace) == 3 and trace.times.dtype == np.float64
  assert trace.times.tolist() == [0, 0, 3.0005]
  assert trace.prompt_tokens.tolist() == [6758, 13, 126195] and trace.output_tokens.tolist() == [500, 1, 2]
  assert trace.hash_ids is not None and [len(ids) for ids in trace.hash_ids] == [14, 1, 247]
  assert trace.hash_ids[0].tolist() == list(range(14))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_azures_trace(tmp_path, end):
  """Over midnight; lines end as the published files' do, the last one without a break."""
  lines = ["2023-11-16 23:59:59.9799600,4808,10", "2023-11-17 00:00:00.0319600,3180,8", "2023-11-17 00:01:00,2,6"]
  trace = read_trace(azure(tmp_path, HEADER, *lines, end=end))
  assert trace.times.tolist() == [0, 0.052, 60.02004]
  assert trace.prompt_tokens.tolist() == [4808, 3180, 2] and trace.output_tokens.tolist() == [10, 8, 6]
  other = ["GeneratedTokens,TIMESTAMP,ContextTokens", "5,2024-05-10 00:00:00.009930+00:00,2162", ""]
  assert (read_trace(azure(tmp_path, *other)).output_tokens).tolist() == [5]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ('{"timestamp": 5, "input_length": 3}', "the row lacks 'output_length'"),
    ('{"timestamp": "5", "input_length": 3, "output_length": 1}', f"{OF_TIME}, got '5'"),
    ('{"timestamp": NaN, "input_length": 3, "output_length": 1}', f"{OF_TIME}, got nan"),
    ('{"timestamp": -1, "input_length": 3, "output_length": 1}', f"{OF_TIME}, got -1"),
    ('{"timestamp": 1e15, "input_length": 3, "output_length": 1}', f"{OF_TIME}, got 1000000000000000.0"),
    ('{"timestamp": 5, "input_length": 0, "output_length": 1}', f'"input_length" {OF_TOKENS}, got 0'),
    ('{"timestamp": 5, "input_length": 2147483648, "output_length": 1}', f'"input_length" {OF_TOKENS}, got 2147483648'),
    ('{"timestamp": 5, "input_length": 3, "output_length": 1.5}', f'"output_length" {OF_TOKENS}, got 1.5'),
    (
      '{"timestamp": 3, "input_length": 3, "output_length": 1}',
      "times must ascend, this one is 0.001 s before the las",
    ),
    ("{", "not JSON"),
    (
      '{"timestamp": 5, "input_length": 513, "output_length": 1, "hash_ids": [3]}',
      '"hash_ids" of 2 blocks of 512 tokens are a list of 2 integers, got 1: [3]',
    ),
    (
      '{"timestamp": 5, "input_length": 5, "output_length": 1, "hash_ids": 3}',
      '"hash_ids" of 1 blocks of 512 tokens are a list of 1 integers, got 3',
    ),
    (
      '{"timestamp": 5, "input_length": 513, "output_length": 1, "hash_ids": [7, 2147483648]}',
      '"hash_ids" are integers from 0 to 2147483647, got 2147483648',
    ),
    (
      '{"timestamp": 5, "input_length": 513, "output_length": 1}',
      '"hash_ids" are lacking, which 1 of 2 lines have',
    ),
    (
      '{"timestamp": 5, "input_length": 5, "output_length": 1, "hash_ids": [-1]}',
      '"hash_ids" are integers from 0 to 2147483647, got -1',
    ),
  ],
)
def test_a_wrong_line_of_mooncakes(tmp_path, row, message):
  file = mooncake(tmp_path, (4, 10, 10))
  Path(file).write_text(Path(file).read_text() + "\n" + row + "\n")
  with pytest.raises(ValueError, match=rf"trace\.jsonl:3: {re.escape(message)}"):
    read_trace(file)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("2023-11-16 18:17:03.97,4808", "2 values, the header has 3 columns"),
    ("yesterday,4808,10", "Invalid isoformat string: 'yesterday'"),
    ("2023-11-16 18:17:03.97,-4,10", f"\"ContextTokens\" {OF_TOKENS}, got '-4'"),
    ("2023-11-16 18:17:03.97,4,0", f'"GeneratedTokens" {OF_TOKENS}, got 0'),
    ("2023-11-16 18:17:02.5,4,1", "times must ascend, this one is 0.5 s before the last"),
  ],
)
def test_a_wrong_line_of_azures(tmp_path, row, message):
  with pytest.raises(ValueError, match=rf"trace\.csv:4: {re.escape(message)}"):
    read_trace(azure(tmp_path, HEADER, "2023-11-16 18:17:03,1,1", "", row))


def test_one_line_of_some_without_ids(tmp_path):
  """The first one that lacks them is told, wherever others have them."""
  row = {"timestamp": 0, "input_length": 5, "output_length": 1}
  jsonl.write(tmp_path / "trace.jsonl", [row | {"hash_ids": [3]}, row, row | {"hash_ids": None}, row])
  with pytest.raises(ValueError, match=r'trace\.jsonl:2: "hash_ids" are lacking, which 1 of 4 lines have'):
    read_trace(tmp_path / "trace.jsonl")
  jsonl.write(tmp_path / "trace.jsonl", [row, row | {"hash_ids": [3]}])
  with pytest.raises(ValueError, match=r'trace\.jsonl:1: "hash_ids" are lacking, which 1 of 2 lines have'):
    read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n", HEADER, HEADER + "\r\n"])
def test_a_trace_without_requests(tmp_path, content):
  with pytest.raises(ValueError, match=r"trace\.csv holds no request"):
    read_trace(azure(tmp_path, content))


def test_no_trace(tmp_path):
  with pytest.raises(ValueError, match=r"trace\.csv:1: a trace is JSON objects, or .*; ContextTokens is not"):
    read_trace(azure(tmp_path, "TIMESTAMP,Tokens", "1,2"))
  with pytest.raises(ValueError, match="absent is missing"):
    read_trace(tmp_path / "absent")


def test_the_published_traces():
  """Rows, seconds, mean and longest prompt, mean output."""
  if not (folder := os.environ.get("SPARSE_SERVE_TRACES")):
    pytest.skip("$SPARSE_SERVE_TRACES is not set: the folder of the published traces")
  for name, rows, span, prompt, longest, output in [
    ("mooncake/conversation_trace.jsonl", 12_031, 3_537, 12_035, 126_195, 343),
    ("mooncake/synthetic_trace.jsonl", 3_993, 1_022, 15_325, 191_378, 149),
    ("azure/AzureLLMInferenceTrace_code.csv", 8_819, 3_436, 2_048, 7_437, 28),
    ("azure/AzureLLMInferenceTrace_conv.csv", 19_366, 3_502, 1_155, 14_050, 211),
  ]:
    trace = read_trace(Path(folder) / name)
    assert (len(trace), trace.prompt_tokens.max()) == (rows, longest)
    assert trace.times[-1] == pytest.approx(span, abs=0.5)
    assert trace.prompt_tokens.mean() == pytest.approx(prompt, abs=0.5)
    assert trace.output_tokens.mean() == pytest.approx(output, abs=0.5)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_requests_have_the_lengths_of_a_trace(tmp_path):
  rows = [(1000 * i, n, m) for i, (n, m) in enumerate([(900, 3), (1, 5), (2, 1), (900, 40), (17, 9)])]
  file = mooncake(tmp_path, *rows)
  items = items_of("trace", path=file)
  assert [item.id for item in items] == [f"trace-{i}" for i in range(5)]
  assert [len(item.prompt) for item in items] == [900, 1, 2, 900, 17]
  assert [item.max_new_tokens for item in items] == [3, 5, 1, 40, 9]
  assert all(item.options == {"ignore_eos": True} and item.prompt.dtype == np.int32 for item in items)
  assert all(item.prompt[0] == TOKENIZER.bos_token_id for item in items)

  fewer: dict[str, Any] = dict(path=file, limit=4, prompt_tokens=300, max_new_tokens=4)
  capped = items_of("trace", **fewer)
  assert [(len(item.prompt), item.max_new_tokens) for item in capped] == [(300, 3), (1, 4), (2, 1), (300, 4)]
  prompts, outputs, _ = lengths(WorkloadConfig("trace", **fewer))
  assert prompts.tolist() == [300, 1, 2, 300] and outputs.tolist() == [3, 4, 1, 4]


def test_prompts_begin_alike_where_a_trace_says_so(tmp_path: Path):
  def row(n: int, *ids: int) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": n, "output_length": 1, "hash_ids": ids}

  jsonl.write(tmp_path / "trace.jsonl", [row(1500, 0, 1, 2), row(1200, 0, 1, 7), row(1500, 5, 1, 2)])
  first, second, other = (item.prompt for item in items_of("trace", path=str(tmp_path / "trace.jsonl")))
  special = len(TOKENIZER.encode(""))
  assert [len(first), len(second), len(other)] == [1500, 1200, 1500]
  assert (first[: special + 1024] == second[: special + 1024]).all()
  assert (first[special : special + 8] != other[special : special + 8]).any()
  assert (first[special + 1024 : 1200] != second[special + 1024 :]).any()


def test_requests_of_one_length():
  items = items_of("text", limit=40, prompt_tokens=200, max_new_tokens=7)
  assert [item.id for item in items] == [f"text-{i}" for i in range(40)]
  assert {(len(item.prompt), item.max_new_tokens, item.options["ignore_eos"]) for item in items} == {(200, 7, True)}


def test_requests_of_drawn_lengths():
  """Evenly, from a share of the longest on."""
  config = dataclasses.replace(load_workload("mixed"), limit=4000)
  prompts, outputs, _ = lengths(config)
  assert (prompts.min(), prompts.max(), outputs.min(), outputs.max()) == (256, 1024, 16, 64)
  assert abs(prompts.mean() / 640 - 1) < 0.02 and abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.05
  items = items_of("text", limit=5, prompt_tokens=99, max_new_tokens=8, shortest=0.5, seed=3)
  fewer = lengths(WorkloadConfig("text", limit=5, prompt_tokens=99, max_new_tokens=8, shortest=0.5, seed=3))
  assert [len(item.prompt) for item in items] == fewer.prompt_tokens.tolist() and fewer.prompt_tokens.min() >= 50
  assert [item.max_new_tokens for item in items] == fewer.output_tokens.tolist() and len(
    set(fewer.prompt_tokens.tolist())
  ) > 1
  with pytest.raises(ValueError, match=r"shortest=0.0 is not a share in \(0, 1\]"):
    WorkloadConfig("text", shortest=0.0)


def test_prompts_are_text_and_begin_differently():
  items = items_of("text", limit=40, prompt_tokens=400, max_new_tokens=1)
  texts = [TOKENIZER.decode(item.prompt.tolist()) for item in items]
  assert len({text[:4] for text in texts}) == 40
  words = {word.strip('.,?"') for text in texts for word in text.split()[2:-1]}
  assert len(words) > 60 and {"the", "and"} <= words
  assert len({text[4:40] for text in texts}) > 30  # pieces of different places


def test_prompts_depend_on_the_seed_alone():
  first, again, other = (items_of("text", limit=2, prompt_tokens=90, max_new_tokens=1, seed=s) for s in (1, 1, 2))
  for a, b, c in zip(first, again, other, strict=True):
    assert a.prompt.tolist() == b.prompt.tolist() != c.prompt.tolist()


class Rough(ByteTokenizer):
  """A token stands for 50 bytes: there are far fewer tokens than words."""

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    return super().encode(text, add_special_tokens)[::50]


def test_a_token_can_be_many_words():
  assert [len(item.prompt) for item in items_of("text", Rough(), limit=3, prompt_tokens=500, max_new_tokens=1)] == [
    500
  ] * 3


def test_many_long_prompts_are_made_at_once(tmp_path):
  file = mooncake(tmp_path, *((i, 12_000, 1) for i in range(3_000)))
  start = time.perf_counter()
  items = items_of("trace", path=file)
  assert sum(len(item.prompt) for item in items) == 36_000_000
  assert time.perf_counter() - start < 20  # text for each of them takes minutes


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (WorkloadConfig("trace"), "a workload of trace needs path"),
    (WorkloadConfig("trace", path="absent"), "absent is missing"),
    (WorkloadConfig("trace", path="x", tasks=("count",)), "a workload of trace has no tasks"),
    (WorkloadConfig("trace", arrivals=ArrivalConfig("trace")), "'trace': missing a required .*argument: 'path'"),
    (WorkloadConfig("trace", path="x", shortest=0.5), "a workload of trace has no shortest, got 0.5"),
    (WorkloadConfig("text", path="x"), "a workload of text has no path, got 'x'"),
    (WorkloadConfig("text", limit=2, prompt_tokens=9), r"text takes .*, 1 or more each, got \(2, 9, 0\)"),
    (WorkloadConfig("text", prompt_tokens=9, max_new_tokens=2), r"1 or more each, got \(0, 9, 2\)"),
    (WorkloadConfig("text", limit=2, max_new_tokens=2), r"1 or more each, got \(2, 0, 2\)"),
  ],
)
def test_what_a_source_lacks(config, message):
  with pytest.raises(ValueError, match=message):
    workloads.read(config)


def test_the_tasks_of_the_reference_model():
  """All that it was trained on, each as often."""
  config = load_workload("tasks")
  assert config.source == "needle" and sorted(config.tasks) == sorted(tasks.TASKS)
  assert config.limit % len(config.tasks) == 0


# ------------------------------------------------------------------------------------------------------------ arrivals


@pytest.mark.parametrize("cv", [0.5, 1, 2.0, 4])
def test_arrivals_in_bursts(cv):
  config = ArrivalConfig("gamma", 4.0, seed=1, options={"cv": cv})
  times = arrival_times(config, 100_000)
  gaps = np.diff(times, prepend=0)
  assert np.mean(gaps) == pytest.approx(0.25, rel=0.05)
  assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05)
  if cv >= 1:
    assert gaps.max() > 3 / 4.0  # not clipped
  assert times.tolist() == arrival_times(config, 100_000).tolist()
  assert times[:9].tolist() != arrival_times(ArrivalConfig("gamma", 4.0, seed=2, options={"cv": cv}), 9).tolist()


def test_arrivals_are_poissons_by_default():
  """Exponential: a gap exceeds t / rate with probability exp(-t)."""
  gaps = np.diff(arrival_times(ArrivalConfig("gamma", 2.0), 100_000), prepend=0) * 2
  for t in (0.1, 1, 3):
    assert np.mean(gaps > t) == pytest.approx(np.exp(-t), rel=0.05)


@pytest.mark.parametrize("cv", [0, -1, float("nan"), float("inf"), "2", True, 1000])
def test_bursts_have_a_coefficient(cv):
  with pytest.raises(ValueError, match=rf"cv, .* is a number from 0\.01 to 100, got {cv!r}"):
    arrival_times(ArrivalConfig("gamma", 4.0, options={"cv": cv}), 3)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_nothing_arrives_at_such_a_rate(rate, tmp_path):
  message = f"the rate of arrivals must be above 0 and finite, .* got {rate}"
  with pytest.raises(ValueError, match=message):
    arrival_times(ArrivalConfig("gamma", rate), 3)
  if rate:
    options = {"path": mooncake(tmp_path, (0, 1, 1), (9, 1, 1))}
    with pytest.raises(ValueError, match=message):
      arrival_times(ArrivalConfig("trace", rate, options=options), 2)


def test_arrivals_of_a_trace(tmp_path):
  options = {"path": mooncake(tmp_path, (500, 9, 1), (500, 9, 1), (1500, 9, 1), (4500, 9, 1))}
  recorded = ArrivalConfig("trace", options=options)
  assert arrival_times(recorded, 4).tolist() == [0, 0, 1, 4]
  assert arrival_times(recorded, 3).tolist() == [0, 0, 1] and arrival_times(recorded, 0).tolist() == []
  faster = arrival_times(ArrivalConfig("trace", 6.0, options=options), 4)
  assert faster == pytest.approx([0, 0, 0.125, 0.5])
  assert np.mean(np.diff(faster)) == pytest.approx(1 / 6)
  assert arrival_times(ArrivalConfig("trace", 6.0, options=options), 3) == pytest.approx(faster[:3])
  with pytest.raises(ValueError, match=r"5 requests are to arrive as in .*trace\.jsonl, which has 4"):
    arrival_times(recorded, 5)
  with pytest.raises(ValueError, match="path is the file of a trace, got 5"):
    arrival_times(ArrivalConfig("trace", options={"path": 5}), 0)


def test_what_came_at_once_has_no_rate(tmp_path):
  options = {"path": mooncake(tmp_path, (5, 9, 1), (5, 9, 1))}
  assert arrival_times(ArrivalConfig("trace", options=options), 2).tolist() == [0, 0]
  with pytest.raises(ValueError, match=r"2 requests that all came at once cannot come at a rate of 2\.0 a second"):
    arrival_times(ArrivalConfig("trace", 2.0, options=options), 2)


def test_requests_of_a_trace_arrive_as_they_did_or_as_others(tmp_path):
  own = mooncake(tmp_path, (0, 9, 1), (1000, 9, 1))
  other = mooncake(tmp_path, (0, 9, 1), (7000, 9, 1), (9000, 9, 1), name="other.jsonl")
  (tmp_path / "mine.json").write_text(json.dumps({"extends": "trace", "path": own}))
  assert times_of(load_workload(tmp_path / "mine.json"), 2).tolist() == [0, 1]
  arrivals = {"process": "trace", "rate": 4, "options": {"path": other}}  # 4 a second: 2 gaps in half a second
  for source in ({"source": "trace", "path": own}, {"extends": "text"}):
    (tmp_path / "mine.json").write_text(json.dumps({**source, "arrivals": arrivals}))
    config = load_workload(tmp_path / "mine.json")
    workloads.read(config)
    assert times_of(config, 2) == pytest.approx([0, 0.5 * 7 / 9])
  (tmp_path / "mine.json").write_text(
    '{"source": "trace", "arrivals": {"process": "gamma", "rate": 2, "options": {"cv": 3}}}'
  )
  config = load_workload(tmp_path / "mine.json")
  assert times_of(config, 5).tolist() == arrival_times(ArrivalConfig("gamma", 2.0, options={"cv": 3}), 5).tolist()
  assert times_of(WorkloadConfig("trace", path=own), 2).tolist() == [0, 0]
