"""Which blocks decode steps select again: of recorded traces, of a model that reads text, and of drawn selections.

  sparse-serve selections --traces=models/reference/traces/recite_16384_2048.npz --fit
  sparse-serve selections --model=SmolLM2.gguf --longbench_dir=LongBench --tokens=8192 --out=/tmp/selections

A model's decode steps are the last tokens of pieces of text, run over dense keys and values. Of each source a row: the
blocks of a selection, its overlap with the step before, what 12 steps select, and what exact LRU misses by its slots;
drawn selections have the shape of the source above them. The folder of --out gets traces/*.npz, which the method
replay:FILE of benchmarks takes, the table as selections.md and selections.csv, and selections.json.

The table goes to stdout, and as its last line one JSON object with the same numbers.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags

from sparse_serve_jax import results, runtime
from sparse_serve_jax.attention.drawn import held
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.commands import cli
from sparse_serve_jax.evaluation import selections
from sparse_serve_jax.evaluation.accuracy import TEXT, Sample
from sparse_serve_jax.evaluation.cases import DEFAULT_METHOD, DENSE, cases
from sparse_serve_jax.evaluation.corpus import Corpus
from sparse_serve_jax.models import place_params, reference
from sparse_serve_jax.models.here import load_model_here
from sparse_serve_jax.serving import metrics

RANDOM = 1e6  # A, where nothing of a block is kept: the other extreme

with cli.group("What is asked"):
  _TRACES = flags.DEFINE_list("traces", [], "Files of recorded selections.")
  _MODEL = flags.DEFINE_string("model", None, "Also a model directory or a GGUF file, of which a trace is recorded.")
  _DTYPE = cli.define_dtype()
  _TEXT = flags.DEFINE_list("text", [], "What the model reads: UTF-8 files, and folders of .txt and .md files.")
  _LONGBENCH = flags.DEFINE_string("longbench_dir", None, "Likewise contexts of rows: a folder with config/ and data/.")
  _LONGBENCH_TASKS = flags.DEFINE_list("longbench_tasks", [], "Names; by default all whose rows are there.")
  _BUDGETS = flags.DEFINE_list("budgets", ["1024"], "Tokens attended to by the model.")
  _HELD = flags.DEFINE_list(
    "held", ["0.2", "0.4"], "Shares that drawn selections beside each trace keep from step to step: A of held:A."
  )
  _FIT = flags.DEFINE_bool("fit", False, "Also the A that is nearest to each trace.")
with cli.group("How much"):
  _TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of a piece of text.", lower_bound=1024)
  _STEPS = flags.DEFINE_integer("steps", 256, "Decode steps of a piece.", lower_bound=selections.FILLED + 1)
  _REQUESTS = flags.DEFINE_integer("requests", 2, "Pieces, which are read one after the other.", lower_bound=1)
_OUT = cli.define_out("Folder of results.", required=False)
_VERBOSE = cli.define_verbose()


def main() -> None:
  shares = cli.numbers(_HELD, float)
  known = {pathlib.Path(file).stem: Trace.load(reference.file(file)) for file in _TRACES.value}
  corpus = Corpus(tuple(_TEXT.value), _LONGBENCH.value, tuple(_LONGBENCH_TASKS.value))
  if (_MODEL.value is None) == bool(_TEXT.value or _LONGBENCH.value):
    raise ValueError("--model reads text of --text or --longbench_dir: both are needed, or neither")
  if not known and _MODEL.value is None:
    raise ValueError("--traces or --model is needed")
  out = None if _OUT.value is None else results.take_folder(_OUT.value)
  runtime.configure()
  rows: list[dict[str, Any]] = []
  for name, trace in [*known.items(), *(_recorded(_MODEL.value, corpus, out) if _MODEL.value is not None else ())]:
    found = {"source": name, "like": name, **selections.in_short(trace)}
    rows.append(found | ({"fit": selections.fit(trace)} if _FIT.value else {}))
    for share in [*shares, RANDOM]:
      label = "random" if share == RANDOM else f"held:{share:g}"
      drawn = selections.drawn_like(label, held(share), trace)
      rows.append({"source": label, "like": name, **selections.in_short(drawn)})
    print(f"{name}: done", file=sys.stderr)
  flat = [_flat(row) for row in rows]
  if out is not None:
    results.replace_json(out / "selections.json", {"rows": rows, "made": results.provenance()})
    results.write_table(out / "selections", flat)
  columns = {}
  for row in flat:
    source, like = row.pop("source"), row.pop("like")
    columns[source if source == like else f"{source} ({like})"] = row
  cli.end_with(metrics.table(columns), {"rows": rows})


def _recorded(name: str, corpus: Corpus, out: pathlib.Path | None) -> Iterator[tuple[str, Trace]]:
  """Traces of the model over text, by what they are called; they are written to `out`."""
  model = load_model_here(name, dtype=_DTYPE.value)
  budgets, n_tokens = cli.numbers(_BUDGETS, int), _TOKENS.value
  if n_tokens > model.config.max_context:
    raise ValueError(f"--tokens={n_tokens} is beyond the model's context of {model.config.max_context}")
  wanted = [case for case in cases([DEFAULT_METHOD], budgets, []) if case.series != DENSE]
  pieces = corpus.pieces(model.tokenizer, n_tokens, _REQUESTS.value)
  sample = Sample(TEXT, n_tokens, _REQUESTS.value, 1, _STEPS.value, pieces=pieces)
  for case, trace in selections.measure(model, place_params(model), sample, wanted):
    name = f"{model.name}_{n_tokens}_{case.at:g}"
    if out is not None:
      (out / "traces").mkdir(exist_ok=True)
      trace.save(out / "traces" / f"{name}.npz")
    yield name, trace


def _flat(row: dict[str, Any]) -> dict[str, Any]:
  """With a column for each number."""
  parts = {f"misses at {slots}": share for slots, share in row["misses"].items()}
  parts |= {f"A {way}": share for way, share in row.get("fit", {}).items()}
  return {key: value for key, value in row.items() if key not in ("misses", "fit")} | parts


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
