"""Drives an OpenAI endpoint, ours or another, with a workload, and measures it by the client's clock.

  sparse-serve bench --url=http://127.0.0.1:8000 --tokenizer=DIR --workload=text --rate=2 --out=/tmp/bench

The same requests at the same times as those of `sparse-serve run`, and the same metrics: times to the first token and
between tokens, throughput. The table goes to stdout, and as its last line one JSON object with the same numbers. The
folder of --out gets requests.jsonl, a row for each request as it ends, and run.json, what the run was made by; the same
command goes on with a run that was interrupted. The key of OPENAI_API_KEY is sent, if it is set. The status is 1 if a
request was refused or failed. A server of ours is asked for /metrics before and after: the table has what its engine
did meanwhile, whoever asked, and what it counted.

A server may compile when it first meets a length. So there is a warm-up first, which is not measured: a request of each
prompt length, one by one, and then 16 of the requests together. Their tokens are in another order, so that no prefix
cache knows the prompts afterwards. --nowarm_up leaves it out.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags

from sparse_serve_jax import progress, results, workloads
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import WorkloadFlags, digest, left, tell_before, tell_refused
from sparse_serve_jax.config import override
from sparse_serve_jax.models import load_model
from sparse_serve_jax.models.tokenizer import load_tokenizer
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads import Item

ANY_LENGTH = 2**31 - 1  # tokens of a request, where the endpoint does not say how many fit

with cli.group("The endpoint"):
  _URL = flags.DEFINE_string("url", None, "http://host:port of the server.", required=True)
  _MODEL = flags.DEFINE_string("model", "", "The name of the model there. By default the only one that it has.")
  _TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Tokenizer of that model: a model directory, a GGUF file, or random:<name in configs/models>. It makes prompts "
    "and counts output tokens where the server does not.",
    required=True,
  )
  _SEND = flags.DEFINE_enum(
    "send",
    "ids",
    ["ids", "text", "chat"],
    "Prompts as token ids or as text to /v1/completions, or as one message to /v1/chat/completions.",
  )
  _CONCURRENCY = flags.DEFINE_integer(
    "concurrency", None, "Requests on their way at most; others wait. By default no end.", lower_bound=1
  )
  _TIMEOUT = flags.DEFINE_float("timeout", 3600.0, "Seconds that a request may take.", lower_bound=0.001)
_ASKED = WorkloadFlags()
with cli.group("What is asked"):
  _IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Ask to go on after EOS tokens, by vLLM's extension of the API.")
  _WARM_UP = flags.DEFINE_bool(
    "warm_up", True, "Requests of the same prompt lengths come first, which are not measured."
  )
_STRICT = cli.define_strict()
_OUT = cli.define_out("Folder for requests.jsonl and run.json.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> int:
  """Returns 1 if a request was refused or failed, or there was none."""
  try:
    from sparse_serve_jax.benchmarks import endpoint as asking
  except ImportError as error:
    raise ValueError(f"a client needs the packages of '.[client]': {error}") from None
  jax.config.update("jax_platforms", "cpu")  # a device of this machine may be the server's
  workload = override(_ASKED.read(), {"strict": True}) if _STRICT.value else _ASKED.read()
  source = workloads.read(workload)
  known = {row.id: row for row in workloads.refused_by(source)}
  tokenizer = _tokenizer(_TOKENIZER.value)
  key = os.environ.get("OPENAI_API_KEY")
  endpoint, served = asking.look_up(asking.Endpoint(_URL.value, _MODEL.value, _SEND.value, key, _TIMEOUT.value))
  out, kept = _OUT.value and pathlib.Path(_OUT.value), None
  if out:
    results.claim(out, _setting(endpoint.model, workload, served))
    kept = results.Rows(out / "requests.jsonl")
  before = kept.all[:] if kept else []
  done = {row["request_id"] for row in before}
  tell_refused(row for name, row in known.items() if name not in done)
  items, arrivals = left(workload, source(tokenizer, served.get("max_model_len") or ANY_LENGTH), before)
  limits = {"ignore_eos": _IGNORE_EOS.value, "concurrency": _CONCURRENCY.value}
  if _WARM_UP.value and items:
    print("warm-up, not measured: a request of each prompt length", file=sys.stderr, flush=True)
    _tell_warm_up(time.monotonic(), asking.warm_up(endpoint, items, tokenizer, **limits))
  judges = {item.id: item for item in items if isinstance(item, Item) and item.judge}
  with progress.bar(total=len(before) + len(items), initial=len(before), unit="request") as bar:

    def end(row: dict[str, Any]) -> None:
      if (item := judges.get(row["request_id"])) and item.judge and "error" not in row:
        row |= {**item.about, "score": item.judge(row["text"])}
      if "error" in row and row["request_id"] not in known:
        progress.write(f"{row['finish_reason']}: {row['request_id']}: {row['error']}")
      if kept is not None:
        kept.append(row)
      bar.update()

    counted = asking.counted(endpoint)
    rows = asking.serve(endpoint, items, arrivals, tokenizer, end, **limits)
    engine = asking.engine_numbers(counted, asking.counted(endpoint) if items else {})
  told = rows if items else before
  scores = [row["score"] for row in told if "score" in row]
  numbers = asking.summarize(told) | {"score_mean": sum(scores) / len(scores) if scores else None, **engine}
  if before and not items:  # each part has times of its own
    numbers |= {"throughput_tok_s": None, "most_in_flight": None}
  cli.end_with(metrics.table({endpoint.model: numbers}), numbers)
  tell_before(out, len(before), len(items))
  return 1 if any("error" in row for row in [*before, *rows]) or not (before or rows) else 0


def _tell_warm_up(start: float, rows: Sequence[Mapping[str, Any]]) -> None:
  errors = [row["error"] for row in rows if "error" in row]
  told = f"; {len(errors)} failed, the first with: {errors[0]}" if errors else ""
  print(f"warm-up: {len(rows)} requests in {time.monotonic() - start:.1f} s{told}", file=sys.stderr, flush=True)


def _tokenizer(name: str) -> Tokenizer:
  """Of a model, of which a directory needs no other file than the tokenizer's."""
  path = pathlib.Path(name)
  return load_tokenizer(path) if path.is_dir() else load_model(name).tokenizer


def _setting(model: str, workload: workloads.WorkloadConfig, served: Mapping[str, Any]) -> dict[str, Any]:
  """What rows of one folder have in common."""
  told = {key: served[key] for key in ("owned_by", "max_model_len") if served.get(key) is not None}
  return {
    "endpoint": {"url": _URL.value, "model": model, "send": _SEND.value, **told},
    "tokenizer": _TOKENIZER.value,
    "workload": workload,
    "prompts": digest(workload),
    "ignore_eos": _IGNORE_EOS.value,
    "concurrency": _CONCURRENCY.value,
    "timeout": _TIMEOUT.value,
    "warm_up": _WARM_UP.value,
  }


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="rows so far are in {out}, and the same command goes on", argv=argv)
