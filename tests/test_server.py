"""The server as clients meet it: one process with the reference model for all tests, the client is OpenAI's."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import httpx
import openai
from jax import monitoring

from sparse_serve_jax import SamplingParams
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.models import load_model
from sparse_serve_jax.programs import COMPILES
from sparse_serve_jax.server.engines import One
from sparse_serve_jax.server.errors import Refused
from tests.tiny import SMALL_SERVING

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY = "a key of tests"
SETTINGS = ("cache.dram_bytes=64MiB", "cache.hbm_bytes=64MiB", "scheduler.max_context=512", "cache.lanes=3")
CODE = "import sys; from sparse_serve_jax.commands import main; sys.argv[0] = 'sparse-serve'; main()"
SOON = 30.0  # seconds within which what ends has ended
ERROR = {"message", "type", "param", "code"}


class Process:
  """A server in a process of its own."""

  def __init__(self, model: Path | str, *flags: str, before: str = ""):
    """`before`: Python that the process runs first."""
    command = [sys.executable, "-c", f"{before}\n{CODE}", "serve", str(model), "--port=0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SPARSE_SERVE_API_KEY": KEY}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"  # many steps run
    command += [*(f"--set={of}" for of in SETTINGS), *flags]
    self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    assert re.match(r"serving \S+ at http://127.0.0.1:", line), line
    self.url = line.split()[-1]
    self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=SOON)
    self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

  def number(self, name: str) -> float:
    lines = self.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == f"sparse_serve_{name}")

  def close(self) -> int:
    self.http.close()
    self.client.close()
    if self.process.poll() is None:
      self.process.terminate()
    status = self.process.wait(SOON)
    self.process.stdout.close()  # pyright: ignore
    return status


def with_template(folder: Path) -> Path:
  """The reference model with a chat template, which it has none of."""
  model = folder / "reference"
  model.mkdir()
  for file in (ROOT / "models/reference").iterdir():
    if file.name != "tokenizer_config.json":
      (model / file.name).symlink_to(file)
  config = json.loads((ROOT / "models/reference/tokenizer_config.json").read_text())
  (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
  return model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  model = with_template(tmp_path_factory.mktemp("models"))
  of = Process(model, "--max_body_bytes=100000", "--max_waiting=16", "--body_seconds=1")
  yield of
  if of.process.poll() is None:
    of.close()


PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown"
GREEDY = {"model": "reference", "temperature": 0, "max_tokens": 8}
IGNORE = {"ignore_eos": True}
LOGPROBS = ("text_offset", "tokens", "token_logprobs", "top_logprobs")


def complete(server: Process, prompt=PROMPT, **options):
  extra = IGNORE | options.pop("extra_body", {})
  return server.client.completions.create(prompt=prompt, **{**GREEDY, **options}, extra_body=extra)


def test_the_example_of_the_documents(server, capsys):
  (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/server.md").read_text(), re.M | re.S)
  for said, ours in (("http://127.0.0.1:8000", server.url), ('api_key="none"', f"api_key={KEY!r}")):
    assert said in code
    code = code.replace(said, ours)
  exec(compile(code, "docs/server.md", "exec"), {})
  assert capsys.readouterr().out.strip()


def test_a_stream_is_the_completion(server):
  whole = complete(server)
  assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
  chunks = list(complete(server, stream=True, stream_options={"include_usage": True}))
  assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
  assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
  assert chunks[-2].choices[0].finish_reason == "length"


def test_a_stream_has_a_piece_for_every_token(server):
  """Also where the text is held back, as half a character is, so that a client knows when a token came."""
  chunks = [chunk.choices[0] for chunk in complete(server, seed=1, temperature=8.0, max_tokens=40, stream=True)]
  assert len(chunks) == 40 + 1 and not all(chunk.text for chunk in chunks[:-1])


def test_prompts_in_every_form(server):
  ids = server.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
  assert server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith(PROMPT)
  text = complete(server).choices[0].text
  for prompt, n in ((ids, 1), ([PROMPT, PROMPT], 2), ([ids, ids], 2)):
    assert [choice.text for choice in complete(server, prompt).choices] == [text] * n


def test_seeds_and_n(server):
  drawn = [complete(server, n=2, seed=seed, temperature=2.0).choices for seed in (3, 3, 4)]
  texts = [[choice.text for choice in choices] for choices in drawn]
  assert texts[0] == texts[1] and texts[0][1] == texts[2][0] != texts[0][0]


def test_a_stop_string_ends_the_text(server):
  text = complete(server).choices[0].text
  stop = text[3:5]
  done = complete(server, stop=[stop])
  assert (done.choices[0].text, done.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_logprobs_of_a_prompt_are_those_of_its_decode(server):
  """What a loglikelihood is read from: the tokens of an output, given as a prompt, are as likely as they were."""
  ids = server.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
  made = complete(server, logprobs=2).choices[0].logprobs
  again = server.http.post("/tokenize", json={"prompt": complete(server).choices[0].text, "add_special_tokens": False})
  prompt = ids + again.json()["tokens"]
  if len(prompt) != len(ids) + 8:
    pytest.skip("the output's text has other tokens")
  for n in (0, 1):
    told = complete(server, prompt, echo=True, max_tokens=n, logprobs=2).choices[0].logprobs
    assert len(told.tokens) == len(prompt) + n and told.token_logprobs[0] is None and told.top_logprobs[0] is None
    scores = told.token_logprobs[len(ids) : len(prompt)]
    assert scores == pytest.approx(made.token_logprobs, abs=2e-3)
    tops = told.top_logprobs[len(ids) : len(prompt)]
    assert [max(top.values()) for top in tops] == pytest.approx(scores, abs=2e-3)  # all were greedy


def test_a_chat_with_logprobs(server):
  messages = [{"role": "user", "content": "hello"}]
  options = dict(model="reference", messages=messages, temperature=0, max_tokens=4, extra_body=IGNORE)
  whole = server.client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
  told = whole.choices[0].logprobs.content
  assert len(told) == 4 and all(of.logprob == of.top_logprobs[0].logprob and len(of.top_logprobs) == 2 for of in told)
  pieces = [chunk.choices[0].delta for chunk in server.client.chat.completions.create(**options, stream=True)]
  assert pieces[0].role == "assistant"
  assert "".join(piece.content or "" for piece in pieces) == whole.choices[0].message.content


def test_tokens_stand_where_they_say(server):
  """Drawn, so that many are parts of characters or special. Streamed they are the same; a chat's bytes are its text."""
  prompt = "na\u00efve \u6f22\u5b57 \U0001f600 e\u0301 <end> said"
  n_split = 0
  for seed in (1, 3):
    options = dict(echo=seed > 1, logprobs=seed, seed=seed, temperature=8.0, max_tokens=40)
    (choice,) = complete(server, prompt, **options).choices
    told = choice.logprobs
    assert choice.text.startswith(prompt) == options["echo"]
    assert told.text_offset == sorted(told.text_offset) and told.text_offset[-1] <= len(choice.text)
    for at, token, own, top in zip(*map(told.model_dump().get, LOGPROBS), strict=True):
      if token.startswith("bytes:"):
        n_split += 1
      elif token not in ("<begin>", "<end>"):
        assert choice.text.startswith(token, at), (token, at, choice.text)
      assert (own, top) == (None, None) or (top[token] == own and len(top) in (seed, seed + 1))
    pieces = [c.choices[0] for c in complete(server, prompt, **options, stream=True)]
    assert "".join(piece.text for piece in pieces) == choice.text
    parts = [piece.logprobs.model_dump() for piece in pieces if piece.logprobs]
    for name in LOGPROBS:
      assert [of for part in parts for of in part[name]] == getattr(told, name)

    asked = dict(model="reference", messages=[{"role": "user", "content": prompt}], temperature=8.0, seed=seed)
    chat = server.client.chat.completions.create(**asked, max_tokens=40, logprobs=True, top_logprobs=2).choices[0]
    n_split += sum(of.token.startswith("\\x") for of in chat.logprobs.content)
    made = b"".join(bytes(of.bytes) for of in chat.logprobs.content if of.token not in ("<begin>", "<end>"))
    assert made.decode(errors="replace") == chat.message.content
  assert n_split > 10, n_split


def test_errors_are_those_of_the_client(server):
  with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
    complete(server, model="other")
  with pytest.raises(openai.BadRequestError, match=r"are 5\d{3} tokens; a request can have 512"):
    complete(server, max_tokens=5000)
  with pytest.raises(openai.BadRequestError, match="suffix='a' cannot be done"):
    complete(server, suffix="a")
  with pytest.raises(openai.RateLimitError, match="this request has 17; 16 may wait"):
    complete(server, n=17)
  with pytest.raises(openai.AuthenticationError, match="wants an API key"):
    server.client.with_options(api_key="another").models.list()
  assert [model.id for model in server.client.models.list()] == ["reference"]
  assert server.client.models.retrieve("reference") == server.client.models.list().data[0]
  with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
    server.client.models.retrieve("other")
  wrong = server.http.get("/v1/completions")
  assert (wrong.status_code, wrong.headers["allow"], set(wrong.json()["error"])) == (405, "POST", ERROR)


def test_no_more_wait_than_may(server):
  """However many come at once."""
  body = GREEDY | IGNORE | {"prompt": PROMPT}

  async def ask() -> list[int]:
    async with httpx.AsyncClient(base_url=server.url, headers=server.http.headers, timeout=300) as http:
      asking = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(60)]
      while not all(task.done() for task in asking):
        told = (await http.get("/metrics")).text
        waiting.append(float(re.findall(r"^sparse_serve_requests_waiting (.*)$", told, re.M)[0]))
        await asyncio.sleep(0.02)
      return [task.result().status_code for task in asking]

  waiting = list[float]()
  statuses = asyncio.run(ask())
  assert set(statuses) == {200, 429} and statuses.count(200) >= 16 and 0 < max(waiting) <= 16


def test_a_client_that_goes_away_is_cancelled(server):
  before = server.number("requests_total")
  body = {"prompt": PROMPT, "max_tokens": 450, "stream": True, "ignore_eos": True}
  with server.http.stream("POST", "/v1/completions", json=body) as answer:
    lines = answer.iter_lines()  # kept, as the connection ends with it
    next(lines)
    assert server.number("requests_running") == 1
  deadline = time.monotonic() + SOON
  while server.number("requests_running") and time.monotonic() < deadline:
    time.sleep(0.02)
  lines = server.http.get("/metrics").text
  assert server.number("requests_running") == 0 and 'finish_reason="cancelled"} 1.0' in lines
  assert server.number("requests_total") == before + 1


def test_a_refusal_is_the_same_from_another_process():
  refused = pickle.loads(pickle.dumps(Refused(400, "give a shorter prompt", "prompt")))
  assert (refused.status, str(refused)) == (400, "give a shorter prompt")
  assert refused.body() == Refused(400, "give a shorter prompt", "prompt").body()


@pytest.mark.parametrize("compiled", [True, False])
def test_what_it_compiles_before_it_serves_is_all(compiled):
  # Executors of one shape share their programs.
  small = [*SMALL_SERVING, "cache.lanes=2", "scheduler.max_batch=2", "cache.prefix=false"]
  config = override(load_config("sparse_serve"), [*small, f"scheduler.max_context={96 if compiled else 104}"])
  of = One.start(config, load_model("random:tiny"), compiled=compiled)
  late = list[str]()
  tell = lambda event, _, **about: late.append(event) if event == COMPILES else None  # noqa: E731
  monitoring.register_event_duration_secs_listener(tell)
  try:
    for n, temperature in ((5, 0), (40, 1), (80, 0)):
      params = SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True)
      stream = of.submit(list(range(n)), sink=lambda *_: None, params=params)
      assert len(stream.result(SOON).output_tokens) == 12
  finally:
    monitoring.unregister_event_duration_listener(tell)
    of.close()
  assert bool(late) != compiled


def test_the_command_compiles_if_it_is_told():
  sets = [f"--set={of}" for of in (*SMALL_SERVING, "scheduler.max_context=96", "cache.prefix=false")]
  command = [sys.executable, "-c", CODE, "serve", "random:tiny", "--port=0", "--compile", *sets]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout is not None and process.stdout.readline().startswith("serving random:tiny at")
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=SOON)
  assert process.returncode == 0 and re.search(r"\d+ programs compiled in \d+ s", said), said


def test_the_page_needs_no_key_and_its_data_do(server):
  """Without the key there is only what /health tells; prompts are nowhere."""
  page = httpx.get(server.url)
  assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text), "the page is of this server alone"
  for headers in ({}, {"Authorization": "Bearer another"}):
    answer = httpx.get(f"{server.url}/status", headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"state": "ok", "key": "wanted"})
  before = server.http.get("/status").json()
  complete(server, "A xylophone, of which there are few.")
  with pytest.raises(openai.BadRequestError):
    complete(server, "xylophone", max_tokens=5000)
  answer = server.http.get("/status")
  told = answer.json()
  assert (told["state"], told["model"], answer.headers["cache-control"]) == ("ok", "reference", "no-store")
  assert told["since_start"]["output_tokens"] == before["since_start"]["output_tokens"] + 8
  assert told["ended"]["length"] == before["ended"].get("length", 0) + 1
  assert told["refused"]["400"] == before["refused"].get("400", 0) + 1
  assert told["requests"][-1]["state"] == "length" and "xylophone" not in answer.text
  assert told["samples"]["at"] and told["uptime_s"] >= 1


def test_metrics_tell_what_is_in_use_now_and_peaks_by_their_name(server):
  body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
  with server.http.stream("POST", "/v1/completions", json=body) as answer:
    lines = answer.iter_lines()  # kept, as the connection ends with it
    next(lines)
    assert server.number("dram_kv_bytes") == server.number("pool_blocks_owned") * 2**19 > 0
    assert server.number("dram_kv_peak_bytes") >= server.number("dram_kv_bytes")
  deadline = time.monotonic() + SOON
  while server.number("dram_kv_bytes") and time.monotonic() < deadline:
    time.sleep(0.02)
  assert server.number("dram_kv_bytes") == server.number("pool_blocks_owned") == 0 < server.number("dram_kv_peak_bytes")
  assert 0 < server.number("hbm_kv_bytes") <= server.number("hbm_kv_peak_bytes") <= server.number("hbm_capacity_bytes")
  assert server.number("slots_used") <= server.number("slots")


def malformed() -> list[tuple[str, bytes]]:
  """Path and body of 200 requests that cannot be answered."""
  good = {"prompt": "a", "max_tokens": 1}
  wrong: dict[str, list[object]] = {
    "prompt": [None, 3, [], [[]], [1.5], [True], [-1], [10**9], [2**40], {"a": 1}, ["a", 1], [["a"]], "\ud800"],
    "max_tokens": [-1, "5", 1.5, True, [], {}, 2**40, 10**30, 5000],
    "temperature": [-1, "hot", True, [], {}, 10**400],
    "top_p": [0, -1, 2, "a", [], {}, True],
    "top_k": [-1, 1.5, "a", [], 2**40],
    "min_p": [-1, 2, "a", []],
    "n": [0, -1, 1.5, "a", [], 1000, True],
    "stop": ["", [""], [1], 3, {}, [None]],
    "seed": [-1, 1.5, "a", 2**31, []],
    "logprobs": [-1, 21, 1.5, "a", True, []],
    "stream": [1, "yes", [], {}],
    "echo": [1, "yes", [], {}],
    "stream_options": ["a", [1], {"include_usage": True}, 5],
    "best_of": [2, 0, "a"],
    "logit_bias": [{"5": 1}, "a", 3],
    "suffix": ["a", 3],
    "tools": [[{}], "a", 3],
    "response_format": [{"type": "json_object"}, "json"],
    "presence_penalty": [0.5, "a"],
    "frequency_penalty": [0.5, "a"],
    "model": ["other", 3, [], {}],
    "min_tokens": [-1, 2, "a"],
    "ignore_eos": [1, "a"],
    "cache_salt": [1, []],
    "stop_token_ids": [3, "a", ["a"]],
    "max_tokenz": [3],
    "add_special_tokens": [3, "a"],
  }
  rows = [("/v1/completions", json.dumps(good | {name: value})) for name, values in wrong.items() for value in values]
  rows += [("/v1/completions", '{"\\ud800": 3}')]  # half of a character
  chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
  user = {"role": "user", "content": "a"}
  messages = [None, [], "a", {}, [1], [{}], [{"role": "user"}], [{"role": 3, "content": "a"}], [user | {"role": "usr"}]]
  messages += [[user | {"content": [{"type": "image_url"}]}], [user | {"content": 3}]]
  rows += [("/v1/chat/completions", json.dumps(chat | {"messages": of})) for of in messages]
  for name, values in (
    ("top_logprobs", [-1, 21, 5, "a"]),
    ("logprobs", [3, "a"]),
    ("max_tokens", [0, -1]),
    ("max_completion_tokens", [0, 2, "a"]),
    ("tools", [[{}]]),
    ("tool_choice", ["required"]),
    ("modalities", [["audio"]]),
    ("chat_template_kwargs", [3, [1]]),
    ("special_tokens_in_text", ["b", 3]),
  ):
    rows += [("/v1/chat/completions", json.dumps(chat | {name: value})) for value in values]
  for text in ("", "{", "[]", "3", "null", '"a"', "[" * 5000, "{'a': 1}", "\x00", '{"prompt": NaN', "tru", "1,2"):
    rows += [(path, text) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")]
  rows += [("/detokenize", json.dumps({"tokens": of})) for of in ("a", [-1], [10**7], [True], None)]
  rows += [("/tokenize", json.dumps({"prompt": ["a", "b"]})), ("/v1/completions", "a" * 100001), ("/nope", "{}")]
  rows += [("/v1/models", "{}"), ("/v1/completions", "\udcff")]
  deep = '{"a":' * 400 + "1" + "}" * 400
  for name, text in (
    ("temperature", "NaN"),
    ("temperature", "Infinity"),
    ("temperature", "-Infinity"),
    ("temperature", "1e999"),
    ("top_p", "NaN"),
    ("min_p", "NaN"),
    ("max_tokens", "NaN"),
    ("seed", "9" * 4000),
    ("seed", "9" * 5000),  # more digits than Python reads
    ("max_tokens", "9" * 4000),
    ("n", "1e0"),
    ("prompt", "[" * 300 + "1" + "]" * 300),
    ("prompt", deep),
    ("prompt", f"[{'9' * 400}]"),
    ("stop", "[[" * 100 + "]]" * 100),
    ("metadataa", deep),
    ("stop", '"\\ud800'),  # and no end
  ):
    rows.append(("/v1/completions", json.dumps(good)[:-1] + f', "{name}": {text}}}'))
  for both in (
    {"max_tokens": 1, "min_tokens": 2},
    {"n": 2, "best_of": 3},
    {"stream": False, "stream_options": {"include_usage": True}},
    {"n": 100, "prompt": ["a", "b"]},
    {"max_completion_tokens": 3},  # a chat's
    {"messages": [user]},
  ):
    rows.append(("/v1/completions", json.dumps(good | both)))
  for both in ({"max_completion_tokens": 2}, {"top_logprobs": 1}, {"prompt": "a"}, {"echo": True}, {"logprobs": 1}):
    rows.append(("/v1/chat/completions", json.dumps(chat | both)))
  return [(path, text.encode("utf-8", "surrogateescape")) for path, text in rows]


def test_malformed_requests(server):
  """Each gets a clear 4xx, and the server goes on."""
  rows = malformed()
  assert len(rows) >= 200
  strange = []
  for path, body in rows:
    answer = server.http.post(path, content=body)
    error = answer.json().get("error", {}) if answer.status_code != 200 else {}
    if not 400 <= answer.status_code < 500 or set(error) != ERROR:
      strange.append((path, body[:80], answer.status_code, answer.text[:200]))
  assert not strange
  assert server.http.get("/health").status_code == 200 and complete(server).choices[0].text


def test_generated_requests(server):
  """Whatever stands in a request, the server answers it or says what is wrong with it."""
  rng, good = random.Random(0), json.dumps({"prompt": "a", "max_tokens": 1, "stop": ["b"], "n": 1, "stream": False})
  strange = []
  for _ in range(200):
    body = bytearray(good.encode())
    for _ in range(rng.randint(1, 4)):
      at, what = rng.randrange(len(body)), rng.randrange(3)
      body[at : at + (what > 0)] = bytes(rng.randrange(256) for _ in range(what < 2))
    answer = server.http.post("/v1/completions", content=bytes(body))
    wrong = answer.status_code != 200
    if wrong and (not 400 <= answer.status_code < 500 or set(answer.json()["error"]) != ERROR):
      strange.append((bytes(body), answer.status_code, answer.text[:200]))
  assert not strange and complete(server).choices[0].text


@pytest.mark.parametrize(
  ("headers", "body", "status"),
  [
    ({"content-type": "text/plain"}, b'{"prompt": "a"}', 415),
    ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=a", 415),
    ({"content-type": "multipart/form-data; boundary=a"}, b"--a--", 415),
    ({"content-type": "application/json", "content-encoding": "gzip"}, gzip.compress(b'{"prompt": "a"}', mtime=0), 400),
    ({"content-type": "application/json"}, '{"prompt": "\u00e9"}'.encode("latin-1"), 400),
    ({"content-type": "application/json"}, b'{"prompt": "\xed\xa0\x80"}', 400),  # half of a character
  ],
)
def test_bodies_of_other_kinds(server, headers, body, status):
  answer = server.http.post("/v1/completions", content=body, headers=headers)
  assert answer.status_code == status and set(answer.json()["error"]) == ERROR
  kind = headers["content-type"].partition(";")[0]
  assert (kind in answer.json()["error"]["message"]) == (status == 415)
  good = {"content-type": "Application/JSON; charset=utf-8"}
  assert server.http.post("/tokenize", content=b'{"prompt": "a"}', headers=good).status_code == 200


def test_a_body_that_does_not_come(server):
  host, port = server.url.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port))) as connection:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n\r\n{{"
    connection.sendall(head.encode())
    connection.settimeout(SOON)
    assert b"408" in connection.recv(4096)


def test_a_signal_ends_it_after_what_it_has(server):
  """The last test of the file."""
  body = {"prompt": PROMPT, "max_tokens": 120, "stream": True, "ignore_eos": True, "temperature": 0}
  with server.http.stream("POST", "/v1/completions", json=body) as answer:
    lines = answer.iter_lines()
    next(lines)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=server.http.headers).status_code == 503
    rest = [line for line in lines if line]
  assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
  assert server.process.wait(SOON) == 0
  assert server.process.stdout.read() == ""
  server.close()
