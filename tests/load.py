"""A server under load: many streams at once, clients that go away, and what is left when all have ended.

  python -m tests.load --streams=200 --seconds=120

A process of its own serves the reference model. Before it does, it asks `LLM.generate` and `LLM.chat` for what clients
will ask for: all that they get must be that, or its beginning. Another process asks for /health meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.test_server import SOON, with_template

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
  "cache.dram_bytes=64MiB", "cache.hbm_bytes=64MiB", "cache.lanes=4", "scheduler.max_batch=4",
  "scheduler.max_context=256",
)  # fmt: skip
WORDS = "the quick brown fox and a lazy dog once upon time of day they went home with small red balls to play".split()
# glibc raises its threshold to the size of what is freed, and from then on keeps up to twice as much of a step's
# temporaries in the arena of each thread that ever made some. What is freed shall not count as held.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
_NUMBERS = 64  # requests for /metrics at once, so that the threads that answer them are all there
PROBE_GAP = 0.02  # seconds between answers and requests of /health


def kinds(seed: int, n: int = 40) -> list[dict[str, Any]]:
  """Bodies of requests: completions and chats, greedy and drawn, several outputs, stop strings, log probabilities."""
  rng, made = random.Random(seed), list[dict[str, Any]]()
  for i in range(n):
    text = " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "temperature": 0, "ignore_eos": rng.random() < 0.7}
    body |= {"messages": [{"role": "user", "content": text}]} if i % 3 == 0 else {"prompt": text}
    if i % 4 == 1:
      body |= {"temperature": 0.8, "top_p": 0.95, "seed": rng.randrange(1000), "n": rng.randint(1, 3)}
    if i % 5 == 2:
      body |= {"stop": [rng.choice([" the", ".", "a", "\n"])]}
    if i % 7 == 3:
      body |= {"logprobs": True, "top_logprobs": 2} if i % 3 == 0 else {"logprobs": 2}
    made.append(body)
  return made


# ---------------------------------------------------------------------------------------------------------- the server


def answers(llm: Any, bodies: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
  """Text and reason of every output of each body, by `LLM`."""
  from sparse_serve_jax import SamplingParams

  told: list[Any] = [None] * len(bodies)
  for name, ask in (("prompt", llm.generate), ("messages", llm.chat)):
    of = [i for i, body in enumerate(bodies) if name in body]
    params = [{key: bodies[i][key] for key in bodies[i].keys() & SamplingParams.__annotations__.keys()} for i in of]
    outputs = ask([bodies[i][name] for i in of], [SamplingParams(**one | {"logprobs": None}) for one in params])
    for i, output in zip(of, outputs, strict=True):
      told[i] = [(sample.text, sample.finish_reason) for sample in output.samples]
  return told


def serve(model: str, seed: int, expected: str) -> None:
  """Writes what is expected, serves until a signal, then looks whether anything is still held and prints what it saw of
  cancellations, and how many programs were compiled while it served.
  """
  from jax import monitoring

  from sparse_serve_jax import LLM, runtime
  from sparse_serve_jax.programs import COMPILES
  from sparse_serve_jax.server import engines
  from sparse_serve_jax.server import serve as serving
  from sparse_serve_jax.server.limits import Limits
  from sparse_serve_jax.serving import executor
  from sparse_serve_jax.serving.loop import Loop, Stream
  from sparse_serve_jax.serving.plan import Sampling
  from tests.tiny import check_nothing_is_held

  runtime.configure()
  llm = LLM(model, overrides=SETTINGS)
  engine = llm.engine
  Path(expected).write_text(json.dumps(answers(llm, kinds(seed))))
  # A program is some MiB that stay, and `compile` knows none that tells log probabilities.
  assert isinstance(engine.executor, executor.JaxExecutor)
  for logprobs in (False, True):
    executor.Sampling = functools.partial(Sampling, logprobs=logprobs)  # type: ignore[misc]
    engine.executor.compile(range(1, engine.max_request_tokens), sampled=True)
  executor.Sampling = Sampling  # type: ignore[misc]
  asked, late = dict[Stream, int](), list[int]()
  loop_cancel, engine_cancel = Loop.cancel, engine.cancel

  def ask(loop: Loop, stream: Stream, reason: str = "cancelled") -> None:
    asked.setdefault(stream, engine.usage.iterations)
    loop_cancel(loop, stream, reason)

  def cancel(name: str, reason: str = "cancelled") -> bool:
    (stream,) = [stream for stream in list(asked) if stream.request and stream.request.id == name]
    late.append(engine.usage.iterations - asked.pop(stream))
    for ended in [stream for stream in list(asked) if stream.ended]:
      del asked[ended]
    return engine_cancel(name, reason)

  Loop.cancel, engine.cancel = ask, cancel  # type: ignore[method-assign]
  compiled = list[str]()
  monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: compiled.append(event))
  served_by, limits = engines.One(engine, llm.model), Limits(max_waiting=2000)
  assert serving.serve(served_by, llm.model, "reference", serving.bind(("127.0.0.1", 0)), limits, None)
  check_nothing_is_held(engine)
  assert not engine.has_work and not engine.failed and not engine._live
  told = {"cancelled": len(late), "iterations_to_cancel": max(late, default=0)}
  print(json.dumps(told | {"compiled": compiled.count(COMPILES)}), flush=True)


def resources(pid: int) -> dict[str, int]:
  """What a process holds: bytes that are resident, threads, file descriptors."""
  pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
  folder = Path(f"/proc/{pid}")
  return {
    "rss": pages * os.sysconf("SC_PAGE_SIZE"),
    "threads": len(list((folder / "task").iterdir())),
    "descriptors": len(list((folder / "fd").iterdir())),
  }


# --------------------------------------------------------------------------------------------------------- the clients


@dataclasses.dataclass
class Clients:
  """Ask until a time has come, and compare what they get."""

  url: str
  bodies: list[dict[str, Any]]
  expected: list[list[tuple[str, str]]]
  rng: random.Random
  whole: int = 0
  left: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)

  async def run(self, n: int, seconds: float) -> None:
    self._until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=n)
    async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=300) as http:
      await asyncio.gather(*(self._client(http, random.Random(self.rng.random())) for _ in range(n)))

  async def _client(self, http: httpx.AsyncClient, rng: random.Random) -> None:
    while time.monotonic() < self._until:
      i = rng.randrange(len(self.bodies))
      body = self.bodies[i] | {"stream": rng.random() < 0.8}
      path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
      leaves = rng.random()
      if leaves < 0.1:  # at any time, perhaps before the first token
        with contextlib.suppress(TimeoutError):
          await asyncio.wait_for(http.post(path, json=body), rng.random())
        self.left += 1
      elif body["stream"]:
        await self._stream(http, path, body, self.expected[i], rng.randint(1, 30) if leaves < 0.35 else None)
      else:
        answer = await http.post(path, json=body)
        told = [(of["text"] if "text" in of else of["message"]["content"], of["finish_reason"])
                for of in answer.json().get("choices", [])]  # fmt: skip
        self.whole += 1
        self._compare(answer.status_code, told, self.expected[i], body)

  async def _stream(self, http, path: str, body: dict[str, Any], expected, leaves_after: int | None) -> None:
    texts, reasons = [""] * len(expected), [""] * len(expected)
    async with http.stream("POST", path, json=body) as answer:
      events = 0
      async for line in answer.aiter_lines():
        if not line.startswith("data: {"):
          continue
        for of in json.loads(line[6:]).get("choices", []):
          texts[of["index"]] += of["text"] if "text" in of else of["delta"].get("content", "")
          reasons[of["index"]] = of["finish_reason"] or reasons[of["index"]]
        events += 1
        if events == leaves_after:
          break
    if leaves_after is None or events < leaves_after:
      self.whole += 1
      return self._compare(answer.status_code, list(zip(texts, reasons, strict=True)), expected, body)
    self.left += 1
    if not all(whole.startswith(text) for text, (whole, _) in zip(texts, expected, strict=True)):
      self.wrong.append(f"{texts} is not the beginning of {expected}: {body}")

  def _compare(self, status: int, told: list[tuple[str, str]], expected, body: dict[str, Any]) -> None:
    if status != 200 or told != [tuple(of) for of in expected]:
      self.wrong.append(f"{status}: {told} is not {expected}: {body}")


def probe(url: str) -> None:
  """Asks for /health until its input ends, then prints how long answers took, in seconds."""
  import http.client
  import select

  took, connection = list[float](), http.client.HTTPConnection(url.removeprefix("http://"))
  while not select.select([sys.stdin], [], [], PROBE_GAP)[0]:
    before = time.perf_counter()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    took.append(time.perf_counter() - before)
  print(json.dumps(took))


def load(streams: int, seconds: float, warm_seconds: float, seed: int = 0) -> dict[str, Any]:
  """What happened, in numbers. Between two looks at what the server's process holds lie `seconds` of load."""
  with tempfile.TemporaryDirectory(prefix="load-") as folder:
    expected = f"{folder}/expected.json"
    command = [sys.executable, "-m", "tests.load", "--serve", str(with_template(Path(folder))), expected, str(seed)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    environment |= RETURNED
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
      line = process.stdout.readline()
      assert line.startswith("serving reference at "), line
      url = line.split()[-1]
      clients = Clients(url, kinds(seed), json.loads(Path(expected).read_text()), random.Random(seed))
      asyncio.run(clients.run(streams, warm_seconds))
      asyncio.run(_all_threads(url))
      before = _at_rest(url, process.pid)
      command = [sys.executable, "-m", "tests.load", "--probe", url]
      probing = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
      asyncio.run(clients.run(streams, seconds))
      took = sorted(json.loads(probing.communicate("\n")[0]))
      after = _at_rest(url, process.pid)
      process.send_signal(signal.SIGTERM)
      told, _ = process.communicate(timeout=SOON)
      assert process.returncode == 0, process.returncode
    finally:
      process.kill()
      process.communicate()
  health = {f"health_p{p}_s": took[int(len(took) * p / 100)] for p in (50, 99)} | {"health_max_s": took[-1]}
  counts = {"whole": clients.whole, "left": clients.left, "wrong": clients.wrong, "healths": len(took)}
  return counts | health | {"before": before, "after": after} | json.loads(told)


async def _all_threads(url: str) -> None:
  """Has the server start the threads of its pools, each of which starts one when none of its own is idle."""
  async with httpx.AsyncClient(timeout=SOON) as http:
    await asyncio.gather(*(http.get(f"{url}/metrics") for _ in range(_NUMBERS)))


def _at_rest(url: str, pid: int) -> dict[str, int]:
  """What the process holds when the server has nothing to do any more."""
  until = time.monotonic() + SOON
  while time.monotonic() < until:
    text = httpx.get(f"{url}/metrics").text
    if re.findall(r"^sparse_serve_requests_(?:waiting|running) (.*)$", text, re.M) == ["0.0", "0.0"]:
      time.sleep(0.5)  # connections close
      return resources(pid)
    time.sleep(0.05)
  raise TimeoutError(f"the server still has requests after {SOON} s without clients")


def main() -> None:
  if sys.argv[1] == "--serve":
    model, expected, seed = sys.argv[2:]
    return serve(model, int(seed), expected)
  if sys.argv[1] == "--probe":
    return probe(sys.argv[2])
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--streams", type=int, default=200)
  parser.add_argument("--seconds", type=float, default=120)
  parser.add_argument("--warm_seconds", type=float, default=20)
  parser.add_argument("--seed", type=int, default=0)
  print(json.dumps(load(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
  main()
