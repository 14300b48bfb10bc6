"""Workloads: where prompts come from and when they arrive."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import numpy as np
import pytest

from sparse_serve_jax import tasks, workloads
from sparse_serve_jax.config import override
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.workloads import (
  ARRIVALS,
  ArrivalConfig,
  Item,
  Refused,
  WorkloadConfig,
  arrival_times,
)
from sparse_serve_jax.workloads.cut import truncate_middle
from tests import jsonl
from tests.longbench import MAX_NEW, row_of, write_release

BOS = ByteTokenizer.bos_token_id
TOKENIZER = ByteTokenizer()


def text(ids) -> str:
  return TOKENIZER.decode(ids.tolist() if isinstance(ids, np.ndarray) else ids)


def items_of(source: str, max_request_tokens: int = 4096, **changes: Any) -> list[Any]:
  return workloads.read(WorkloadConfig(source, **changes))(TOKENIZER, max_request_tokens)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("source", ["needle", "text"])
def test_prompts_that_no_request_has_room_for_are_not_made(source):
  with pytest.raises(
    ValueError, match="^the shortest prompt has 1,000,000,000,000 tokens, and a request has room for 4,096$"
  ):
    items_of(source, limit=2, prompt_tokens=10**12, max_new_tokens=4)
  assert len(items_of(source, limit=2, prompt_tokens=4096, max_new_tokens=4)) == 2  # the engine says what is left


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (WorkloadConfig("nedle"), "unknown workload 'nedle'; known: .*needle"),
    (WorkloadConfig("needle", limit=1, prompt_tokens=300, path="x"), "a workload of needle has no path, got 'x'"),
    (WorkloadConfig("jsonl", path="x", tasks=("qasper",)), "a workload of jsonl has no tasks, got .'qasper'"),
    (WorkloadConfig("jsonl", path="x", chat_template=False), "a workload of jsonl has no chat_template, got False"),
    (WorkloadConfig("longbench", path="x", seed=1), "a workload of longbench has no seed, got 1"),
    (WorkloadConfig("jsonl"), "needs path"),
    (WorkloadConfig("longbench"), "needs path"),
    (WorkloadConfig("needle", limit=1), r"prompt_tokens=0"),
    (WorkloadConfig("needle", prompt_tokens=300), r"limit=0"),
    (WorkloadConfig("needle", limit=1, prompt_tokens=300, tasks=("sing",)), "there is no task 'sing'"),
    (
      WorkloadConfig("jsonl", arrivals=ArrivalConfig("poison")),
      "unknown arrivals.process 'poison'; known: all_at_once, gamma, poisson, trace",
    ),
    (WorkloadConfig("jsonl", arrivals=ArrivalConfig("poisson")), "must be above 0 and finite, .* got 0.0"),
  ],
)
def test_what_cannot_be_read_is_known_without_a_model(config, message):
  with pytest.raises(ValueError, match=message):
    workloads.read(config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(limit=-1), "limit=-1 must not be negative"),
    (dict(prompt_tokens=1), "prompt_tokens=1"),
    (dict(tasks="qasper"), "tasks: expected a list, got 'qasper'"),
    (dict(chat_template="no"), "chat_template: expected bool"),
    (dict(arrivals={"rate": "2"}), "rate: expected float, got '2'"),
    (dict(arrivals={"seed": -1}), "seed=-1 must not be negative"),
    (dict(arrivals={"options": []}), "options: expected dict"),
  ],
)
def test_fields_are_checked(changes, message):
  with pytest.raises(ValueError, match=message):
    WorkloadConfig("needle", **changes)


# ----------------------------------------------------------------------------------------------------------- LongBench


def test_longbench_serves_the_official_prompts(tmp_path):
  """Cut first, then in the chat template where the task takes one; samsum ends at a newline."""
  bench = write_release(tmp_path, qasper=2, samsum=1, lcc_e=1)
  jsonl.write(bench / "data" / "lcc_e.jsonl", [row_of(0, context="c" * 90)])
  items = items_of("longbench", path=str(bench), prompt_tokens=80)
  assert [(item.id, text(item.prompt), item.max_new_tokens, dict(item.options)) for item in items] == [
    ("qasper-0", "<user>Paper: barge 0 \n\n Question: which 0?\nAnswer:\n<assistant>", MAX_NEW["qasper"], {}),
    ("qasper-1", "<user>Paper: barge 1 barge 1 \n\n Question: which 1?\nAnswer:\n<assistant>", MAX_NEW["qasper"], {}),
    (
      "samsum-0",
      "Examples.\nbarge 0 \n\nwhich 0?",
      MAX_NEW["samsum"],
      {"stop_token_ids": [10], "min_tokens": 1},
    ),
    ("lcc_e-0", "c" * 39 + "c" * 29 + "Next line:\n", MAX_NEW["lcc"], {}),
  ]
  assert items[0].about == {"answers": ["barge 0"], "all_classes": ["barge", "pier"], "length": 0}
  assert all(item.prompt.dtype == np.int32 for item in items)


def test_longbench_leaves_room_for_what_is_written(tmp_path):
  bench = write_release(tmp_path, qasper=1, trec=1)
  for name in ("qasper", "trec"):
    jsonl.write(bench / "data" / f"{name}.jsonl", [row_of(0, context="x" * 900)])
  template = len("<user>\n<assistant>")
  for cap, chat in ((0, True), (3, True), (3, False)):
    asked = items_of("longbench", 384, path=str(bench), max_new_tokens=cap, chat_template=chat)
    room = 384 - (cap or max(MAX_NEW.values())) - 32 - template * chat
    left = room // 2 * 2 - 1  # the first half had BOS
    assert [len(item.prompt) for item in asked] == [left + (template if chat else 1), left + 1]
    assert [item.max_new_tokens for item in asked] == [cap or MAX_NEW[name] for name in ("qasper", "trec")]


def test_longbench_names_and_limits(tmp_path):
  bench = write_release(tmp_path, lcc=1, trec_e=2, qasper=3)
  (bench / "data" / "notes.jsonl").write_text("")
  with (bench / "data" / "qasper.jsonl").open("a") as file:
    file.write("broken\n")

  def ids(**changes: Any) -> list[str]:
    return [item.id for item in items_of("longbench", path=str(bench), prompt_tokens=50, **changes)]

  assert ids(limit=2) == ["qasper-0", "qasper-1", "lcc-0", "trec_e-0", "trec_e-1"]
  assert ids(tasks=("lcc", "trec_e", "lcc")) == ["lcc-0", "trec_e-0", "trec_e-1"]
  assert [item.id for item in items_of("longbench", path=str(bench)) if isinstance(item, Refused)] == ["qasper-3"]
  with pytest.raises(ValueError, match=r"qasper\.jsonl:4: not JSON"):
    items_of("longbench", path=str(bench), strict=True)
  with pytest.raises(ValueError, match=r"narrativeqa'"):
    ids(tasks=("all",))


def test_half_a_character_in_longbench_is_that_rows(tmp_path):
  bench = write_release(tmp_path, qasper=2)
  with (bench / "data" / "qasper.jsonl").open("a") as file:
    file.write(json.dumps(row_of(2, context="half \ud83d")) + "\n" + json.dumps(row_of(3)) + "\n")
  items = items_of("longbench", path=str(bench))
  assert [isinstance(item, Item) for item in items] == [True, True, False, True]
  where = f"{bench / 'data' / 'qasper.jsonl'}:3"
  assert items[2] == Refused("qasper-2", where, "'context' has the lone surrogate '\\ud83d' at character 5")
  assert workloads.refused_by(workloads.read(WorkloadConfig("longbench", path=str(bench)))) == (items[2],)


class NoTemplate(ByteTokenizer):
  def apply_chat_template(self, messages, add_generation_prompt: bool = True) -> str:
    raise ValueError("there is no chat template")

  def encode_chat(self, messages, add_generation_prompt: bool = True, **_) -> list[int]:
    raise ValueError("there is no chat template")


def test_a_model_without_a_chat_template(tmp_path):
  config = WorkloadConfig("longbench", path=str(write_release(tmp_path, qasper=1)), prompt_tokens=50)
  with pytest.raises(ValueError, match="there is no chat template; or set chat_template to false"):
    workloads.read(config)(NoTemplate(), 100)
  (item,) = workloads.read(override(config, {"chat_template": False}))(NoTemplate(), 100)
  assert isinstance(item, Item) and text(item.prompt).startswith("Paper:")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: (f / "config" / "dataset2maxlen.json").unlink(), r"dataset2maxlen\.json is missing"),
    (lambda f: (f / "config" / "dataset2maxlen.json").write_text("{}"), r"dataset2maxlen\.json: nothing for task 'qas"),
    (
      lambda f: (f / "config" / "dataset2maxlen.json").write_text('{"qasper": "9"}'),
      r"dataset2maxlen\.json: expected int for every task, got qasper: '9'",
    ),
    (lambda f: (f / "config" / "dataset2prompt.json").write_text("{\n"), r"dataset2prompt\.json:2: not JSON"),
    (lambda f: (f / "data" / "qasper.jsonl").write_text('\n{"a"\n'), r"qasper\.jsonl:2: not JSON: Exp"),
    (lambda f: (f / "data" / "qasper.jsonl").write_text("[]\n"), r"qasper\.jsonl:1: wanted is a JSON object, got list"),
    (lambda f: (f / "data" / "qasper.jsonl").write_text("{}\n"), r"qasper\.jsonl:1: the row lacks 'answers'"),
    (
      lambda f: jsonl.write(f / "data" / "qasper.jsonl", [{k: v for k, v in row_of(0).items() if k != "input"}]),
      r"qasper\.jsonl:1: the row lacks 'input'",
    ),
    (lambda f: (f / "data" / "qasper.jsonl").unlink(), r"data has no rows of LongBench's tasks"),
  ],
)
def test_longbench_errors_name_file_and_line(tmp_path, change, message):
  bench = write_release(tmp_path, qasper=1)
  change(bench)
  with pytest.raises(ValueError, match=message):
    workloads.read(WorkloadConfig("longbench", path=str(bench)))


def test_real_longbench(longbench_dir):
  items = items_of("longbench", path=str(longbench_dir), prompt_tokens=512, limit=1)
  names = [item.id.removesuffix("-0") for item in items]
  assert len(set(names)) == len(names) == len(list((longbench_dir / "data").glob("*.jsonl")))
  assert 512 <= max(len(item.prompt) for item in items) <= 512 + 18 + 32


# ---------------------------------------------------------------------------------------------------------- truncation


def test_truncation_keeps_both_ends_and_tokenizes_again():
  # 1 + 20 tokens; the halves are BOS + "abcd" and "pqrst", and BOS comes back by encoding
  assert truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 10) == [BOS, *b"abcdpqrst"]
  assert truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 11) == [BOS, *b"abcdpqrst"]  # half of 11 is 5
  assert truncate_middle(TOKENIZER, "abcdefghijklmnopqrst", 21) == [BOS, *b"abcdefghijklmnopqrst"]


def test_truncation_holds_its_limit_though_broken_characters_grow():
  for limit in range(2, 60):
    ids = truncate_middle(TOKENIZER, "é中🙂" * 40, limit)
    assert limit - 1 <= len(ids) <= limit and ids[0] == BOS


def test_truncation_of_a_long_text_is_linear():
  long = "x" * 4_000_000
  start = time.perf_counter()
  assert len(truncate_middle(TOKENIZER, long, 2048)) == 2048
  assert time.perf_counter() - start < 5  # what is quadratic takes hours


# -------------------------------------------------------------------------------------------------------------- needle


def test_needles_are_the_generated_tasks():
  """Those that the reference model was trained on, of the split that it was not."""
  names = ("single_text", "key_value")
  items = items_of("needle", tasks=names, limit=4, prompt_tokens=700, max_new_tokens=9, seed=3)
  assert len({item.id for item in items}) == len({text(item.prompt) for item in items}) == 4
  for i, item in enumerate(items):
    made = tasks.make(names[i % 2], 700, (3 << 20) + i, TOKENIZER, split="eval")
    assert item.prompt.tolist() == TOKENIZER.encode(made.prompt) and item.prompt.dtype == np.int32
    assert item.max_new_tokens == 9 and item.about == {"task": names[i % 2], "answers": list(made.answers)}
    assert item.judge(made.completion) == 1 and item.judge("no idea") == 0
  assert items_of("needle", limit=1, prompt_tokens=700)[0].max_new_tokens == len(" 12345\n")


def test_needles_depend_on_the_seed_alone():
  first, again, other = (items_of("needle", limit=2, prompt_tokens=300, seed=seed) for seed in (1, 1, 2))
  for a, b, c in zip(first, again, other, strict=True):
    assert a.prompt.tolist() == b.prompt.tolist() != c.prompt.tolist()


def test_a_needle_needs_room():
  with pytest.raises(ValueError, match=r"single_text takes at least \d+ tokens .* got length=20"):
    items_of("needle", limit=1, prompt_tokens=20)


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl(tmp_path):
  file = tmp_path / "rows.jsonl"
  rows = [
    {"prompt": "hello", "note": "the user's own", "prompt_tokens": 5, "id": 3, "output_token_ids": [1]},
    {"prompt_token_ids": [5, 6], "max_new_tokens": 3, "request_id": "x", "prompt": None},
    {"messages": [{"role": "user", "content": "hi"}], "request_id": 7, "max_new_tokens": None},
    {"prompt": "far"},
  ]
  jsonl.write(file, rows)
  items = items_of("jsonl", path=str(file), limit=3, max_new_tokens=7)
  assert [(item.id, item.prompt.tolist(), item.max_new_tokens) for item in items] == [
    ("line-1", [BOS, *b"hello"], 7),
    ("x", [5, 6], 3),
    ("7", [*b"<user>hi\n<assistant>"], 7),
  ]
  assert [item.max_new_tokens for item in items_of("jsonl", path=str(file), max_new_tokens=2)] == [2] * 4
  assert [item.max_new_tokens for item in items_of("jsonl", path=str(file))] == [32, 3, 32, 32]


def test_jsonl_options_go_to_the_request(tmp_path):
  options = {"temperature": 1, "top_p": 0.5, "seed": 3, "min_tokens": 2, "stop_token_ids": [7], "ignore_eos": True}
  options |= {"top_k": 4, "min_p": 0.1}
  rows = [
    {"prompt": "a", **options},
    {"prompt": "b", "temperature": None, "add_special_tokens": False, "max_tokens": 9},
  ]
  jsonl.write(tmp_path / "rows.jsonl", rows)
  first, second = items_of("jsonl", path=str(tmp_path / "rows.jsonl"))
  assert first.options == options and second.options == {}
  assert (second.prompt.tolist(), second.max_new_tokens) == ([*b"b"], 9)


def test_jsonl_cuts_ids_and_texts(tmp_path):
  file = tmp_path / "rows.jsonl"
  jsonl.write(file, [{"prompt_token_ids": list(range(10))}, {"prompt": "abcdefgh"}])
  first, second = items_of("jsonl", path=str(file), prompt_tokens=5)
  assert first.prompt.tolist() == [0, 1, 7, 8, 9]
  assert second.prompt.tolist() == [BOS, *b"agh"]


def test_half_a_character_is_that_rows_and_the_rest_runs(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_text(
    '{"prompt": "good"}\n{"prompt": "half \\ud83d"}\n{"messages": [{"role": "\\udc00"}], "request_id": "m"}\n'
  )
  good, half, chat = items_of("jsonl", path=str(file))
  assert isinstance(good, Item)
  assert half == Refused("line-2", f"{file}:2", "'prompt' has the lone surrogate '\\ud83d' at character 5")
  assert isinstance(chat, Refused) and (chat.id, chat.where) == ("m", f"{file}:3")
  assert workloads.refused_by(workloads.read(WorkloadConfig("jsonl", path=str(file)))) == (half, chat)
  assert workloads.refused_by(workloads.read(WorkloadConfig("needle", limit=1, prompt_tokens=300))) == ()
  assert str(half) == f"{file}:2: 'prompt' has the lone surrogate '\\ud83d' at character 5"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("{}", "a row has one of prompt, prompt_token_ids, messages, this one has"),
    ('{"prompt": "a", "prompt_token_ids": [1]}', "a row has one of"),
    ('{"prompt": 5}', '"prompt" is a text, got 5'),
    ('{"prompt_token_ids": "1 2"}', "is a list of token ids"),
    ('{"prompt_token_ids": [1, true]}', "is a list of token ids"),
    ('{"prompt_token_ids": [99999999999]}', "is a list of token ids"),
    ('{"messages": "hi"}', 'a conversation is a list of messages such as [{"role'),
    ('{"messages": []}', "a conversation has at least one message"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "has as part 0 one of type 'image'"),
    (
      '{"prompt": "a", "max_new_tokens": "9"}',
      "max_new_tokens must be an integer of at least 1 and below 2**31, got '9'",
    ),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be an integer of at least 1 and below 2**31, got 0"),
    (
      '{"prompt": "a", "max_new_tokens": true}',
      "max_new_tokens must be an integer of at least 1 and below 2**31, got True",
    ),
    ('{"prompt": "a", "temperature": "0.7"}', "temperature must be finite and at least 0, got '0.7'"),
    ('{"prompt": "a", "temperature": NaN}', "temperature must be finite and at least 0, got nan"),
    ('{"prompt": "a", "top_p": 0}', "top_p must be above 0 and at most 1, got 0"),
    ('{"prompt": "a", "stop_token_ids": 5}', "stop_token_ids must be a list of token ids, got 5"),
    ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos must be True or False, got 1"),
    ('{"prompt": "a", "min_tokens": 40}', "min_tokens must be at most max_tokens=32, got 40"),
    ('{"prompt": "a", "request_id": [1]}', '"request_id" is a text or an integer, got'),
    ('{"prompt": "a", "stop": ["x"]}', 'a row cannot ask for "stop"; it can for max_tokens, max_new_tokens'),
    ('{"prompt": "a", "max_length": 5}', 'a row cannot ask for "max_length"'),
    ('{"prompt": "a", "temprature": 1}', "'temprature' is no option of a row; is 'temperature' meant?"),
    ('{"prompt": "a", "max-tokens": 1}', "'max-tokens' is no option of a row; is 'max_tokens' meant?"),
    ('{"prompt": "half \\ud83d"}', "'prompt' has the lone surrogate '\\ud83d' at character 5"),
    ("{", "not JSON"),
  ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, row, message):
  file = tmp_path / "rows.jsonl"
  file.write_text('{"prompt": "fine"}\n\n' + row + '\n{"prompt": "fine too"}\n')
  first, refused, last = items_of("jsonl", path=str(file))
  assert isinstance(first, Item) and isinstance(last, Item) and isinstance(refused, Refused)
  assert refused.where == f"{file}:3" and message in refused.reason and refused.id == "line-3"
  with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{re.escape(message)}"):
    workloads.read(WorkloadConfig("jsonl", path=str(file), strict=True))
  file.write_text(row)
  with pytest.raises(ValueError, match=rf"none of 1 rows can be served: .*rows\.jsonl:1: .*{re.escape(message)}"):
    workloads.read(WorkloadConfig("jsonl", path=str(file)))


def test_two_rows_of_one_name_are_named_both(tmp_path):
  file = tmp_path / "rows.jsonl"
  for second in ({"prompt": "b", "request_id": "line-1"}, {"prompt_token_ids": [1], "request_id": "line-1"}):
    jsonl.write(file, [{"prompt": "a"}, {"prompt": "c", "request_id": "x"}, second])
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: the request_id 'line-1' is that of .*rows\.jsonl:1 too"):
      workloads.read(WorkloadConfig("jsonl", path=str(file), strict=True))
    assert [(item.id, isinstance(item, Item)) for item in items_of("jsonl", path=str(file))] == [
      ("line-1", True),
      ("x", True),
      ("line-3", False),
    ]
  jsonl.write(file, [{"prompt": "a", "request_id": "line-2"}, {"prompt": 5}])
  assert [item.id for item in items_of("jsonl", path=str(file))] == ["line-2", "line-2-2"]


def test_a_conversation_that_the_template_refuses(tmp_path):
  jsonl.write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
  config = WorkloadConfig("jsonl", path=str(tmp_path / "rows.jsonl"))
  (refused,) = workloads.read(config)(NoTemplate(), 100)
  assert str(refused) == f"{tmp_path / 'rows.jsonl'}:1: there is no chat template"
  with pytest.raises(ValueError, match=r"rows\.jsonl:1: there is no chat template"):
    workloads.read(override(config, {"strict": True}))(NoTemplate(), 100)


@pytest.mark.parametrize(
  ("name", "message"), [("none.jsonl", "is missing"), ("", "is a directory"), ("x", "no prompt")]
)
def test_jsonl_of_nothing(tmp_path, name, message):
  (tmp_path / "x").write_text("\n")
  with pytest.raises(ValueError, match=f"{tmp_path / name}.* {message}"):
    workloads.read(WorkloadConfig("jsonl", path=str(tmp_path / name)))


# ------------------------------------------------------------------------------------------------------------ arrivals


def test_arrivals_all_at_once():
  assert arrival_times(ArrivalConfig(), 3).tolist() == [0, 0, 0]
  with pytest.raises(ValueError, match=r"all at once have no rate of arrivals, got 2\.0"):
    arrival_times(ArrivalConfig(rate=2.0), 3)


def test_arrivals_of_a_poisson_process():
  times = arrival_times(ArrivalConfig("poisson", 4.0, seed=1), 20_000)
  gaps = np.diff(times, prepend=0)
  assert times.dtype == np.float64 and gaps.min() >= 0
  assert np.mean(gaps) == pytest.approx(0.25, rel=0.03) and np.std(gaps) == pytest.approx(0.25, rel=0.05)
  assert np.mean(gaps > 0.25 * np.log(100)) == pytest.approx(0.01, rel=0.3)  # the tail is not clipped
  again, other = (arrival_times(ArrivalConfig("poisson", 4.0, seed=seed), 20_000) for seed in (1, 2))
  assert times.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_requests_cannot_arrive_at_such_a_rate(rate):
  with pytest.raises(ValueError, match=f"the rate of arrivals must be above 0 and finite, .* got {rate}"):
    arrival_times(ArrivalConfig("poisson", rate), 3)


def test_a_process_gives_ascending_times(monkeypatch):
  monkeypatch.setitem(ARRIVALS, "backwards", lambda n, rate, seed: np.arange(n)[::-1])
  with pytest.raises(ValueError, match="'backwards' is to give 3 ascending times"):
    arrival_times(ArrivalConfig("backwards"), 3)
