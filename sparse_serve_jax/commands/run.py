"""Serves a workload and measures it.

  sparse-serve run --config=sparse_serve --model=random:tiny --workload=needle --out=/tmp/run

The table goes to stdout, and as its last line one JSON object with the same numbers. The folder of --out gets
requests.jsonl, a row for each request as it ends, with the text of its answer; timeline.json, which ui.perfetto.dev
shows; audits.jsonl, what audits of PSA's promise found (--set sparse.audit=0.01); and run.json, what the run was made
by. The same command goes on with a run that was interrupted. The status is 1 if a request was refused or failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags, logging
from jax import monitoring
from tqdm import tqdm

from sparse_serve_jax import hosts, progress, results, runtime, workloads
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import WorkloadFlags, digest, left, tell_before, tell_refused
from sparse_serve_jax.config import EngineConfig, load_config, override
from sparse_serve_jax.models import Model
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.programs import COMPILES
from sparse_serve_jax.serving import audit, metrics, run, sizes
from sparse_serve_jax.serving.clock import Wall
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.plan import Observed
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.timeline import Timeline
from sparse_serve_jax.workloads import Item, Refused

_CONFIG, _SET = cli.define_serving()
_MODEL, _DTYPE = cli.define_model(default="random:tiny")
_ASKED = WorkloadFlags()
with cli.group("What is asked"):
  _IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after the model's EOS tokens.")
_STRICT = cli.define_strict()
_HOSTS = cli.HostsFlags()
_OUT = cli.define_out("Folder for requests.jsonl, timeline.json and run.json.", required=False)
_VERBOSE = cli.define_verbose()
TOLD_S = 1.0  # seconds of compilation from which on they are told


def main() -> int:
  """Returns 1 if a request was refused or failed, or there was none."""
  runtime.configure()
  _HOSTS.join()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  config = override(load_config(_CONFIG.value), _SET.value)
  workload = override(_ASKED.read(), {"strict": True}) if _STRICT.value else _ASKED.read()
  source = workloads.read(workload)
  out, rows = pathlib.Path(_OUT.value) if _OUT.value and _HOSTS.is_first else None, None
  if out:
    results.claim(out, _setting(config, workload))
    rows = results.Rows(out / "requests.jsonl")
  before, of_all = hosts.agreed([rows.all[:] if rows else [], results.noted(out, "requests") if out else None])
  done, known = {row["request_id"] for row in before}, {row.id: row for row in workloads.refused_by(source)}
  tell_refused(row for name, row in known.items() if name not in done)
  # All that is wrong with the command line, files or the folder is told by now.
  if before and len(before) == of_all:
    return _nothing_left(out, before)
  model = load_model_here(_MODEL.value, dtype=_DTYPE.value, seed=_ASKED.seed)
  clock = Wall()
  executor = JaxExecutor(config, model)
  timeline = Timeline(executor.shape)
  audits = f"audits-after-{len(before)}.jsonl" if before else "audits.jsonl"  # each part begins its own
  found = results.Rows(out / audits) if out and config.sparse.audit_share else None

  def observe(seen: Observed) -> None:
    timeline.observe(seen)
    if found is not None and (row := audit.row_of(seen)):
      found.append(row)

  engine = Engine(executor, clock=clock, observer=observe)
  items, arrivals = left(workload, source(model.tokenizer, engine.max_request_tokens), before)
  if out:
    used = sizes.used(executor.config, executor.shape)
    results.note(out, {"sizes": used, "requests": len(before) + len(items)})
  if before and not items:
    return _nothing_left(out, before)
  if jax.process_count() > 1 and np.any(arrivals > 0):
    raise ValueError("several processes serve what comes all at once: no --rate, and no times of a trace")
  with progress.bar(total=len(before) + len(items), initial=len(before), unit="request") as bar:
    record = Record(model, timeline, rows, bar, clock.now(), {item.id: item for item in items}, known)
    try:
      with _compiling_told():
        served = run.serve(engine, items, arrivals, record, ignore_eos=_IGNORE_EOS.value)
    finally:
      if out and items:
        timeline.write(out / (f"timeline-after-{len(before)}.json" if before else "timeline.json"))
  _tell(served.to_dict(), record.scores)
  tell_before(out, len(before), len(items))
  bad = served.refused + served.failed + sum("error" in row for row in before)
  return 1 if bad or not items else 0


@contextlib.contextmanager
def _compiling_told() -> Iterator[None]:
  """Says at the end how long it took to compile, or to find compiled, what requests were the first to need."""
  took: list[float] = []

  def ends(event: str, duration_secs: float, **_: object) -> None:
    if event == COMPILES:
      took.append(duration_secs)

  monitoring.register_event_duration_secs_listener(ends)
  try:
    yield
  finally:
    monitoring.unregister_event_duration_listener(ends)
  if sum(took) >= TOLD_S:
    progress.write(f"times hold {sum(took):.1f} s in which {len(took)} programs were compiled, or found compiled")


def _nothing_left(out: pathlib.Path | None, before: list[dict[str, Any]]) -> int:
  """Ends a run that has rows of all requests."""
  of_rows = run.summary_of(before)
  names = [*(field.name for field in dataclasses.fields(metrics.Summary)), "refused", "failed", "elapsed_s"]
  _tell({name: of_rows.get(name) for name in names}, [row["score"] for row in before if "score" in row])
  tell_before(out, len(before), 0)
  return int(any("error" in row for row in before))


def _tell(numbers: dict[str, Any], scores: Sequence[float]) -> None:
  numbers["score_mean"] = sum(scores) / len(scores) if scores else None
  cli.end_with(metrics.table({pathlib.Path(_CONFIG.value).stem: numbers}), numbers)


def _setting(config: EngineConfig, workload: workloads.WorkloadConfig) -> dict[str, Any]:
  """What rows of one folder have in common."""
  return {
    "config": config,
    "model": {"name": _MODEL.value, "dtype": _DTYPE.value},
    "workload": workload,
    "prompts": digest(workload),
    "seed": _ASKED.seed,
    "ignore_eos": _IGNORE_EOS.value,
  }


@dataclasses.dataclass
class Record:
  """Takes what has ended, as it ends: a row of the file, a line of the picture, a word on what went wrong."""

  model: Model
  timeline: Timeline
  rows: results.Rows | None
  bar: tqdm
  start: float  # of the clock
  items: Mapping[str, Item | Refused]  # by id
  told: Collection[str]  # ids of what was told to be refused before anything ran
  scores: list[float] = dataclasses.field(default_factory=list)  # of the answers that are judged

  def __call__(self, end: Request | run.Refusal) -> None:
    row = run.row(end, self.start)
    if isinstance(end, Request):
      self.timeline.add(end)
      row["text"] = self.model.tokenizer.decode(end.output_tokens)
      item = self.items[end.id]
      if isinstance(item, Item) and item.judge and "error" not in row:
        row |= {**item.about, "score": item.judge(row["text"])}
        self.scores.append(row["score"])
    if "error" in row and end.id not in self.told:
      progress.write(f"{row['finish_reason']}: {row['error']}")
    if self.rows is not None:
      self.rows.append(row)
    self.bar.update()


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, interrupted="rows so far are in {out}, and the same command goes on", argv=argv)
