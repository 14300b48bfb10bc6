"""Fits the costs of an iteration, which `sparse-serve simulate` serves by.

  sparse-serve calibrate --cost=cost.json --model=random:tiny --config=sparse_serve --limit=24

serves a workload on this machine, all requests at once, and fits to what its iterations took. With --ladder
nothing is served: it fits to what folders of `sparse-serve ladder` hold of the rung --config:

  sparse-serve calibrate --cost=cost.json --ladder=W1,W3 --config=sparse_serve

Costs hold for the model, device and kernels that they were fitted on; memory, batches and rates may be others.

The table goes to stdout, and as its last line one JSON object with the same numbers: seconds of each unit of work, and
how far predictions are off, for an iteration on average and for all together.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from sparse_serve_jax import results, runtime
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.workload import LadderFlag, WorkloadFlags
from sparse_serve_jax.config import load_config, override, with_fixed_sizes
from sparse_serve_jax.evaluation import selections
from sparse_serve_jax.ladder.folder import read_rung
from sparse_serve_jax.models import reference
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.simulation.calibrate import MeasuredRun, calibrate, run_here
from sparse_serve_jax.simulation.served import Asked

_TRACES = "models/reference/traces"
_CONFIG, _SET = cli.define_serving()
_MODEL, _DTYPE = cli.define_model(default="random:tiny")
with cli.group("What is measured"):
  _REPEATS = flags.DEFINE_integer("repeats", 3, "Times to serve, after once to compile.", lower_bound=1)
  _SELECTIONS = flags.DEFINE_list(
    "selections",
    [f"{_TRACES}/recite_16384_2048.npz", f"{_TRACES}/renumber_16384_2048.npz"],
    "Traces of selections, as `sparse-serve accuracy` writes them, which say how blocks come back.",
  )
  _LADDER = LadderFlag("Folders of ladders, which were measured already.", reads=("cost", "selections"))
_ASKED = WorkloadFlags(default="mixed")
with cli.group("Results"):
  _COST = flags.DEFINE_string("cost", None, "JSON file to write: costs of an iteration.", required=True)
_VERBOSE = cli.define_verbose()


def main() -> None:
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  folders, file = _LADDER.read(), pathlib.Path(_COST.value)
  _check_writable(file)
  reuse = selections.mean_reuse([Trace.load(reference.file(of)) for of in _SELECTIONS.value])
  ran = [read_rung(folder, _CONFIG.value).ran for folder in folders] or [_run_here()]
  cost = calibrate(ran, reuse, ",".join(pathlib.Path(of).name for of in _SELECTIONS.value))
  results.replace_json(file, dataclasses.asdict(cost))
  told = {key: getattr(cost.about, key) for key in ("iterations", "mean_error", "total_error")}
  told |= {f"{name} (s)": price for name, price in dataclasses.asdict(cost.seconds).items()}
  cli.end_with(metrics.table({pathlib.Path(_CONFIG.value).stem: told}), told)


def _run_here() -> MeasuredRun:
  config, asked = with_fixed_sizes(override(load_config(_CONFIG.value), _SET.value)), Asked(_ASKED.read())
  model = load_model_here(_MODEL.value, dtype=_DTYPE.value, seed=_ASKED.seed)
  return run_here(config, model, asked, _REPEATS.value)


def _check_writable(file: pathlib.Path) -> None:
  """Before anything is measured."""
  if file.suffix != ".json":
    raise ValueError(f"--cost: {file} is the JSON file to write: its name must end in .json")
  if file.is_dir():
    raise ValueError(f"--cost: {file} is a directory, a file is wanted")
  results.make_folder(file.parent)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
