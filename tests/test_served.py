"""What clients get of servers over a device that is computed by hand: each answer is the one that can be computed."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import random
import re
from collections import Counter
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from sparse_serve_jax.models import ByteTokenizer
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.server.answers import Answer
from sparse_serve_jax.server.engines import One
from sparse_serve_jax.server.outputs import Output, Piece
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.loop import Stream
from sparse_serve_jax.serving.plan import MAX_BANNED, Sampling, TokenLogprobs
from sparse_serve_jax.serving.request import Request
from tests.fake_engine import EOS, MODEL_CONFIG, continuation, fake_executor
from tests.fake_fleet import Model, fleet, serving
from tests.fake_ray import until

PROMPT = [(7 * i) % 60 + 30 for i in range(20)]
BODY = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "seed": 0}


def one() -> One:
  return One(Engine(fake_executor()), Model())  # type: ignore[arg-type]


def made(rng: random.Random) -> dict[str, Any]:
  """A body, whose prompts share beginnings."""
  prompts = [[rng.randrange(3) * 7 + i % 5 for i in range(rng.randint(1, 30))] for _ in range(rng.randint(1, 3))]
  n = rng.randint(1, 24)
  body: dict[str, Any] = {"prompt": prompts, "max_tokens": n, "n": rng.randint(1, 3), "seed": rng.randrange(99)}
  body |= {"temperature": rng.choice([0, 0.7]), "ignore_eos": rng.random() < 0.5, "stream": rng.random() < 0.5}
  body |= {"min_tokens": rng.randint(0, n)} if rng.random() < 0.3 else {}
  body |= {"stop": [chr(rng.randrange(32, 96)) for _ in range(2)]} if rng.random() < 0.4 else {}
  body |= {"stop_token_ids": [rng.randrange(EOS) for _ in range(4)]} if rng.random() < 0.3 else {}
  body |= {"echo": True} if rng.random() < 0.3 else {}
  body |= {"cache_salt": rng.choice("ab")} if rng.random() < 0.3 else {}
  return body | ({"stream_options": {"include_usage": True}} if body["stream"] else {})


def expected(body: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
  """Texts and reasons, and the number of output tokens."""
  told, n_tokens, n = list[tuple[str, str]](), 0, body["n"]
  stops = {*body.get("stop_token_ids", ()), *(() if body["ignore_eos"] else (EOS,))}
  for i in range(len(body["prompt"]) * n):
    prompt, least = body["prompt"][i // n], body.get("min_tokens", 0)
    sampling = Sampling(temperature=body["temperature"], seed=body["seed"] + i)
    tokens = continuation(prompt, body["max_tokens"], sampling, stops, least)
    reason = "length" if len(tokens) == body["max_tokens"] else "stop"
    found = [k for k, token in enumerate(tokens) if k >= least and chr(token) in body.get("stop", ())]
    text = ByteTokenizer().decode(tokens[: found[0]] if found else tokens)
    n_tokens += found[0] + 1 if found else len(tokens)
    told.append((ByteTokenizer().decode(prompt) * body.get("echo", False) + text, "stop" if found else reason))
  return told, n_tokens


def read(body: dict[str, Any], events: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], dict[str, Any] | None]:
  """Texts and reasons as far as they have come, and usage."""
  told = [["", ""] for _ in range(len(body["prompt"]) * body["n"])]
  for event in events:
    for choice in event["choices"]:
      assert not told[choice["index"]][1], "nothing comes after the end"
      told[choice["index"]][0] += choice["text"]
      told[choice["index"]][1] = choice["finish_reason"] or ""
  return [(text, reason) for text, reason in told], events[-1]["usage"] if events else None


async def ask(http: httpx.AsyncClient, body: dict[str, Any], rng: random.Random, lost: bool) -> str:
  """Asks, and may go away. `lost`: the answer may be an error. Returns how it ended."""
  leaves, events, error = rng.randrange(60) if rng.random() < 0.3 else 1000, list[dict[str, Any]](), None
  if not body["stream"]:
    asking = http.post("/v1/completions", json=body)
    try:
      answer = await (asyncio.wait_for(asking, leaves / 2000) if leaves < 1000 else asking)
    except TimeoutError:
      return "left"
    if answer.status_code != 200:
      assert lost and answer.status_code in (500, 503), answer.text
      return "lost"
    events.append(answer.json())
  else:
    async with http.stream("POST", "/v1/completions", json=body) as answer:
      async for line in answer.aiter_lines():
        if line.startswith("data: {"):
          events.append(json.loads(line[6:]))
        elif answer.status_code != 200:
          events.append(json.loads(line))
        if len(events) > leaves:
          break
  if events and "error" in events[-1]:
    assert lost, events[-1]
    error = events.pop()
  told, usage = read(body, events)
  texts, n_tokens = expected(body)
  for (text, reason), (whole, why) in zip(told, texts, strict=True):
    assert whole.startswith(text) and reason in ("", why), (text, whole, reason, why)
  if error is not None or len(events) > leaves:
    return "lost" if error else "left"
  assert told == texts
  assert usage is not None and usage["completion_tokens"] == n_tokens
  n_prompt = sum(len(prompt) for prompt in body["prompt"])
  assert usage["prompt_tokens"] == n_prompt > usage["prompt_tokens_details"]["cached_tokens"] >= 0
  return "whole"


async def at_random(http: httpx.AsyncClient, seed: int, n: int, lost: bool) -> list[str]:
  async def client(i: int) -> list[str]:
    rng = random.Random(1000 * seed + i)
    return [await ask(http, made(rng), rng, lost) for _ in range(n)]

  return [how for each in await asyncio.gather(*map(client, range(12))) for how in each]


@pytest.mark.parametrize("seed", range(2))
def test_one_engine_at_random(seed):
  of = one()

  async def run():
    async with serving(of) as http:
      hows = await at_random(http, seed, 8, lost=False)
      assert hows.count("whole") > 50 and hows.count("left") > 5
      async with asyncio.timeout(20):
        while of._loop.live:
          await asyncio.sleep(0.01)
      held = (await http.get("/status")).json()["held"]
      assert held["owned"] == 0

  asyncio.run(run())
  assert not of._loop._engine.has_work


def test_nothing_of_a_request_waits_for_the_collector():
  """Which comes seldom once all that lives long is frozen, so that what it has to free adds up."""
  of = one()

  def alive() -> Counter[str]:
    kinds = (Stream, Request, Output, Piece, Answer)
    return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))

  async def run():
    async with serving(of) as http:
      await at_random(http, 0, 1, lost=False)
      gc.collect()
      gc.disable()
      hows = await at_random(http, 1, 4, lost=False)
      assert hows.count("left") > 3
      async with asyncio.timeout(20):
        while of._loop.live:
          await asyncio.sleep(0.01)
      await http.get("/health")  # the last end has been delivered
      assert max(alive().values(), default=0) <= 2, "but for the last of each, which threads still name"

  try:
    asyncio.run(run())
  finally:
    gc.enable()


def test_replicas_that_die_at_random(monkeypatch):
  with fleet(monkeypatch, 3, 20) as (of, ray, _):

    async def dying() -> None:
      rng = random.Random(5)
      while True:
        await asyncio.sleep(rng.random() / 15)
        rng.choice([actor for actor in ray.actors if not actor.dead.is_set()]).die()

    async def run():
      async with serving(of) as http:
        killer = asyncio.create_task(dying())
        hows = await at_random(http, 7, 8, lost=True)
        killer.cancel()
        assert min(map(hows.count, ("whole", "left", "lost"))) > 3, hows
        async with asyncio.timeout(20):
          while any((one.status, one.live) != ("ok", 0) for one in of.health().replicas.values()):
            await asyncio.sleep(0.01)
        assert await at_random(http, 8, 1, lost=False)

    asyncio.run(run())


@pytest.mark.parametrize(
  ("wrong", "says"),
  [
    ({"prompt": [[5], [5, 4000]]}, "4000 is outside the vocabulary of 97"),
    ({"prompt": [5, 97], "echo": True, "max_tokens": 0}, "97 is outside the vocabulary of 97"),
    ({"prompt": [[5] * 60, [5] * 61], "max_tokens": 4}, "are 65 tokens; a request can have 64"),
  ],
)
def test_of_a_request_with_one_bad_prompt_nothing_is_served(wrong, says):
  of = one()

  async def run():
    async with serving(of) as http:
      answer = await http.post("/v1/completions", json=BODY | wrong)
      assert answer.status_code == 400 and says in answer.json()["error"]["message"]
      assert sum((await http.get("/status")).json()["ended"].values()) == 0

  asyncio.run(run())


@pytest.mark.parametrize(
  ("wrong", "param", "says"),
  [
    ({"best_of": True}, "best_of", "best_of=True is not n=1"),
    ({"best_of": 1.0}, "best_of", "best_of=1.0 is not n=1"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "no parameter 'usage' of stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "no parameter 'include_obf"),
    ({"stream_options": []}, "stream_options", "must be an object, got []"),
    ({"chat_template_kwargs": 0}, "chat_template_kwargs", "must be an object, got 0"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "chat_template_kwargs cannot set messages"),
    ({"chat_template_kwargs": {"documents": 5}}, "messages", "documents are a list of objects"),
    ({"stop_token_ids": [*range(MAX_BANNED + 1)], "min_tokens": 1}, None, "min_tokens=1 takes at most 8 stop tokens"),
  ],
)
def test_mistakes_are_told_by_the_names_that_a_client_knows(wrong, param, says):
  chat = "chat_template_kwargs" in wrong
  body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5} if chat else BODY

  async def run():
    async with serving(one()) as http:
      answer = await http.post("/v1/chat/completions" if chat else "/v1/completions", json=body | wrong)
      error = answer.json()["error"]
      assert (answer.status_code, error["param"]) == (400, param) and says in error["message"]
      assert not re.search(r"argument|object is|request-\d", error["message"])

  asyncio.run(run())


def test_an_empty_text_is_begin_of_text_alone():
  """Where nothing begins a text, there is no prompt."""
  executor = fake_executor(model=Model(dataclasses.replace(MODEL_CONFIG, vocab_size=264)))
  bos, no_special = ByteTokenizer.bos_token_id, {"add_special_tokens": False}

  async def run():
    async with serving(One(Engine(executor), Model()), model=executor.model) as http:  # type: ignore[arg-type]
      for prompt in ("", [""], [bos], [[bos]]):
        choices = (await http.post("/v1/completions", json=BODY | {"prompt": prompt})).json()["choices"]
        assert [of["text"] for of in choices] == [ByteTokenizer().decode(continuation([bos], 5))]
      for wrong in ({"prompt": ""} | no_special, {"prompt": ["a", ""]} | no_special, {"prompt": [[]]}):
        answer = await http.post("/v1/completions", json=BODY | wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        assert answer.json()["error"]["message"] == "the prompt is empty, at least one token is needed"
      for special, tokens in ((True, [bos]), (False, [])):
        body = {"prompt": "", "add_special_tokens": special}
        assert (await http.post("/tokenize", json=body)).json()["tokens"] == tokens

  asyncio.run(run())


def test_a_client_may_want_no_obfuscation():
  """There is none."""

  async def run():
    async with serving(one()) as http:
      body = BODY | {"stream": True, "stream_options": {"include_obfuscation": False}}
      assert (await http.post("/v1/completions", json=body)).status_code == 200

  asyncio.run(run())


@pytest.mark.parametrize("replicated", [False, True])
def test_a_model_is_found_by_its_name(monkeypatch, replicated):
  """Which may have a slash."""

  async def run(of: Any) -> None:
    async with serving(of, served="a/fake") as http:
      (card,) = (await http.get("/v1/models")).json()["data"]
      assert card["id"] == "a/fake" and card["max_model_len"] == 64
      for path in ("a/fake", "a%2Ffake"):
        answer = await http.get(f"/v1/models/{path}")
        assert (answer.status_code, answer.json()) == (200, card)
      answer = await http.get("/v1/models/fake")
      error = {"param": "model", "code": "model_not_found", "type": "not_found_error"}
      error["message"] = "there is no model 'fake'; this server has 'a/fake'"
      assert (answer.status_code, answer.json()) == (404, {"error": error})

  if not replicated:
    return asyncio.run(run(one()))
  with fleet(monkeypatch, 1, 20) as (of, *_):
    asyncio.run(run(of))


@pytest.mark.parametrize("replicated", [False, True])
def test_what_is_counted_is_what_clients_get(monkeypatch, replicated):
  """A stop string may come with the last token, or while others are on their way. Nothing is not 0."""
  body = BODY | {"prompt": [33, 81, 88]}
  tokens = continuation(body["prompt"], 5)
  assert len({*tokens}) == 5
  bodies = [body | {"stop": chr(tokens[4])}, body | {"stop": chr(tokens[1])}, body]

  async def run(of: Any) -> None:
    async with serving(of) as http:

      async def hit_rates() -> tuple[float | None, float]:
        lines = (await http.get("/metrics")).text.splitlines()
        (rate,) = [float(line.split()[-1]) for line in lines if line.startswith("sparse_serve_hbm_hit_rate")]
        return (await http.get("/status")).json()["since_start"]["hit_rate"], rate

      assert repr(await hit_rates()) == "(None, nan)"
      answers = [(await http.post("/v1/completions", json=body)).json() for body in bodies]
      assert len({*await hit_rates()}) == 1
      assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop", "stop", "length"]
      assert [answer["usage"]["completion_tokens"] for answer in answers] == [5, 2, 5]
      told = (await http.get("/status")).json()
      assert told["ended"] == {"stop": 2, "length": 1}
      rows = [(row["state"], row["output_tokens"]) for row in told["requests"]]
      assert rows == [("stop", 5), ("stop", 2), ("length", 5)]
      lines = [line for line in (await http.get("/metrics")).text.splitlines() if line[0] != "#"]
      for name, label, n in (
        ("requests_total", 'finish_reason="stop"', 2),
        ("requests_total", 'finish_reason="length"', 1),
        ("output_tokens_total", "", 12),
        ("time_between_tokens_seconds_count", "", 9),
      ):
        of_name = [line for line in lines if line.startswith(f"sparse_serve_{name}") and label in line]
        assert [float(line.split()[-1]) for line in of_name] == [n], of_name

  if not replicated:
    return asyncio.run(run(one()))
  with fleet(monkeypatch, 1, 20) as (of, *_):
    asyncio.run(run(of))


def test_usage_tells_how_much_of_each_prompt_the_cache_held():
  """Of full blocks of 8 tokens; of a prompt once, however many outputs it has. Counters are over outputs."""
  other = PROMPT[:8] + [90] * 12

  async def run():
    async with serving(one()) as http:
      for more, held in (
        ({}, 0),
        ({}, 16),
        ({"stream": True, "stream_options": {"include_usage": True}}, 16),
        ({"cache_salt": "a"}, 0),
        ({"prompt": [PROMPT, other]}, 16 + 8),
        ({"n": 3}, 16),
      ):
        answer = await http.post("/v1/completions", json=BODY | more)
        *_, last = [line for line in answer.text.splitlines() if "{" in line]
        usage = json.loads(last.removeprefix("data: "))["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": held}, more
      families = {family.name: family for family in parse((await http.get("/metrics")).text)}
      (counted,) = families["sparse_serve_cached_tokens"].samples
      assert counted.value == 0 + 16 + 16 + 0 + 24 + 3 * 16

  asyncio.run(run())


@pytest.mark.parametrize("replicated", [False, True])
def test_what_only_rises_is_a_counter(monkeypatch, replicated):
  """Rates of gauges are wrong after a restart, and names of counters end in _total."""

  async def run(of: Any, engine: Engine) -> None:
    async with serving(of) as http:
      for n in (1, 3):
        assert (await http.post("/v1/completions", json=BODY | {"n": n, "max_tokens": 40})).status_code == 200
        async with asyncio.timeout(20):
          while engine.has_work or engine._in_flight:
            await asyncio.sleep(0.01)
        families = {family.name: family for family in parse((await http.get("/metrics")).text)}
        rises = ("iterations", "decode_steps", "decode_rows", "blocks_attended", "blocks_missed", "blocks_loaded")
        for name in (*rises, "blocks_saved"):
          (sample,) = families[f"sparse_serve_{name}"].samples
          assert families[f"sparse_serve_{name}"].type == "counter" and sample.name == f"sparse_serve_{name}_total"
          assert sample.value == getattr(engine.usage, name)
        batch = families["sparse_serve_decode_batch"]
        assert (batch.type, [sample.value for sample in batch.samples]) == ("gauge", [engine.usage.last_rows])
        assert n == 3 or engine.usage.last_rows == 1
      assert engine.usage.blocks_attended > 0 and engine.usage.decode_rows > engine.usage.decode_steps

  if not replicated:
    of = one()
    return asyncio.run(run(of, of._loop._engine))
  with fleet(monkeypatch, 1, 20) as (of, ray, _):
    asyncio.run(run(of, ray.actors[0].of._one._loop._engine))


def test_a_replica_forgets_what_is_cancelled_after_its_end(monkeypatch):
  with fleet(monkeypatch, 1, 20) as (of, ray, _):
    n = 0

    def late(stream: Any, token: int | None) -> None:
      nonlocal n
      n += 1
      if n % 6 == 5:  # with the last token, when the replica has told the end too
        of.cancel(stream)

    for _ in range(20):
      stream = of.submit(PROMPT, sink=late, params=SamplingParams(max_tokens=5, ignore_eos=True))
      assert stream.result(20).output_tokens == continuation(PROMPT, 5)
      of.ended(stream)
    replica = ray.actors[0].of
    until(lambda: not (replica._streams or replica._n_told))
    assert not replica._gone and sum(replica.told().reasons.values()) == 20


def test_places_of_tokens_in_a_text_are_those_of_the_whole(monkeypatch):
  """A character of the prompt is two tokens."""
  executor = fake_executor(model=Model(dataclasses.replace(MODEL_CONFIG, vocab_size=256)))
  execute, told = executor.execute, TokenLogprobs(-1.0, {})

  def telling(plan: Any) -> Any:
    result = execute(plan)
    return dataclasses.replace(result, logprobs=dict.fromkeys(result.tokens, told))

  executor.execute = telling  # type: ignore[method-assign]
  of, scores = One(Engine(executor), Model()), Future()  # type: ignore[arg-type]
  scores.set_result([None, told, told])
  monkeypatch.setattr(of, "score", lambda *_: scores)
  body = BODY | {"prompt": [*"é".encode(), 40], "echo": True, "logprobs": 0, "max_tokens": 3}

  async def run():
    async with serving(of, model=executor.model) as http:
      whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]["text_offset"]
      streamed = list[int]()
      async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
          choices = json.loads(line[6:])["choices"] if line.startswith("data: {") else []
          streamed += [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["text_offset"]]
      assert streamed == whole == [0, 0, 1, 2, 3, 4]

  asyncio.run(run())


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_nothing_but_the_prompt(echo):
  """It has the choices of the whole answer."""
  body = {"prompt": [PROMPT, [40, 41]], "max_tokens": 0, "n": 2, "echo": echo}

  async def run():
    async with serving(one()) as http:
      whole = (await http.post("/v1/completions", json=body)).json()["choices"]
      answer = await http.post("/v1/completions", json=body | {"stream": True})
      *events, done = [line[6:] for line in answer.text.splitlines() if line]
      assert done == "[DONE]" and [choice for event in events for choice in json.loads(event)["choices"]] == whole
      assert [(of["index"], of["text"], of["finish_reason"]) for of in whole[2:]] == [
        (i, "()" * echo, "length") for i in (2, 3)
      ]

  asyncio.run(run())
