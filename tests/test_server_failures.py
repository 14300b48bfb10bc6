"""Servers: how they start, whose device or parts fail, whose clients do not read, and that are told to end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import httpx

from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.models.tokenizer import NoTokenizer
from sparse_serve_jax.outputs import Reading
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server import app, replicas, serve
from sparse_serve_jax.server.engines import One
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.server.limits import Limits
from sparse_serve_jax.server.pulse import Health
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.plan import TokenLogprobs
from tests.fake_engine import continuation, fake_executor
from tests.fake_fleet import Model, Standing, fleet, serving
from tests.fake_ray import until
from tests.test_served import BODY, one
from tests.test_served import PROMPT as IDS
from tests.test_server import CODE, ERROR, KEY, PROMPT, ROOT, SETTINGS, SOON, Process, complete, with_template

# The device fails for good once a file is there; memory ends once another is; few bytes that nobody reads are kept.
PLANTED = """
import os, socket
from sparse_serve_jax.serving import budget
from sparse_serve_jax.serving.executor import JaxExecutor

def failing(works):
  def call(*given):
    if os.path.exists({gone!r}):
      raise RuntimeError("device gone")
    return works(*given)
  return call

JaxExecutor.submit, JaxExecutor.reset = failing(JaxExecutor.submit), failing(JaxExecutor.reset)
from sparse_serve_jax.server import serve

def small(address, bind=serve.bind):
  made = bind(address)
  made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
  return made

serve.bind = small
free = budget.bytes_free
budget.bytes_free = lambda: 3 << 20 if os.path.exists({full!r}) else free()
"""
LONG = {"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def planted(tmp_path):
  gone, full = tmp_path / "gone", tmp_path / "full"
  server = Process(with_template(tmp_path), before=PLANTED.format(gone=str(gone), full=str(full)))
  yield server, gone, full
  server.close()


def test_an_engine_that_fails_for_good(planted):
  server, gone, full = planted
  whole = complete(server, echo=True, logprobs=0, max_tokens=2).choices[0]
  full.touch()
  refused = server.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0})
  assert refused.status_code == 400 and set(refused.json()["error"]) == ERROR
  assert "tokens take 0." in (said := refused.json()["error"]["message"]) and "0.00 GiB of memory are free" in said
  full.unlink()
  assert complete(server, echo=True, logprobs=0, max_tokens=2).choices[0].logprobs == whole.logprobs

  answers = list[httpx.Response]()
  url, headers = f"{server.url}/v1/completions", server.http.headers
  asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json=LONG, headers=headers, timeout=SOON)))
  with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
    lines = stream.iter_lines()
    next(lines)
    asking.start()
    until = time.monotonic() + SOON
    while server.number("requests_running") < 2 and time.monotonic() < until:
      time.sleep(0.01)
    gone.touch()
    *_, error, done = [line for line in lines if line]
  asking.join(SOON)
  assert done == "data: [DONE]" and "device gone" in json.loads(error[6:])["error"]["message"]
  answers.append(server.http.post("/v1/completions", json=LONG))  # comes after the failure
  for answer in answers:
    assert answer.status_code == 500 and set(answer.json()["error"]) == ERROR
    assert "device gone" in answer.json()["error"]["message"] and answer.json()["error"]["type"] == "server_error"
  health = server.http.get("/health")
  assert (health.status_code, health.json()) == (503, {"status": "failed"})
  server.process.send_signal(signal.SIGTERM)
  assert server.process.wait(SOON) == 1


def read_when(told: threading.Event, server: Process) -> str:
  """The text of a stream whose client asks, and reads when it is told."""
  host, port = server.url.removeprefix("http://").split(":")
  body = json.dumps(LONG | {"stream": True, "logprobs": 20, "max_tokens": 150})
  head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the server cannot send all of it
    connection.connect((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    told.wait()
    connection.settimeout(SOON)
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
  assert len(answer) > 100_000  # beyond what buffers of system and server hold: 64 KiB and a little
  lines = answer.decode().splitlines()
  events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
  assert "data: [DONE]" in lines
  return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_a_client_that_stops_reading_holds_nobody(planted, seconds):
  """And a second signal ends the server at once, whatever it has."""
  server, told, texts = planted[0], threading.Event(), list[str]()
  text = complete(server).choices[0].text
  slow = threading.Thread(target=lambda: texts.append(read_when(told, server)), daemon=True)
  slow.start()
  until, n = time.monotonic() + seconds, 0
  while time.monotonic() < until or n < 3:
    assert complete(server).choices[0].text == text
    n += 1
  told.set()
  slow.join(4 * SOON)
  assert texts == [complete(server, max_tokens=150).choices[0].text]

  with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 3}) as stream:
    lines = stream.iter_lines()  # kept, as the connection ends with it
    next(lines)
    server.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + SOON
    while httpx.get(f"{server.url}/health").status_code == 200 and time.monotonic() < until:
      time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)  # within a moment it is the same one: `timeout` sends two
    with pytest.raises(subprocess.TimeoutExpired):
      server.process.wait(0.7)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SOON) == 128 + signal.SIGTERM and time.monotonic() - began < 10  # it may drain for 300


@pytest.mark.parametrize(
  ("arguments", "key", "said"),
  [
    (["absent", "--port={port}"], "a", "port {port} of 127.0.0.1 is in use"),  # before the model is looked for
    (["absent"], "a", "'absent' is no model"),
    (["random:tiny", "--api_key="], "a", "an API key has at least one character"),
    (["random:tiny"], "", "SPARSE_SERVE_API_KEY is empty"),
    (["absent", "--host=nowhere.invalid"], "a", "Name or service not known: nowhere.invalid, port 8000"),
  ],
)
def test_what_cannot_begin_ends_in_one_line(arguments, key, said):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    said, *arguments = [of.format(port=taken.getsockname()[1]) for of in (said, *arguments)]
    environment = {**os.environ, "SPARSE_SERVE_API_KEY": key}
    sizes = ["--set=cache.dram_bytes=2MiB", "--set=cache.hbm_bytes=2MiB"]
    command = [sys.executable, "-c", CODE, "serve", *arguments, *sizes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * SOON)
  (line,) = [line for line in done.stderr.splitlines() if not line.startswith("random:tiny would")]
  assert done.returncode == 2 and line.startswith("error: ") and said in line and not done.stdout
  assert "Errno" not in line


def test_of_two_servers_that_start_at_once_one_has_the_port(monkeypatch):
  """Both may have bound it before one of them listens."""
  with serve.bind(("127.0.0.1", 0)) as first:
    address = first.getsockname()
    with pytest.raises(OSError, match=f"^port {address[1]} of 127.0.0.1 is in use$"):
      serve.bind(address)

  whole = socket.socket

  class Late(whole):
    def listen(self, *_: int) -> None:
      with whole() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(self.getsockname())
        other.listen()
        super().listen()

  monkeypatch.setattr(socket, "socket", Late)
  with pytest.raises(OSError, match=f"^port {address[1]} of 127.0.0.1 is in use$"):
    serve.bind(address)


def test_the_folder_one_is_in_has_a_name():
  command = [sys.executable, "-c", CODE, "serve", ".", "--port=0", *(f"--set={of}" for of in SETTINGS)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  at, out = ROOT / "models/reference", subprocess.PIPE
  with subprocess.Popen(command, cwd=at, env=environment, stdout=out, text=True) as process:
    assert process.stdout is not None and process.stdout.readline().startswith("serving reference at http://")
    process.terminate()


@pytest.mark.parametrize(
  ("host", "key", "says"), [("127.0.0.1", None, []), ("0.0.0.0", "a", []), ("0.0.0.0", None, ["0.0.0.0, port"])]
)
def test_who_may_reach_a_server_is_told_where_it_asks_for_no_key(caplog, host, key, says):
  async def run():
    async with serving(one(), host=host, key=key) as http:
      assert (await http.post("/v1/completions", json=BODY)).status_code == 200

  asyncio.run(run())
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == len(says) and all(of in line for of, line in zip(says, said, strict=True))


def test_without_a_tokenizer_token_ids_are_served_and_texts_are_refused(tmp_path, caplog):
  model = Model(tokenizer=NoTokenizer(tmp_path))  # type: ignore[arg-type]
  text = BODY | {"prompt": "a"}
  asked = [("v1/completions", text, "prompt"), ("v1/completions", BODY | {"prompt": ["a"]}, "prompt")]
  asked += [("v1/completions", BODY | {"stop": "a"}, None), ("tokenize", {"prompt": "a"}, "prompt")]
  asked += [("v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages")]
  asked += [("detokenize", {"tokens": [1]}, "tokens")]

  async def run():
    async with serving(One(Engine(fake_executor()), model), model=model) as http:  # type: ignore[arg-type]
      (said,) = [record.getMessage() for record in caplog.records]
      assert said == "fake has no tokenizer: only token ids are served, texts and conversations are refused"
      whole = (await http.post("/v1/completions", json=BODY)).json()
      assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == ("", 5)
      for path, body, param in asked:
        answer = await http.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), path
        assert "model has no tokenizer" in error["message"] and str(tmp_path) not in error["message"]

  asyncio.run(run())


def test_logits_that_are_not_finite_are_told_without_the_engines_name_of_the_request():
  executor = fake_executor()
  executor.not_finite.add("request-0")

  async def run():
    async with serving(One(Engine(executor), Model())) as http:  # type: ignore[arg-type]
      answer = await http.post("/v1/completions", json=BODY)
      said = answer.json()["error"]["message"]
      assert answer.status_code == 500 and "logits after 20 tokens are not finite" in said and "request-0" not in said

  asyncio.run(run())


def test_a_replica_that_dies_after_a_stop_string_is_told(monkeypatch):
  """Before it has told the end."""
  prompt = [33, 81, 88]
  tokens = continuation(prompt, 2)
  with fleet(monkeypatch, 1, 20) as (of, ray, (device,)):
    monkeypatch.setattr(of, "cancel", lambda *_: (ray.actors[0].die(), device.goes.set()))
    execute, n_made = device.executor.execute, itertools.count(1)

    def standing(plan: Any) -> Any:
      if next(n_made) == 4:
        device.goes.clear()
      return execute(plan)

    monkeypatch.setattr(device.executor, "execute", standing)

    async def run():
      async with serving(of) as http:
        body = BODY | {"prompt": prompt, "max_tokens": 20, "stop": chr(tokens[1])}
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "replica 0 has died, and what it had to answer is lost"

    asyncio.run(run())


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("no replica serves"), 503), (KeyError("a mistake"), 500)])
def test_of_a_request_that_is_refused_in_part_nothing_goes_on(monkeypatch, error, status):
  """The engine may fail between two of its outputs. Its prompts wait for no scores then."""
  of = one()
  submit, calls = of.submit, []

  def failing(*given: Any, **options: Any) -> Any:
    calls.append(given)
    if len(calls) == 2:
      raise error
    return submit(*given, **options)

  monkeypatch.setattr(of, "submit", failing)

  async def run():
    async with serving(of, Limits(max_waiting=3)) as http:
      body = BODY | {"n": 3, "max_tokens": 40, "echo": True, "logprobs": 0}
      assert (await http.post("/v1/completions", json=body)).status_code == status
      async with asyncio.timeout(20):
        while not (ended := (await http.get("/status")).json()["ended"]):
          await asyncio.sleep(0.01)
      assert ended == {"cancelled": 1}
      assert (await http.post("/v1/completions", json=BODY | {"n": 3})).status_code == 200

  asyncio.run(run())


def test_an_output_without_a_text_ends_no_other(monkeypatch):
  """A tokenizer that fails at a token."""
  of, bad = one(), [9] * 9
  (token,) = continuation(bad, 1)
  good = [p for p in ([i] * 5 for i in range(40)) if token not in continuation(p, 5)][:6]
  decode = ByteTokenizer.decode

  def failing(self: Any, ids: Any, *options: Any, **named: Any) -> str:
    if token in ids:
      raise KeyError(token)
    return decode(self, ids, *options, **named)

  monkeypatch.setattr(ByteTokenizer, "decode", failing)

  async def run():
    async with serving(of) as http:
      asking = [http.post("/v1/completions", json=BODY | {"prompt": prompt}) for prompt in (bad, *good)]
      async with asyncio.timeout(20):
        failed, *others = await asyncio.gather(*asking)
      assert failed.status_code == 500 and "KeyError" in failed.json()["error"]["message"]
      assert [answer.json()["choices"][0]["text"] for answer in others] == [
        decode(ByteTokenizer(), continuation(prompt, 5)) for prompt in good
      ]

  asyncio.run(run())


def test_a_place_is_looked_after_whatever_its_replica_raises(monkeypatch):
  with fleet(monkeypatch, 1, 20) as (of, *_):
    news, mistakes = replicas.Replica.news, [KeyError("a mistake")]

    def raises(of: Any) -> Any:
      if mistakes:
        raise mistakes.pop()
      return news(of)

    monkeypatch.setattr(replicas.Replica, "news", raises)
    until(lambda: of.health().replicas["0"].restarts == 1)
    stream = of.submit(IDS, sink=lambda *_: None, params=SamplingParams(max_tokens=5, ignore_eos=True))
    assert stream.result(20).output_tokens == continuation(IDS, 5)


def test_a_sample_that_fails_ends_no_watch(monkeypatch, caplog):
  """The one after it finds the engine stuck, and gives its requests up."""
  monkeypatch.setattr(app, "SAMPLE_S", 0.0)
  told: list[Any] = [OSError("no such file"), Health("ok"), Health("stuck", 7)]
  given_up: list[Refused] = []

  def health() -> Health:
    if not told:
      raise asyncio.CancelledError
    if isinstance(first := told.pop(0), Exception):
      raise first
    return first

  of = SimpleNamespace(
    engines=SimpleNamespace(sample=lambda: None, health=health), outputs=SimpleNamespace(give_up=given_up.append)
  )
  with pytest.raises(asyncio.CancelledError):
    asyncio.run(app.Server.sample(of))  # type: ignore[arg-type]
  assert [refused.status for refused in given_up] == [500] and "no such file" in caplog.text


def test_scores_that_an_engine_owes_when_it_fails_are_told_as_an_error():
  """Of the prompt that broke it, and of one that waits."""
  of, go = one(), threading.Event()
  calls, body = of._loop._calls, {"prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 0}

  def breaks(prompt: list[int], n_top: int) -> Any:
    go.wait(SOON)
    raise SystemExit("from far below")

  vars(of)["_scorer"] = breaks

  async def run():
    async with serving(of) as http:
      asking = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
      async with asyncio.timeout(SOON):
        while not calls:
          await asyncio.sleep(0.01)
      go.set()
      for answer in await asyncio.gather(*asking):
        assert answer.status_code == 500 and "from far below" in answer.json()["error"]["message"]

  asyncio.run(run())


def test_prompts_that_wait_for_their_scores_wait_too():
  """As outputs do, of which only so many may."""
  of, begun, go = one(), threading.Event(), threading.Event()
  body = {"prompt": [IDS, IDS], "max_tokens": 0, "echo": True, "logprobs": 0}

  def slow(prompt: list[int], n_top: int) -> Any:
    begun.set()
    go.wait(SOON)
    return [None, *[TokenLogprobs(-1.0, {})] * (len(prompt) - 1)]

  vars(of)["_scorer"] = slow

  async def run():
    async with serving(of, Limits(max_waiting=5)) as http:
      asking = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]
      await asyncio.to_thread(begun.wait, SOON)
      done, _ = await asyncio.wait(asking, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
      assert [task.result().status_code for task in done] == [429]
      go.set()
      assert sorted(answer.status_code for answer in await asyncio.gather(*asking)) == [200, 200, 429]
      assert (await http.post("/v1/completions", json=body)).status_code == 200

  asyncio.run(run())


def test_what_comes_after_all_was_given_up_is_refused():
  """A body that was on its way when the server began to end, and comes when it waits no longer."""
  executor = fake_executor()
  of, device = One(Engine(executor), Model()), Standing(executor)  # type: ignore[arg-type]
  device.goes.clear()
  body = json.dumps(BODY).encode()

  async def run():
    async with serving(of, Limits(drain_seconds=0.2), signals=False) as http:
      reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
      writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body[:5]))
      await http.get("/health")
      os.kill(os.getpid(), signal.SIGTERM)
      await asyncio.sleep(1)
      writer.write(body[5:])
      answer = await asyncio.wait_for(reader.read(), SOON)
      device.goes.set()
      assert answer.startswith(b"HTTP/1.1 503") and b"the server ends" in answer
      writer.close()

  try:
    asyncio.run(run())
  finally:
    device.goes.set()


@pytest.mark.parametrize(
  ("wrong", "param"),
  [
    ({"stop": [f"zz{i}" for i in range(129)]}, "stop"),
    ({"stop_token_ids": [*range(97), *range(928)]}, "stop_token_ids"),
  ],
)
def test_stops_that_would_hold_up_everybody_are_refused(wrong, param):
  """Each is looked for with each token, in the thread that answers everybody."""

  async def run():
    async with serving(one()) as http:
      answer = await http.post("/v1/completions", json=BODY | wrong)
      assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
      fits = {param: wrong[param][1:]}
      assert (await http.post("/v1/completions", json=BODY | fits)).status_code == 200

  asyncio.run(run())


def test_a_long_stop_string_holds_up_nobody():
  """Of one that cannot end in a short text only its beginning is looked for."""
  stop = "(" * (1 << 20)
  reading = Reading(ByteTokenizer(), SamplingParams(stop=[stop]), pieces=True)
  began = time.monotonic()
  assert "".join(reading.push(token) for token in [65, 40, 40, 65, 40]) == "A((A" and time.monotonic() - began < 5
