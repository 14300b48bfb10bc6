"""Asks an OpenAI endpoint for a workload in an open loop, and times what comes by the client's clock.

Needs httpx2 (`pip install '.[client]'`). The server may be any that streams /v1/completions or /v1/chat/completions.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import numpy as np

from sparse_serve_jax.serving.metrics import distribution, gaps
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads import Item, Refused

Row = dict[str, Any]
SENT = {"ids": "completions", "text": "completions", "chat": "chat/completions"}  # how prompts are sent -> to where
CONNECT_S = 30.0  # until a connection stands
# Of a server of ours -> the counter that tells it, or None: a quotient of two.
_ENGINE = {
  "iterations": "iterations",
  "decode_batch_mean": None,
  "hbm_hit_rate": None,
  "blocks_attended": "blocks_attended",
  "blocks_loaded": "blocks_loaded",
  "blocks_saved": "blocks_saved",
  "server_requests": "requests",
  "server_prompt_tokens": "prompt_tokens",
  "server_cached_tokens": "cached_tokens",
  "server_output_tokens": "output_tokens",
}
_TOLD = 300  # characters of an answer that an error tells
# Of a warm-up: tokens by which lengths are told apart, lengths at most, then requests at once and tokens of each.
_APART, _LENGTHS, _AT_ONCE, _TOKENS = 64, 32, 16, 16


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where requests go and how."""

  url: str  # http://host:port, also with a path, which may end in /v1
  model: str  # its name there; "" until `look_up` has found the only one
  send: str = "ids"  # prompts as token ids, as text, or as the one message of a conversation
  key: str | None = dataclasses.field(default=None, repr=False)
  timeout_s: float = 3600.0  # that a request may take

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(f"the url of an endpoint begins with http:// or https://, got {self.url!r}")
    if self.send not in SENT:
      raise ValueError(f"prompts are sent as {', '.join(SENT)}, not as {self.send!r}")

  @property
  def server(self) -> str:
    """Its address without the API's."""
    return self.url.rstrip("/").removesuffix("/v1")

  def path(self, name: str) -> str:
    """The address of a part of the API, such as "models"."""
    return f"{self.server}/v1/{name}"

  @property
  def headers(self) -> dict[str, str]:
    return {"authorization": f"Bearer {self.key}"} if self.key else {}


@dataclasses.dataclass
class Answer:
  """What came for one request. Times are seconds of the event loop's clock."""

  text: str = ""
  times: list[float] = dataclasses.field(default_factory=list)  # when pieces came, each of one token or more
  closed: float | None = None  # when the last piece came, if it had no text: a token, or only the end
  finish_reason: str | None = None
  usage: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as the server counts
  error: str | None = None


def look_up(endpoint: Endpoint) -> tuple[Endpoint, Mapping[str, Any]]:
  """The endpoint with the name of its model, and what it says of that; nothing if it lists none.

  Raises:
    ValueError: nothing answers there, it has other models, or several where none is named.
  """
  address = endpoint.path("models")
  try:
    response = httpx2.get(address, headers=endpoint.headers, timeout=CONNECT_S)
  except (httpx2.HTTPError, httpx2.InvalidURL) as error:
    raise ValueError(f"no answer from {address}: {_said(error)}") from None
  if response.status_code in (404, 405, 501) and endpoint.model:  # it can do without
    return endpoint, {}
  if response.status_code != 200:
    raise ValueError(f"{address} answers {_refusal(response.status_code, response.text)}")
  try:
    models = {entry["id"]: entry for entry in response.json()["data"]}
  except (ValueError, KeyError, TypeError):
    raise ValueError(f"{address} does not answer with a list of models: {_first_line(response.text)}") from None
  name = endpoint.model or (next(iter(models)) if len(models) == 1 else "")
  if name not in models:
    wanted = f"no model {name!r}, only" if name else f"{len(models)} models, name one of"
    raise ValueError(f"{endpoint.url} has {wanted} {', '.join(models) or 'none'}")
  return dataclasses.replace(endpoint, model=name), models[name]


def counted(endpoint: Endpoint) -> Mapping[str, float]:
  """Counters of a server of ours, each with its labels, as its /metrics has them now; nothing of any other."""
  try:
    response = httpx2.get(f"{endpoint.server}/metrics", headers=endpoint.headers, timeout=CONNECT_S)
  except httpx2.HTTPError:
    return {}
  lines = response.text.splitlines() if response.status_code == 200 else []
  told = dict(line.rsplit(" ", 1) for line in lines if re.match(r"sparse_serve_\w+_total[ {]", line))
  return {name: float(value) for name, value in told.items()}


def engine_numbers(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float | None]:
  """What a server counted between two looks of `counted`, over its replicas, whoever asked for it.

  iterations, hbm_hit_rate and blocks are those of `serving.metrics`; decode_batch_mean is rows of decode steps / decode
  steps. The others are of outputs that ended. None: the server tells no such numbers or began anew in between, or a
  replica of it did not answer a look.
  """
  sums = collections.defaultdict[str, float](float)
  for name, value in after.items():
    sums[name.partition("{")[0].removeprefix("sparse_serve_").removesuffix("_total")] += value - before.get(name, 0)
  anew = sums["replica_restarts"] or any(after.get(name, -1) < value for name, value in before.items())
  if anew or not (before and after and _is_whole(before) and _is_whole(after)):
    return dict.fromkeys(_ENGINE)
  attended, steps = sums["blocks_attended"], sums["decode_steps"]
  numbers: dict[str, float | None] = {name: int(sums[of]) if of else None for name, of in _ENGINE.items()}
  if attended:
    numbers["hbm_hit_rate"] = 1 - sums["blocks_missed"] / attended
  if steps:
    numbers["decode_batch_mean"] = sums["decode_rows"] / steps
  return numbers


def _is_whole(told: Mapping[str, float]) -> bool:
  """Whether every replica told its counters. Restarts are counted of all of them, those that do not answer too."""
  kinds = collections.Counter(name.partition("{")[0] for name in told)
  return kinds["sparse_serve_replica_restarts_total"] in (0, kinds["sparse_serve_iterations_total"])


def serve(
  endpoint: Endpoint,
  items: Sequence[Item | Refused],
  arrivals: Sequence[float] | np.ndarray,
  tokenizer: Tokenizer,
  on_end: Callable[[Row], None],
  *,
  ignore_eos: bool = False,
  concurrency: int | None = None,
) -> list[Row]:
  """Asks for each item when it arrives, however many are on their way, and waits until all have ended.

  Args:
    endpoint: where.
    items: what to ask for, and what its source refuses.
    arrivals: seconds after the start, ascending, one for each item.
    tokenizer: of the model; it counts tokens where the server does not.
    on_end: is given each row as its request ends.
    ignore_eos: asks for it, which is an extension of the API, where an item does not say otherwise.
    concurrency: requests on their way at most; others wait, from their arrival on, for one to end.

  Returns:
    Rows, as they ended, with times in seconds since the start. `token_s` has an entry for each piece of text that came,
    which may be of several tokens, but none beyond `output_tokens`.
  """
  try:
    return asyncio.run(_serve(endpoint, items, arrivals, tokenizer, on_end, ignore_eos, concurrency))
  except BaseExceptionGroup as group:  # what went wrong here, first; requests do not raise
    raise group.exceptions[0] from None


async def _serve(
  endpoint: Endpoint,
  items: Sequence[Item | Refused],
  arrivals: Sequence[float] | np.ndarray,
  tokenizer: Tokenizer,
  on_end: Callable[[Row], None],
  ignore_eos: bool,
  concurrency: int | None,
) -> list[Row]:
  rows: list[Row] = []
  room = asyncio.Semaphore(concurrency or max(1, len(items)))
  now = asyncio.get_running_loop().time

  def end(row: Row) -> None:
    rows.append(row)
    on_end(row)

  async def one(item: Item, content: bytes, arrival: float) -> None:
    async with room:
      sent = now() - start
      answer = await ask(client, endpoint, content)
      end(row_of(item, answer, arrival, sent, now() - start, start, tokenizer))

  # A connection for each request: one that is kept may be closed by the server just when it is used again.
  limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
  waiting = httpx2.Timeout(None, connect=CONNECT_S)
  async with httpx2.AsyncClient(limits=limits, timeout=waiting, headers=endpoint.headers) as client:
    start = now()
    async with asyncio.TaskGroup() as group:
      for item, arrival in zip(items, np.asarray(arrivals, float).tolist(), strict=True):
        content = b"" if isinstance(item, Refused) else body_of(endpoint, item, tokenizer, ignore_eos)
        await asyncio.sleep(start + arrival - now())
        if isinstance(item, Refused):
          end({"request_id": item.id, "prompt_tokens": None, "finish_reason": "refused", "error": str(item)})
        else:
          group.create_task(one(item, content, arrival))
  return rows


def warm_up(
  endpoint: Endpoint,
  items: Sequence[Item | Refused],
  tokenizer: Tokenizer,
  *,
  ignore_eos: bool = False,
  concurrency: int | None = None,
) -> list[Row]:
  """Asks for what `items` are like, so that a server that compiles when it first meets a shape has done so.

  One after another a prompt of each length, with two tokens of output; then the first items together. Their tokens are
  those of items, in another order, so that no prefix cache knows the items afterwards. Arguments as those of `serve`.

  Returns:
    Rows, of which none is a measurement.
  """
  asked = [item for item in items if isinstance(item, Item)]
  by_length = {-(-len(item.prompt) // _APART): item for item in sorted(asked, key=lambda item: len(item.prompt))}
  lengths = list(by_length.values())
  some = [lengths[i] for i in np.unique(np.linspace(0, len(lengths) - 1, min(len(lengths), _LENGTHS)).astype(int))]
  rows: list[Row] = []
  for of, n, part, at_once in [(some, 2, 3, 1), (asked[:_AT_ONCE], _TOKENS, 2, concurrency)]:
    like = [_like(item, n, len(item.prompt) // part) for item in of]
    rows += serve(
      endpoint, like, np.zeros(len(like)), tokenizer, lambda _: None, ignore_eos=ignore_eos, concurrency=at_once
    )
  return rows


def _like(item: Item, n: int, by: int) -> Item:
  """With at most n tokens of output, and a prompt that begins `by` tokens later and ends with what it began with."""
  n, options = min(n, item.max_new_tokens), dict(item.options)
  if "min_tokens" in options:
    options["min_tokens"] = min(n, options["min_tokens"])
  return dataclasses.replace(item, prompt=np.roll(item.prompt, -by), max_new_tokens=n, options=options)


def body_of(endpoint: Endpoint, item: Item, tokenizer: Tokenizer, ignore_eos: bool = False) -> bytes:
  """A request's JSON. Temperature is 0 unless the item says otherwise, as in an engine of ours."""
  options = {"temperature": 0.0, "ignore_eos": ignore_eos, **item.options}
  if not options["ignore_eos"]:
    del options["ignore_eos"]
  asked: dict[str, Any]
  if endpoint.send == "ids":
    asked = {"prompt": item.prompt.tolist()}
  elif endpoint.send == "text":
    asked = {"prompt": tokenizer.decode(item.prompt.tolist())}
  else:
    asked = {"messages": [{"role": "user", "content": tokenizer.decode(item.prompt.tolist())}]}
  asked |= {"model": endpoint.model, "max_tokens": item.max_new_tokens}
  return json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}, **options}).encode()


async def ask(client: httpx2.AsyncClient, endpoint: Endpoint, content: bytes) -> Answer:
  """Sends one request and reads its stream to the end. What goes wrong is the answer's error."""
  answer = Answer()
  headers = {"content-type": "application/json", "accept": "text/event-stream"}
  try:
    async with (
      asyncio.timeout(endpoint.timeout_s),
      client.stream("POST", endpoint.path(SENT[endpoint.send]), content=content, headers=headers) as response,
    ):
      if response.status_code != 200:
        text = (await response.aread()).decode(errors="replace")
        answer.error = _refusal(response.status_code, text)
        return answer
      done = await _read(response, answer)
    if not (done or answer.finish_reason or answer.error):
      answer.error = f"the stream ended after {len(answer.times)} pieces, without telling its end"
  except TimeoutError:
    answer.error = f"no end within {endpoint.timeout_s:g} s, after {len(answer.times)} pieces"
  except (httpx2.HTTPError, httpx2.InvalidURL) as error:
    answer.error = f"{_said(error)}, after {len(answer.times)} pieces"
  return answer


async def _read(response: httpx2.Response, answer: Answer) -> bool:
  """Takes the events of a stream into the answer; whether they ended with [DONE]."""
  now = asyncio.get_running_loop().time
  async for event in httpx2.EventSource(response, max_event_size=None):
    if event.data == "[DONE]":
      return True
    try:
      chunk = json.loads(event.data)
      if "error" in chunk:
        answer.error = f"in the stream: {_first_line(event.data)}"
        return False
      _take(chunk, answer, now())
    except (ValueError, TypeError, AttributeError):
      answer.error = f"a piece of the stream is not what the API has: {_first_line(event.data)}"
      return False
  return False


def _take(chunk: Mapping[str, Any], answer: Answer, at: float) -> None:
  answer.usage = chunk.get("usage") or answer.usage
  for choice in chunk.get("choices") or ():
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    answer.text += text or ""
    if text or not (answer.finish_reason or "role" in (delta or {})):
      answer.times.append(at)  # a token whose text is held back counts too
    elif answer.finish_reason and answer.closed is None:
      answer.closed = at


def row_of(
  item: Item, answer: Answer, arrival: float, sent: float, ended: float, start: float, tokenizer: Tokenizer
) -> Row:
  """What became of a request, as JSON values; `start` is the zero of its times on the loop's clock."""
  told = answer.usage.get("completion_tokens")
  n = told if told is not None else len(tokenizer.encode(answer.text, add_special_tokens=False))
  times = answer.times
  if answer.closed is not None and len(times) < n:
    times = [*times, answer.closed]
  times = [at - start for at in times[: None if answer.error else n]]
  details = answer.usage.get("prompt_tokens_details") or {}
  row: Row = {
    "request_id": item.id,
    "prompt_tokens": answer.usage.get("prompt_tokens", len(item.prompt)),
    "cached_tokens": details.get("cached_tokens"),
    "output_tokens": n,
    "counted_by": "tokenizer" if told is None else "server",
    "finish_reason": "error" if answer.error else answer.finish_reason or "stop",
    "arrival_s": arrival,
    "sent_s": sent,
    "first_token_s": times[0] if times else None,
    "token_s": times,
    "finish_s": ended,
    "text": answer.text,
  }
  return row | ({"error": answer.error} if answer.error else {})


def summarize(rows: Sequence[Row]) -> dict[str, float | int | None]:
  """Sums up rows of `serve`, under the names of `serving.metrics`, in seconds; None where there is nothing to average.

  Of the requests that finished: ttft is the time the first piece came - arrival, latency the time the stream ended -
  arrival, both over requests; client_delay is the time it was sent - arrival, which is part of both: what `concurrency`
  and a slow client add; tbt is over all `metrics.gaps` of all requests; throughput is output tokens / (last end - first
  arrival). most_in_flight counts requests, those that failed too, that were on their way at one time.
  """
  finished = [row for row in rows if "error" not in row]
  failed = [row for row in rows if row["finish_reason"] == "error"]
  output = sum(row["output_tokens"] for row in finished)
  span = max((row["finish_s"] for row in finished), default=0) - min((row["arrival_s"] for row in finished), default=0)
  cached = [row["cached_tokens"] for row in finished if row["cached_tokens"] is not None]
  first = [row["first_token_s"] - row["arrival_s"] for row in finished if row["first_token_s"] is not None]
  between = [gaps(row["token_s"], row["output_tokens"]) for row in finished]
  changes = [(row[key], by) for row in finished + failed for key, by in (("sent_s", 1), ("finish_s", -1))]
  in_flight = np.cumsum([by for _, by in sorted(changes)])
  return {
    "requests": len(finished),
    "failed": len(failed),
    "refused": sum(row["finish_reason"] == "refused" for row in rows),
    "prompt_tokens": sum(row["prompt_tokens"] for row in finished),
    "cached_tokens": sum(cached) if cached else None,
    "output_tokens": output,
    **distribution("ttft", first),
    **distribution("tbt", np.concatenate([np.zeros(0), *between])),
    **distribution("latency", [row["finish_s"] - row["arrival_s"] for row in finished]),
    **distribution("client_delay", [row["sent_s"] - row["arrival_s"] for row in finished]),
    "throughput_tok_s": output / span if span > 0 else None,
    "most_in_flight": int(in_flight.max(initial=0)),
  }


def _refusal(status: int, text: str) -> str:
  """Of an answer that is an error: its status and what it says, in a line."""
  return f"HTTP {status}: {_first_line(text) or 'nothing more'}"


def _first_line(text: str) -> str:
  """The message of an error in OpenAI's form, else the first line."""
  with contextlib.suppress(ValueError, KeyError, TypeError):
    text = json.loads(text)["error"]["message"]
  return next(iter(str(text).strip().splitlines()), "")[:_TOLD]


def _said(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".rstrip(": ")
