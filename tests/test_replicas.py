"""Two engines behind one front, as clients meet them: actors of a Ray of this machine alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import openai

from sparse_serve_jax import cluster
from tests.test_server import CODE, GREEDY, IGNORE, PROMPT, SOON, Process, complete

MODEL, NAME = Path("random:tiny"), "--served_model_name=reference"
BEGINNINGS = [f"{i}. {PROMPT}, {PROMPT}" for i in range(2)]  # each more than a block


@pytest.fixture(scope="module")
def server():
  of = Process(MODEL, NAME, "--replicas=2", "--max_waiting=16")
  yield of
  of.close()


def counted(server: Process, name: str) -> dict[str, float]:
  """A number of each replica."""
  lines = server.http.get("/metrics").text.splitlines()
  rows = [line for line in lines if line.startswith(f"sparse_serve_{name}{{")]
  found = dict[str, float]()
  for row in rows:
    label = row.split('replica="')[1].split('"')[0]
    found[label] = found.get(label, 0) + float(row.split()[-1])
  return found


def pids_of_replicas(server: Process) -> list[int]:
  """Of the processes of actors that this server's Ray has started."""
  parents, names = dict[int, int](), dict[int, str]()
  for name in os.listdir("/proc"):
    if name.isdecimal():
      try:
        stat, told = (Path(f"/proc/{name}/{file}").read_text() for file in ("stat", "cmdline"))
      except OSError:
        continue
      parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
      names[int(name)] = told

  def below(pid: int) -> bool:
    return pid == server.process.pid or (pid in parents and below(parents[pid]))

  return [pid for pid, name in names.items() if name.startswith("ray::Replica") and below(pid)]


def test_answers_are_those_of_one_engine_and_beginnings_have_a_replica(server):
  """The endpoints are the same code; what differs is how tokens come."""
  alone = Process(MODEL, NAME)
  try:
    for options in ({}, {"n": 3, "temperature": 1.5, "seed": 5, "logprobs": 2, "stop": ["a"]}):
      ours, theirs = ([c.model_dump() for c in complete(of, **options).choices] for of in (server, alone))
      assert ours == theirs
  finally:
    alone.close()
  before = counted(server, "cached_tokens_total")
  assert set(before) == {"0", "1"}
  cached = [complete(server, BEGINNINGS[i % 2]).usage.prompt_tokens_details.cached_tokens for i in range(6)]
  assert cached[:2] == [0, 0] and min(cached[2:]) >= 32
  gained = {name: n - before[name] for name, n in counted(server, "cached_tokens_total").items()}
  assert all(gained.values())  # each has one of the two
  assert counted(server, "replica_up") == {"0": 1, "1": 1}
  told = server.http.get("/health").json()
  assert told["status"] == "ok" and [told["replicas"][name]["live"] for name in "01"] == [0, 0]


def test_another_command_has_a_ray_of_its_own(server):
  """Which ends with it, and not before."""
  other = Process(MODEL, NAME, "--replicas=2")
  try:
    assert len(pids_of_replicas(other)) == 2 and complete(other).choices[0].text
  finally:
    assert other.close() == 0
  assert complete(server).choices[0].text


@pytest.mark.parametrize("address", ["auto", "ray://nowhere:10001", "nowhere:6379"])
def test_a_cluster_that_is_named_and_not_there(monkeypatch, address):
  """It has its sizes, which Ray may refuse in any way."""
  given = []

  def init(**options):
    given.append(options)
    raise ConnectionError("nobody answers")

  monkeypatch.setenv("RAY_ADDRESS", address)
  monkeypatch.setattr("ray.init", init)
  with pytest.raises(ValueError, match=f"there is no Ray cluster at RAY_ADDRESS={address}: nobody answers"):
    cluster.connect()
  assert len(given) == 1 and "object_store_memory" not in given[0]


def test_errors_are_those_of_one_engine(server):
  with pytest.raises(openai.BadRequestError, match="a request can have 512"):
    complete(server, max_tokens=600)
  with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
    complete(server, [5, 10**6])
  with pytest.raises(openai.RateLimitError, match="this request has 17; 16 may wait"):
    complete(server, n=17)


def test_logprobs_of_a_prompt(server):
  told = complete(server, echo=True, max_tokens=0, logprobs=1).choices[0].logprobs
  assert len(told.tokens) == len(told.token_logprobs) > 10 and told.token_logprobs[0] is None
  assert all(score < 0 for score in told.token_logprobs[1:])


def test_status_is_the_sum_of_what_replicas_tell(server):
  """Both serve a stream: rows with the number of their replica, and sizes and sums of both."""
  before = server.http.get("/status").json()
  body = {**GREEDY, **IGNORE, "max_tokens": 300, "stream": True}
  streams = [server.http.stream("POST", "/v1/completions", json=body | {"prompt": of}) for of in BEGINNINGS]
  with streams[0] as one, streams[1] as other:
    lines = [answer.iter_lines() for answer in (one, other)]
    for of in lines:
      next(of)
    told = server.http.get("/status").json()
    each = [row for row in told["requests"] if row["state"] in ("prefilling", "decoding")]
    assert {row["replica"] for row in each} == {0, 1} and told["live"]["decoding"] + told["live"]["prefilling"] == 2
    assert told["held"]["owned"] == sum(row["pool_blocks"] for row in each) > 0
    for row in each:
      assert 0 <= told["now"] - row["times"][0] < SOON
    for of in lines:
      assert [*of]
  assert told["state"] == "ok" and told["size"]["lanes"] == 6 and told["size"]["max_request_tokens"] == 512
  assert told["replicas"] == {i: {"status": "ok", "live": 1, "restarts": 0, "counted": True} for i in "01"}
  after = server.http.get("/status").json()
  assert after["since_start"]["output_tokens"] == before["since_start"]["output_tokens"] + 600
  assert after["ended"]["length"] == before["ended"].get("length", 0) + 2 and after["live"]["decoding"] == 0
  deadline = time.monotonic() + SOON
  while sum(server.http.get("/status").json()["samples"]["output_tokens_s"]) < 1 and time.monotonic() < deadline:
    time.sleep(0.1)
  columns = server.http.get("/status").json()["samples"]
  assert columns["at"] == sorted(columns["at"]) and max(columns["output_tokens_s"]) > 0


def test_a_client_that_goes_away_is_cancelled(server):
  before = counted(server, "requests_total")
  body = {"prompt": PROMPT, "max_tokens": 450, "stream": True, **IGNORE}
  with server.http.stream("POST", "/v1/completions", json=body) as answer:
    lines = answer.iter_lines()  # kept, as the connection ends with it
    next(lines)
    assert sum(counted(server, "requests_running").values()) == 1
  deadline = time.monotonic() + SOON
  while (after := counted(server, "requests_total")) == before and time.monotonic() < deadline:
    time.sleep(0.02)
  assert sum(counted(server, "requests_running").values()) == 0
  assert 'finish_reason="cancelled"' in server.http.get("/metrics").text
  assert sum(after.values()) == sum(before.values()) + 1


def test_one_that_dies_ends_its_requests_and_comes_again(server):
  body = {**GREEDY, **IGNORE, "max_tokens": 350, "stream": True}
  streams = [server.http.stream("POST", "/v1/completions", json=body | {"prompt": of}) for of in BEGINNINGS]
  with streams[0] as one, streams[1] as other:
    lines = [answer.iter_lines() for answer in (one, other)]
    for of in lines:
      next(of)
    pids = pids_of_replicas(server)
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    ends = [[line for line in of if line][-2:] for of in lines]
  dead = [json.loads(end[0][6:]) for end in ends if '"error"' in end[0]]
  assert len(dead) == 1 and dead[0]["error"]["message"].endswith("has died, and what it had to answer is lost")
  assert [json.loads(end[0][6:])["choices"][0]["finish_reason"] for end in ends if '"error"' not in end[0]] == [
    "length"
  ]
  assert complete(server).choices[0].text  # by the other one
  deadline = time.monotonic() + SOON
  while counted(server, "replica_up") != {"0": 1, "1": 1} and time.monotonic() < deadline:
    time.sleep(0.1)
  assert sum(counted(server, "replica_restarts_total").values()) == 1
  assert server.http.get("/status").json()["size"]["lanes"] == 6
  assert set(counted(server, "requests_running")) == {"0", "1"}


def test_while_none_serves_it_says_so(server):
  for pid in pids_of_replicas(server):
    os.kill(pid, signal.SIGKILL)
  deadline = time.monotonic() + SOON
  while server.http.get("/health").status_code == 200 and time.monotonic() < deadline:
    time.sleep(0.01)
  with pytest.raises(openai.InternalServerError, match="no replica serves now: 0 starting, 1 starting") as refused:
    complete(server)
  assert refused.value.status_code == 503 and counted(server, "replica_up") == {"0": 0, "1": 0}
  told = server.http.get("/status").json()
  assert told["state"] == "failed" and "size" not in told and told["refused"]["503"] == 1
  assert not any(of["counted"] for of in told["replicas"].values())
  while counted(server, "replica_up") != {"0": 1, "1": 1} and time.monotonic() < deadline:
    time.sleep(0.1)
  assert complete(server).choices[0].text


def test_what_does_not_fit_is_told_in_a_line():
  done = subprocess.run(
    [sys.executable, "-c", CODE, "serve", str(MODEL), "--port=0", "--replicas=2", "--set=cache.hbm_bytes=1KB"],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert done.returncode == 2 and len(errors) == 1 and "cache.hbm_bytes=1000" in errors[0], done.stderr


def test_a_signal_ends_it_after_what_it_has(server):
  """The last test of the file."""
  body = {**GREEDY, **IGNORE, "prompt": PROMPT, "max_tokens": 430, "stream": True}
  with server.http.stream("POST", "/v1/completions", json=body) as answer:
    lines = answer.iter_lines()
    next(lines)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert server.http.get("/health").status_code == 503
    rest = [line for line in lines if line]
  assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
  assert server.process.wait(SOON) == 0
  assert not pids_of_replicas(server)
