"""A server whose device fails, whose clients do not read, and that is told to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import httpx

from sparse_serve_jax.server import serve
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
