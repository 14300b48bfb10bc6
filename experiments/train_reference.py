r"""Trains a small model that retrieves over long contexts, from nothing, in pieces of any length.

  python -m experiments.train_reference --config=reference --out=/tmp/reference --resume

The folder of --out gets a tokenizer, checkpoints, metrics.jsonl (a line every --log_every steps) and, at the end of
training or of --seconds, hf/: the model as a Hugging Face directory. What that answers with dense attention tells
(of long answers, whether they begin right)

  python -m experiments.accuracy --model=/tmp/reference/hf --out=/tmp/dense --parts=tasks --methods= --thresholds= \
    --lengths=2048,4096,8192,16384

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import time

from absl import app, flags, logging
from tqdm import tqdm

from experiments import cli
from sparse_serve_jax import runtime
from sparse_serve_jax.config import find_config, read_config, to_json
from sparse_serve_jax.models import Model, load_model, save_hf
from sparse_serve_jax.models.tokenizer import Tokenizer, load_tokenizer
from sparse_serve_jax.training import data, trainer
from sparse_serve_jax.training.config import TrainConfig
from sparse_serve_jax.training.vocabulary import END, train_tokenizer

_CONFIG = flags.DEFINE_string("config", "reference", "What to train: a name in configs/training, or a JSON file.")
_OUT = flags.DEFINE_string("out", None, "Folder of the run.", required=True)
_RESUME = flags.DEFINE_bool("resume", False, "Goes on with the run in --out, if there is one.")
_START = flags.DEFINE_string("start_from", None, "A model directory whose weights and tokenizer a new run begins with.")
_SECONDS = flags.DEFINE_float("seconds", float("inf"), "Of training, after which the run is saved.", lower_bound=0)
_WORKERS = flags.DEFINE_integer("workers", 8, "Processes that make training sequences.", lower_bound=0)
_LOG_EVERY = flags.DEFINE_integer("log_every", 50, "Steps.", lower_bound=1)
_VERBOSE = flags.DEFINE_bool("verbose", False, "Show where an error comes from.")

SHARD_BYTES = 15 << 20  # of the weights that are written: files stay below 16 MB


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  with cli.endings(_VERBOSE.value, f"; --resume goes on from the last checkpoint in {_OUT.value}"):
    _main()


def _main() -> None:
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  config = read_config(TrainConfig, find_config("training", _CONFIG.value))
  if (out / "checkpoints").exists() and not _RESUME.value:
    raise ValueError(f"--out={out} has a run: --resume goes on with it")
  start = load_model(_START.value) if _START.value else None
  tokenizer = _tokenizer(config, out, start)
  if not 0 < tokenizer.vocab_size <= config.model.vocab_size:
    raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for a vocab_size of {config.model.vocab_size}")
  _claim(config, out)
  run = trainer.Trainer(config, out, start.params if start else None)
  if run.step < config.steps:
    _train(run, tokenizer, out)
  end = tuple(tokenizer.encode(END, add_special_tokens=False))
  shutil.rmtree(out / "hf.partial", ignore_errors=True)
  save_hf(Model(config.model, run.params(), tokenizer, end, "reference"), out / "hf.partial", SHARD_BYTES)
  shutil.rmtree(out / "hf", ignore_errors=True)
  (out / "hf.partial").rename(out / "hf")
  print(json.dumps({"steps": run.step, "of": config.steps}), flush=True)


def _claim(config: TrainConfig, out: pathlib.Path) -> None:
  """Writes the run's configuration, or refuses to go on with a run of another."""
  file, text = out / "config.json", to_json(config) + "\n"
  if (file.read_text() if file.exists() else "") != text and (out / "checkpoints").exists():
    raise ValueError(f"the run in {out} has another configuration ({file.name}) than --config={_CONFIG.value}")
  file.write_text(text)


def _tokenizer(config: TrainConfig, out: pathlib.Path, start: Model | None) -> Tokenizer:
  """The run's own, made at its beginning."""
  folder, partial = out / "tokenizer", out / "tokenizer.partial"
  if not folder.exists():
    made = start.tokenizer if start else train_tokenizer(config.model.vocab_size, config.seed)
    partial.mkdir(parents=True, exist_ok=True)
    made.save(partial)
    partial.rename(folder)
  return load_tokenizer(folder)


def _train(run: trainer.Trainer, tokenizer: Tokenizer, out: pathlib.Path) -> None:
  config, began, seen = run.config, time.monotonic(), 0
  with (
    tqdm(total=config.steps, initial=run.step, unit="step", disable=None) as bar,
    (out / "metrics.jsonl").open("a", encoding="utf-8") as file,
  ):

    def on_step(step: int, metrics: trainer.StepMetrics, batch: data.Batch) -> None:
      nonlocal seen
      seen += batch.weights.size
      bar.update(step - bar.n)
      if step % _LOG_EVERY.value and step != config.steps:
        return
      losses = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}
      losses |= {name: float(x) for name, x in metrics.attention.items()}
      counts = zip(data.SOURCES, metrics.right.tolist(), metrics.answers.tolist(), strict=True)
      right = {source: n / answers for source, n, answers in counts if answers}
      rate = seen / (time.monotonic() - began)
      answers = ", ".join(f"{source} {share:.1%}" for source, share in right.items())
      bar.set_postfix_str(f"loss {losses['loss']:.3f}, answers: {answers}, {rate / 1e3:.0f}k tokens/s")
      row = dict(step=step, tokens=batch.weights.shape[1], **losses, answers=right, tokens_per_s=rate)
      file.write(json.dumps(row) + "\n")
      file.flush()

    run.run(data.batches(config, tokenizer, run.step, _WORKERS.value), _SECONDS.value, on_step)


if __name__ == "__main__":
  app.run(main)
