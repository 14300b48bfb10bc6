"""Trains a small model that retrieves over long contexts, from nothing, in pieces of any length.

  python -m experiments.train_reference --config=configs/training/reference.json --out=/tmp/reference --resume

The folder of --out gets a tokenizer, checkpoints, metrics.jsonl (a line every --log_every steps) and, whenever the
program ends, hf/: the model as a Hugging Face directory. Once all steps are made, its accuracy on every generated task
and length is measured (accuracy.json; what is there is not done again): the share of answers whose every token is the
most likely one, which is what greedy decoding gives. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from sparse_serve_jax import processes, runtime
from sparse_serve_jax.config import find_config
from sparse_serve_jax.evaluation import tasks
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
_LENGTHS = flags.DEFINE_list("lengths", ["2048", "4096", "8192", "16384"], "Tokens at which accuracy is measured.")
_INSTANCES = flags.DEFINE_integer("instances", 200, "Of every task and length.", lower_bound=1)

SHARD_BYTES = 15 << 20  # of the weights that are written
TOKENS_AT_ONCE = 1 << 17  # of a forward pass of the evaluation


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  runtime.configure()
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  try:
    config = TrainConfig.read(find_config("training", _CONFIG.value))
    if (out / "checkpoints").exists() and not _RESUME.value:
      raise ValueError(f"--out={out} has a run: --resume goes on with it")
    start = load_model(_START.value) if _START.value else None
    lengths = [int(n) for n in _LENGTHS.value]
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  tokenizer = _tokenizer(config, out, start)
  if not 0 < tokenizer.vocab_size <= config.model.vocab_size:
    raise app.UsageError(f"a tokenizer of {tokenizer.vocab_size} tokens for a vocab_size of {config.model.vocab_size}")
  run = trainer.Trainer(config, out, start.params if start else None)
  if run.step < config.steps:
    _train(run, tokenizer, out)
  model = Model(
    config.model, run.params(), tokenizer, tuple(tokenizer.encode(END, add_special_tokens=False)), "reference"
  )
  shutil.rmtree(out / "hf.partial", ignore_errors=True)
  save_hf(model, out / "hf.partial", SHARD_BYTES)
  shutil.rmtree(out / "hf", ignore_errors=True)
  (out / "hf.partial").rename(out / "hf")
  result: dict[str, Any] = {"steps": run.step, "of": config.steps}
  if run.step == config.steps:
    file = out / "accuracy.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    left = [n for n in lengths if str(n) not in found]
    for n, of_tasks in accuracies(model, left, _INSTANCES.value):
      found[str(n)] = of_tasks
      file.write_text(json.dumps(found, indent=2) + "\n")
    result["accuracy"] = found
    if found:
      _print_table(found)
  print(json.dumps(result), flush=True)


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
      losses = {name: float(getattr(metrics, name)) for name in ("loss", "digest_loss", "grad_norm")}
      counts = zip(data.SOURCES, metrics.right.tolist(), metrics.answers.tolist(), strict=True)
      right = {source: n / answers for source, n, answers in counts if answers}
      rate = seen / (time.monotonic() - began)
      answers = ", ".join(f"{source} {share:.1%}" for source, share in right.items())
      bar.set_postfix_str(f"loss {losses['loss']:.3f}, answers: {answers}, {rate / 1e3:.0f}k tokens/s")
      row = dict(step=step, tokens=batch.weights.shape[1], **losses, answers=right, tokens_per_s=rate)
      file.write(json.dumps(row) + "\n")
      file.flush()

    run.run(data.batches(config, tokenizer, run.step, _WORKERS.value), _SECONDS.value, on_step)


def accuracies(model: Model, lengths: list[int], n_instances: int) -> Iterator[tuple[int, dict[str, float]]]:
  """Of every length and task, the share of evaluation instances that greedy decoding answers wholly.

  One forward pass over prompt and answer tells it: as long as every token is the answer's, decoding sees the same.
  """
  right = jax.jit(lambda params, tokens: trainer.forward(model.config, params, tokens)[0].argmax(-1))
  params, names = jax.device_put(model.params), sorted(tasks.TASKS)
  jobs = itertools.product(lengths, names, range(n_instances))
  made = processes.ahead(functools.partial(_evaluation, model.tokenizer), jobs, _WORKERS.value)
  for n_tokens in lengths:
    found, at_once = {}, max(1, TOKENS_AT_ONCE // n_tokens)
    for name in tqdm(names, desc=f"{n_tokens} tokens", disable=None):
      hits: list[bool] = []
      while len(hits) < n_instances:
        count = min(at_once, n_instances - len(hits))
        tokens, answers = np.zeros((at_once, n_tokens), np.int32), np.zeros((at_once, n_tokens), bool)
        for i, (ids, n_prompt) in enumerate(itertools.islice(made, count)):
          tokens[i, : len(ids)], answers[i, n_prompt : len(ids)] = ids, True
        best = np.asarray(right(params, jnp.asarray(tokens)))
        wrong = (best[:, :-1] != tokens[:, 1:]) & answers[:, 1:]
        hits += (~wrong.any(1))[:count].tolist()
      found[name] = float(np.mean(hits))
    yield n_tokens, found


def _evaluation(tokenizer: Tokenizer, job: tuple[int, str, int]) -> tuple[list[int], int]:
  n_tokens, name, seed = job
  return tasks.make(name, n_tokens, seed, tokenizer, split="eval").encode(tokenizer)


def _print_table(accuracies: dict[str, dict[str, float]]) -> None:
  print(f"{'task':<24}" + "".join(f"{n:>8}" for n in accuracies))
  for name in next(iter(accuracies.values())):
    print(f"{name:<24}" + "".join(f"{row[name]:8.1%}" for row in accuracies.values()))


if __name__ == "__main__":
  app.run(main)
