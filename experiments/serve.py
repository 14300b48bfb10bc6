"""Serves a workload and measures it.

  python -m experiments.serve --config=sparse_serve --model=random:tiny --workload=needle --out=/tmp/run

The table goes to stdout, and as its last line one JSON object with the same numbers. The folder of --out gets
requests.jsonl, a row for each request as it ends, and config.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

import sparse_serve_jax
from experiments import cli
from sparse_serve_jax import runtime, workloads
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.models import Model, load_model
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.workloads import Item, Refused, WorkloadConfig

_CONFIG = flags.DEFINE_string("config", "sparse_serve", "A name in configs/serving, or a JSON file.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides of the configuration, such as cache.hbm_bytes=8GiB.")
_MODEL = flags.DEFINE_string("model", "random:tiny", "A model directory, or random:<name in configs/models>.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model; by default its own.")
_WORKLOAD = flags.DEFINE_enum("workload", "needle", ["longbench", "needle", "jsonl"], "What to serve.")
_LONGBENCH = flags.DEFINE_string("longbench_dir", None, "longbench: folder with config/ and data/.")
_JSONL = flags.DEFINE_string("jsonl", None, 'jsonl: file of {"prompt": ...} or {"prompt_token_ids": ...}.')
_PROMPT = flags.DEFINE_integer("prompt_tokens", 2048, "needle: length of the prompts.", lower_bound=1)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Requests: longbench per file, needle (8 by default), jsonl.", lower_bound=1
)
_MAX_PROMPT = flags.DEFINE_integer("max_prompt_tokens", None, "Longer prompts lose their middle.", lower_bound=2)
_CHAT = flags.DEFINE_bool(
  "chat_template", True, "longbench: use the model's chat template, in the tasks that take one."
)
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", None, "Caps the output of each request.", lower_bound=1)
_RATE = flags.DEFINE_float("rate", None, "Poisson arrivals a second; by default all arrive at once.")
_SEED = flags.DEFINE_integer("seed", 0, "Of random weights, generated prompts and arrivals.", lower_bound=0)
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after the model's EOS tokens.")
_OUT = flags.DEFINE_string("out", None, "Folder for requests.jsonl and config.json.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show where an error comes from.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  with cli.endings(_VERBOSE.value, f"; rows so far are in {_OUT.value}" if _OUT.value else ""):
    _main()


def _main() -> None:
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  config = override(load_config(_CONFIG.value), _SET.value)
  workload = _workload()
  source = workloads.read(workload)
  model = load_model(_MODEL.value, dtype=_DTYPE.value, seed=_SEED.value)
  engine = Engine(config, model)
  items = source(model.tokenizer, engine.max_request_tokens)
  arrivals = workloads.arrival_times(workload.arrivals, len(items))
  with contextlib.ExitStack() as stack:
    on_row = _no_row
    if _OUT.value is not None:
      out = pathlib.Path(_OUT.value)
      out.mkdir(parents=True, exist_ok=True)
      (out / "config.json").write_text(json.dumps(_setting(config, model), indent=2) + "\n")
      file = stack.enter_context((out / "requests.jsonl").open("w", encoding="utf-8"))
      on_row = functools.partial(_write_row, file)
    try:
      summary = serve(engine, items, arrivals, _IGNORE_EOS.value, on_row)
    except KeyboardInterrupt:
      engine.wait()
      raise
  print(metrics.table({pathlib.Path(_CONFIG.value).stem: summary}))
  print(json.dumps(summary), flush=True)


def serve(
  engine: Engine,
  items: Sequence[Item | Refused],
  arrivals: np.ndarray,
  ignore_eos: bool,
  on_row: Callable[[dict[str, Any]], None],
) -> dict[str, int | float | None]:
  """Adds the items as they arrive, steps until all have ended and hands out a row for each. Returns the summary.

  A request that could never run is reported and counted as refused; the others run.
  """
  start = time.monotonic()
  coming = deque(zip(items, start + arrivals, strict=True))
  ended: list[Request] = []
  refused = 0
  with tqdm(total=len(items), unit="request", disable=None) as bar:
    while coming or engine.has_work:
      while coming and coming[0][1] <= time.monotonic():
        item, arrival = coming.popleft()
        try:
          _add(engine, item, ignore_eos, float(arrival))
        except ValueError as error:
          refused += 1
          bar.write(f"refused: {error}", file=sys.stderr)
          bar.update()
          on_row(_refused_row(item, str(error)))
      for request in engine.step():
        ended.append(request)
        bar.update()
        on_row(_row(request, start))
      if coming and not engine.has_work:
        time.sleep(max(0.0, coming[0][1] - time.monotonic()))
  return metrics.summarize(ended, engine.usage).to_dict() | {"refused": refused, "elapsed_s": time.monotonic() - start}


def _add(engine: Engine, item: Item | Refused, ignore_eos: bool, arrival: float) -> None:
  if isinstance(item, Refused):
    raise ValueError(f"request {item.id!r}: {item}")
  options = {"ignore_eos": ignore_eos, **item.options}
  engine.add_request(item.prompt, item.max_new_tokens, request_id=item.id, arrival_time=arrival, **options)


def _workload() -> WorkloadConfig:
  """That of --workload, changed by the other flags."""
  name = _WORKLOAD.value
  path = {"longbench": _LONGBENCH, "jsonl": _JSONL}.get(name)
  if path is not None and path.value is None:
    raise ValueError(f"--workload={name} needs --{path.name}")
  tokens = _MAX_PROMPT.value
  if name == "needle":
    tokens = min(_PROMPT.value, tokens or _PROMPT.value)
  changes = {
    "path": None if path is None else path.value,
    "limit": _LIMIT.value,
    "prompt_tokens": tokens,
    "max_new_tokens": _MAX_NEW.value,
    "chat_template": _CHAT.value if name == "longbench" else None,
    "seed": _SEED.value if name == "needle" else None,
    "arrivals.process": None if _RATE.value is None else "poisson",
    "arrivals.rate": _RATE.value,
    "arrivals.seed": _SEED.value,
  }
  return override(workloads.load_workload(name), {key: value for key, value in changes.items() if value is not None})


def _no_row(row: dict[str, Any]) -> None:
  pass


def _write_row(file: TextIO, row: dict[str, Any]) -> None:
  """Writes a whole line at once, so that what was finished stays readable whenever the run ends."""
  file.write(json.dumps(row) + "\n")
  file.flush()


def _row(request: Request, start: float) -> dict[str, Any]:
  """A line of requests.jsonl. Times are seconds since the start of the run."""

  def since(at: float | None) -> float | None:
    return None if at is None else at - start

  return {
    "request_id": request.id,
    "prompt_tokens": len(request.prompt),
    "output_token_ids": request.output_tokens,
    "finish_reason": request.finish_reason,
    "arrival_s": since(request.arrival_time),
    "scheduled_s": since(request.scheduled_time),
    "first_token_s": since(request.first_token_time),
    "token_s": [since(at) for at in request.token_times],
    "finish_s": since(request.finish_time),
  }


def _refused_row(item: Item | Refused, error: str) -> dict[str, Any]:
  return {
    "request_id": item.id,
    "prompt_tokens": len(item.prompt) if isinstance(item, Item) else None,
    "output_token_ids": [],
    "finish_reason": "refused",
    "error": error,
  }


def _setting(config: EngineConfig, model: Model) -> dict[str, Any]:
  """What a run can be repeated from, and where it ran."""
  device = jax.devices()[0]
  return {
    "config": dataclasses.asdict(config),
    "model": {"name": model.name, **dataclasses.asdict(model.config)},
    "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])},
    "versions": {
      "python": platform.python_version(),
      "sparse_serve_jax": sparse_serve_jax.__version__,
      "jax": jax.__version__,
      "numpy": np.__version__,
    },
    "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
  }


if __name__ == "__main__":
  app.run(main)
