"""The client of an endpoint: what it sends and when, what it reads and times, and what it makes of errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("httpx2")
from sparse_serve_jax.benchmarks import endpoint as asking
from sparse_serve_jax.benchmarks.endpoint import Endpoint
from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.workloads import Item, Refused
from tests import forks, jsonl
from tests.fake_endpoint import DONE, STREAM, FakeEndpoint, event, piece, response, usage

ROOT = Path(__file__).resolve().parent.parent
LATE = 2.0  # seconds that a busy machine may add


def item(name: str = "a", text: str = "Hello", n: int = 4, **options) -> Item:
  return Item(name, np.frombuffer(text.encode(), np.uint8).astype(np.int32), n, options)


def gaps(row: dict) -> np.ndarray:
  return metrics.gaps(row["token_s"], row["output_tokens"])


def serve(server: FakeEndpoint, items, arrivals=None, send="ids", timeout_s=60.0, **more) -> list[dict]:
  told = []
  endpoint = Endpoint(server.url, "fake", send, timeout_s=timeout_s)
  arrivals = np.zeros(len(items)) if arrivals is None else arrivals
  rows = asking.serve(endpoint, items, arrivals, ByteTokenizer(), told.append, **more)
  assert told == rows
  return rows


# ---------------------------------------------------------------------------------------------------------------- times


def test_times_are_those_at_which_pieces_came():
  waits = [0.15, 0.05, 0.2]

  def script(_, __):
    yield STREAM
    for i, wait in enumerate(waits):
      yield wait
      yield piece("abc"[i], "length" if i == 2 else None)
    yield usage(5, 3)
    yield DONE

  with FakeEndpoint(script) as server:
    (row,) = serve(server, [item()], [0.1])
  assert (row["text"], row["finish_reason"], row["output_tokens"], row["counted_by"]) == ("abc", "length", 3, "server")
  assert row["prompt_tokens"] == 5 and row["arrival_s"] == 0.1 <= row["sent_s"] < 0.1 + LATE
  # The server's clock is the client's: no piece came before it was sent, nor long after.
  (seen,) = server.seen
  for at, sent in zip(row["token_s"], seen.sent[1:], strict=False):  # the server's clock is the client's
    assert sent - seen.at <= at - row["sent_s"] < sent - seen.at + LATE
  assert row["first_token_s"] == row["token_s"][0] >= 0.25 and row["finish_s"] >= row["token_s"][-1]
  assert len(gaps(row)) == 2
  told = asking.summarize([row])
  assert told["ttft_mean_s"] == pytest.approx(row["first_token_s"] - 0.1)
  assert told["tbt_mean_s"] == pytest.approx((row["token_s"][2] - row["token_s"][0]) / 2)
  assert told["throughput_tok_s"] == pytest.approx(3 / (row["finish_s"] - 0.1))


@pytest.mark.parametrize(
  ("sent", "told", "between"),
  [
    ([(1.0, "a", None), (2.0, "b", None), (4.0, "", "stop")], 2, [1.0]),  # the end is no token
    ([(1.0, "a", None), (2.0, "b", None), (4.0, "", "stop")], 3, [1.0, 2.0]),  # it is one, whose text is empty
    ([(1.0, "", None), (2.0, "b", None), (4.0, "c", "length")], 3, [1.0, 2.0]),  # so is a text that is held back
    ([(1.0, "a", None), (4.0, "bcd", "length")], 4, [3.0, 0.0, 0.0]),  # three came together
    ([(1.0, "a", None), (2.0, "b", None), (4.0, "c", "stop")], 2, [1.0]),  # what was held back is no token
  ],
)
def test_gaps_are_between_tokens(sent, told, between):
  answer = asking.Answer()
  for at, text, finish in sent:
    asking._take({"choices": [{"text": text, "finish_reason": finish}]}, answer, at)
  asking._take({"choices": [], "usage": {"completion_tokens": told}}, answer, 5.0)
  row = asking.row_of(item(), answer, 0.0, 0.0, 5.0, 0.0, ByteTokenizer())
  assert gaps(row).tolist() == between and row["output_tokens"] == told


def test_requests_are_sent_when_they_are_due_however_many_wait():
  """None is answered until all eight have come."""

  def script(_, __):
    while len(server.seen) < 8:
      yield 0.005
    yield STREAM + piece("x", "length") + usage(5, 1) + DONE

  arrivals = np.arange(8) * 0.04
  with FakeEndpoint(script) as server:
    rows = serve(server, [item(str(i)) for i in range(8)], arrivals, timeout_s=20.0)
  assert asking.summarize(rows)["failed"] == 0
  assert server.most_live == 8 == asking.summarize(rows)["most_in_flight"]
  assert sorted(row["arrival_s"] for row in rows) == arrivals.tolist()
  late = [row["sent_s"] - row["arrival_s"] for row in rows]
  assert min(late) >= 0 and max(late) < LATE and [seen.at for seen in server.seen] == sorted(s.at for s in server.seen)


def test_a_cap_makes_requests_wait_and_the_wait_counts():
  def script(_, __):
    yield 0.1
    yield STREAM + piece("x", "length") + usage(5, 1) + DONE

  with FakeEndpoint(script) as server:
    rows = serve(server, [item(str(i)) for i in range(6)], concurrency=2)
  told = asking.summarize(rows)
  assert server.most_live == 2 == told["most_in_flight"]
  assert told["requests"] == 6 and told["client_delay_p99_s"] >= 0.19 and told["ttft_p99_s"] >= 0.29
  assert told["ttft_mean_s"] >= told["client_delay_mean_s"] + 0.099
  assert told["throughput_tok_s"] <= 6 / 0.3


# --------------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_stream_may_be_cut_anywhere(newline):
  """A byte at a time, with comments and separators of lines that are none here."""
  text = "é漢😀\u2028\x85\x0c\ndone"
  stream = b": ping\n\n" + b"".join(map(piece, text)) + b"event: message\n" + piece("", "stop") + usage(5, 9) + DONE
  stream = stream.replace(b"\n", newline.encode())

  def script(_, __):
    yield STREAM
    for i in range(len(stream)):
      yield stream[i : i + 1]
      yield 0.001  # so that pieces are not joined

  with FakeEndpoint(script) as server:
    (row,) = serve(server, [item()])
  assert row["text"] == text and row["finish_reason"] == "stop" and "error" not in row
  assert row["output_tokens"] == 9 == len(row["token_s"]) and row["token_s"] == sorted(row["token_s"])


def test_tokens_are_counted_here_where_the_server_does_not():
  with FakeEndpoint(lambda *_: [STREAM + piece("é") + piece("ab", "stop")]) as server:
    (row,) = serve(server, [item(text="12345678")])
  assert (row["output_tokens"], row["counted_by"], row["prompt_tokens"]) == (4, "tokenizer", 8)  # bytes
  assert gaps(row).size == 3 and row["cached_tokens"] is None


def test_a_conversation():
  def delta(finish=None, **of):
    return event({"choices": [{"index": 0, "delta": of, "finish_reason": finish}]})

  def script(_, __):
    yield STREAM + delta(role="assistant", content="")
    yield 0.1
    yield delta(content="hi") + delta(content=None, reasoning_content="!") + delta("stop")
    yield usage(30, 3, prompt_tokens_details={"cached_tokens": 16}) + DONE

  with FakeEndpoint(script) as server:
    (row,) = serve(server, [item(text="Ask", temperature=0.5, top_k=3)], send="chat")
  (seen,) = server.seen
  assert seen.path == "/v1/chat/completions" and seen.body["messages"] == [{"role": "user", "content": "Ask"}]
  assert (seen.body["temperature"], seen.body["top_k"], seen.body["max_tokens"]) == (0.5, 3, 4)
  assert row["text"] == "hi!" and row["first_token_s"] - row["sent_s"] >= 0.1  # the role is no token
  assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (30, 16, 3)


def test_what_is_sent():
  asked = [item("plain"), item("goes_on", ignore_eos=True, stop_token_ids=(7,))]
  with FakeEndpoint(lambda *_: [STREAM + piece("x", "stop") + DONE]) as server:
    serve(server, asked, concurrency=1)
    serve(server, [item()], send="text", ignore_eos=True)
  plain, goes_on, text = (seen.body for seen in server.seen)
  assert plain == {
    "model": "fake",
    "prompt": list(b"Hello"),
    "max_tokens": 4,
    "temperature": 0.0,
    "stream": True,
    "stream_options": {"include_usage": True},
  }
  assert goes_on == plain | {"ignore_eos": True, "stop_token_ids": [7]}
  assert text == plain | {"ignore_eos": True, "prompt": "Hello"}
  assert {seen.path for seen in server.seen} == {"/v1/completions"}


def test_a_warm_up_asks_for_each_length_and_then_for_several_at_once():
  """With other prompts of the same tokens, few tokens of output, and nothing that a server refuses."""

  def script(i, seen):
    while i >= 3 and len(server.seen) < 3 + 16:  # the second part is on its way at once
      yield 0.005
    yield STREAM + piece("x", "length") + usage(len(seen.body["prompt"]), 1) + DONE

  sizes = [(64, 4), (60, 4), (150, 1), *[(270, 40)] * 20]
  rng = np.random.default_rng(0)
  items = [Item(str(i), rng.permutation(length), n, {"min_tokens": n}) for i, (length, n) in enumerate(sizes)]
  with FakeEndpoint(script) as server:
    rows = asking.warm_up(Endpoint(server.url, "fake"), [Refused("r", "in.jsonl:1", "no"), *items], ByteTokenizer())
    asked = [seen.body for seen in server.seen]
    once = asking.warm_up(Endpoint(server.url, "fake"), items, ByteTokenizer(), concurrency=1)
  assert len(asked) == len(rows) == len(once) == 3 + 16 and not any("error" in row for row in rows + once)
  # 60 and 64 tokens are as one length, of which the longest is asked for.
  assert [(len(body["prompt"]), body["max_tokens"]) for body in asked[:3]] == [(64, 2), (150, 1), (270, 2)]
  assert {body["max_tokens"] for body in asked[3:]} == {4, 1, 16}
  assert all(body["min_tokens"] <= body["max_tokens"] for body in asked)
  prompts = [tuple(prompt) for prompt in [*(it.prompt.tolist() for it in items), *(body["prompt"] for body in asked)]]
  assert len(set(prompts)) == len(prompts) and {tuple(sorted(prompt)) for prompt in prompts} == {
    tuple(range(length)) for length, _ in sizes
  }


# --------------------------------------------------------------------------------------------------------------- errors

FAULTS = {
  response("429 Too Many", json.dumps({"error": {"message": "the queue\nis full"}}, indent=2)): "HTTP 429: the queue",
  response("500 Oops", "\n<html>broken\nmore</html>", "text/html"): "HTTP 500: <html>broken",
  response("404 Not Found", ""): "HTTP 404: nothing more",
  response("200 OK", '{"choices": []}'): "Expected response with content type 'text/event-stream'",
  STREAM + piece("a") + piece("b"): "the stream ended after 2 pieces, without telling its end",
  STREAM + piece("a") + event({"error": {"message": "out of memory"}}): "in the stream: out of memory",
  STREAM + piece("a") + b"data: {broken\n\n": "a piece of the stream is not what the API has: {broken",
  STREAM + b"data: [1]\n\n": "a piece of the stream is not what the API has: [1]",
}


def test_errors_are_told_with_what_came_and_the_others_go_on():
  scripts = [
    *([fault] for fault in FAULTS),
    [STREAM.replace(b"connection: close", b"content-length: 900") + piece("a"), 0.05, None],
    [STREAM + piece("a"), 60.0],
    [STREAM + piece("good", "stop") + usage(5, 4) + DONE],
  ]
  items = [Refused("refused", "in.jsonl:3", "no prompt"), *(item(str(i)) for i in range(len(scripts)))]
  with FakeEndpoint(lambda i, _: scripts[i]) as server:
    refused, *rows, good = serve(server, items, concurrency=1, timeout_s=1.5)
  assert refused["finish_reason"] == "refused" and refused["error"] == "in.jsonl:3: no prompt"
  for row, expected in zip(
    rows, [*FAULTS.values(), "after 1 pieces", "no end within 1.5 s, after 1 pieces"], strict=True
  ):
    assert row["finish_reason"] == "error" and expected in row["error"] and "\n" not in row["error"]
  assert good["text"] == "good" and rows[4]["text"] == "ab"  # what came is kept
  told = asking.summarize([refused, *rows, good])
  assert (told["requests"], told["failed"], told["refused"], told["output_tokens"]) == (1, 10, 1, 4)


def test_a_server_that_goes_away():
  with FakeEndpoint(lambda *_: [None]) as server:
    url = server.url
  rows = asking.serve(Endpoint(url, "fake"), [item()], [0.0], ByteTokenizer(), lambda row: None)
  assert rows[0]["error"].startswith("ConnectError")
  told = asking.summarize(rows)
  assert told["requests"] == 0 and told["ttft_mean_s"] is told["throughput_tok_s"] is told["cached_tokens"] is None


def test_a_row_that_cannot_be_kept_ends_it():
  def full(row):
    raise OSError("no space left")

  with (
    FakeEndpoint(lambda *_: [STREAM + piece("x", "stop") + DONE]) as server,
    pytest.raises(OSError, match="no space"),
  ):
    asking.serve(Endpoint(server.url, "fake"), [item()], [0.0], ByteTokenizer(), full)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", ""])
def test_a_url_that_is_none_is_refused(url):
  with pytest.raises(ValueError, match="begins with http"):
    Endpoint(url, "fake")


def test_addresses_and_keys():
  for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
    assert Endpoint(url, "m").path("models") == "http://h:1/v1/models"
  assert Endpoint("http://h/x/v1", "m").path("completions") == "http://h/x/v1/completions"
  secret = Endpoint("http://h", "m", key="sesame")
  assert secret.headers == {"authorization": "Bearer sesame"} and "sesame" not in repr(secret)
  with pytest.raises(ValueError, match="not as 'words'"):
    Endpoint("http://h", "m", "words")


LISTED, TWO = (
  response("200 OK", json.dumps({"data": [{"id": name} for name in names]})) for names in (["b"], ["b", "c"])
)


@pytest.mark.parametrize(
  ("named", "models", "expected"),
  [
    ("fake", response("404 Not Found", "no"), {}),
    ("b", LISTED, {"id": "b"}),
    ("", LISTED, {"id": "b"}),
    (
      "fake",
      response("401 Unauthorized", json.dumps({"error": {"message": "which key?"}})),
      r"answers HTTP 401: which key\?",
    ),
    ("fake", TWO, "no model 'fake', only b, c"),
    ("", TWO, "has 2 models, name one of b, c"),
    ("", response("404 Not Found", "no"), "answers HTTP 404: no"),
    ("fake", response("200 OK", "welcome"), "does not answer with a list of models: welcome"),
  ],
)
def test_what_an_endpoint_says_of_its_models(named, models, expected):
  with FakeEndpoint(lambda *_: [], models) as server:
    if isinstance(expected, dict):
      found = Endpoint(server.url, expected.get("id", named))
      assert asking.look_up(Endpoint(server.url, named)) == (found, expected)
    else:
      with pytest.raises(ValueError, match=expected):
        asking.look_up(Endpoint(server.url, named))


# -------------------------------------------------------------------------------------------------------------- command


def bench(server: FakeEndpoint, *arguments: str):
  flags = [f"--url={server.url}", "--model=fake", "--tokenizer=random:tiny", "--nowarm_up", *arguments]
  return forks.start("experiments.bench", *flags, OPENAI_API_KEY="sesame")


def rows_of(folder: Path) -> list[dict]:
  return jsonl.read(folder / "requests.jsonl")


def test_the_command_measures_and_goes_on(tmp_path):
  def script(_, seen):
    yield STREAM + piece("12", None) + piece("3", "length") + usage(len(seen.body["prompt"]), 3) + DONE

  asked = (
    "--workload=text",
    "--prompt_tokens=50",
    "--max_new_tokens=3",
    "--limit=6",
    "--rate=100",
    f"--out={tmp_path}",
  )
  with FakeEndpoint(script) as server:
    done = bench(server, *asked)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    told = json.loads(last)
    assert (told["requests"], told["output_tokens"], told["prompt_tokens"], told["failed"]) == (6, 18, 300, 0)
    assert [line.split()[0] for line in table] == ["fake", *told]
    assert all(seen.body["ignore_eos"] and seen.headers["authorization"] == "Bearer sesame" for seen in server.seen)
    rows, run = rows_of(tmp_path), (tmp_path / "run.json").read_text()
    assert {row["request_id"] for row in rows} == {f"text-{i}" for i in range(6)} and "sesame" not in run
    assert json.loads(run)["setting"]["endpoint"] == {
      "url": server.url,
      "model": "fake",
      "send": "ids",
      "owned_by": "tests",
      "max_model_len": 4096,
    }

    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + '{"request_id": "te')
    done = bench(server, *asked)
    assert done.returncode == 0 and "2 requests had rows" in done.stderr and len(server.seen) == 6 + 4
    assert {row["request_id"] for row in rows_of(tmp_path)} == {row["request_id"] for row in rows}
    done = bench(server, *asked, "--concurrency=3")
    assert done.returncode == 2 and "concurrency was None and is 3" in done.stderr and len(server.seen) == 10


def test_the_command_warms_up_before_it_measures(tmp_path):
  def script(i, _):
    yield STREAM + (piece("12", "length") + DONE if i else event({"error": {"message": "too cold"}}))

  asked = ("--workload=text", "--prompt_tokens=50", "--limit=3", "--warm_up", f"--out={tmp_path}")
  with FakeEndpoint(script) as server:
    done = bench(server, *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["requests"] == 3 == len(rows_of(tmp_path))
    assert [seen.body["max_tokens"] for seen in server.seen] == [2, 16, 16, 16, 128, 128, 128]
    assert "1 failed, the first with: in the stream: too cold" in done.stderr
    asked_for = len(server.seen)
    done = bench(server, *asked)  # nothing is left to ask for
    assert done.returncode == 0 and len(server.seen) == asked_for and "warm-up" not in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["requests"], told["output_tokens"]) == (3, 6) and told["throughput_tok_s"] is None
    assert f"nothing is left to run: all 3 requests have rows in {tmp_path}" in done.stderr
    done = bench(server, *asked, "--nowarm_up")
    assert done.returncode == 2 and "warm_up was True and is False" in done.stderr


def test_the_command_says_what_failed(tmp_path):
  with FakeEndpoint(lambda *_: [response("503 Busy", "come later\nplease")]) as server:
    done = bench(server, "--limit=2", "--prompt_tokens=300")
    assert done.returncode == 1 and json.loads(done.stdout.splitlines()[-1])["failed"] == 2
    assert [line for line in done.stderr.splitlines() if "error: needle-" in line] == [
      f"error: needle-{i}: HTTP 503: come later" for i in range(2)
    ]
  done = bench(server, "--limit=2", f"--out={tmp_path / 'none'}")
  assert done.returncode == 2 and "no answer from" in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "none").exists()


def test_an_interrupt_ends_it_and_keeps_rows(tmp_path):
  """While requests are on their way."""

  def script(i, _):
    yield STREAM + piece("x", *(["stop"] if i == 0 else []))
    yield DONE if i == 0 else 60.0

  with FakeEndpoint(script) as server:
    flags = [f"--url={server.url}", "--model=fake", "--tokenizer=random:tiny", "--workload=text", "--nowarm_up"]
    flags.append(f"--out={tmp_path}")
    command = [sys.executable, "-m", "experiments.bench", *flags, "--limit=3", "--concurrency=2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(server.seen) < 3 and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
  assert process.returncode == 130, said
  assert said.strip().splitlines()[-1].startswith("interrupted; rows so far are in") and "Traceback" not in said
  assert [row["text"] for row in rows_of(tmp_path)] == ["x"]
