"""How accuracy depends on what is attended to: settings, and what replayed decode steps tell.

Instances of generated tasks are answered with dense attention up to their question; question and answer are decode
steps with sparse attention (`replay`). That is harsher than serving, where the question is part of the prompt and is
read densely: an answer of a token or two would otherwise say nothing of sparse attention. An instance is right if every
token of its answer is the most likely one, which is stricter than `tasks.Task.score`, which gives parts for lists.
`TEXT` is one more task, of ordinary text: its last tokens are the answer, and what counts is their likelihood.

What is measured is a row for each task, length and setting; `report` makes tables of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_serve_jax import processes, progress, tasks
from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.evaluation import replay
from sparse_serve_jax.evaluation.cases import BLOCK_SIZES, DENSE, Case, cases
from sparse_serve_jax.models import Model, llama
from sparse_serve_jax.models.tokenizer import Tokenizer
from sparse_serve_jax.serving.budget import bytes_free, kv_bytes
from sparse_serve_jax.tasks import text as texts

STEP_BUCKETS = (48, 96)  # steps are padded to one of these, or to the most there may be
LEAVES = 0.8  # of the free memory is for keys, values and scores; projections and the replay need some
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # over tokens
TEXT = "text"
LEAST_TOKENS = 32  # of a context: less than a block leaves nothing to select from
EACH = ("accuracy", "nats", "agreement", "error", "prompt_nats")  # of every instance; the last of sparse prefill

# What a stop test claims may exceed the true mass by this: both are sums of float32 shares of a few hundred blocks, and
# the bound allows for the rounding of logits. Thresholds beyond 0.999 are too near to 1 for a stop test in float32.
TOLERANCE = 1e-5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Instances:
  """Instances of one task, padded to one length."""

  tokens: np.ndarray  # [B, T] int32
  start: np.ndarray  # [B] int32, the first decode step: where the question begins
  answers: np.ndarray  # [B, n] bool, the steps that predict a token of the answer
  by_token: bool = False  # an instance is right by the share of its tokens, and not as a whole

  @classmethod
  def of(
    cls,
    tokenizer: Tokenizer,
    task: str,
    n_tokens: int,
    seeds: range,
    most_steps: int,
    text: texts.Text = texts.sentences,
  ) -> Instances:
    width = -(-n_tokens // max(BLOCK_SIZES)) * max(BLOCK_SIZES)
    tokens, start, end = np.zeros((len(seeds), width), np.int32), [], []
    first_answer = []
    for row, seed in zip(tokens, seeds, strict=True):
      instance = tasks.make(task, n_tokens, seed, tokenizer, split="eval", text=text)
      ids, n_prompt = instance.encode(tokenizer)
      row[: len(ids)] = ids
      context = instance.prompt.rindex("\nQuestion:")
      start.append(len(tokenizer.encode(instance.prompt[:context])))
      first_answer.append(n_prompt)
      end.append(len(ids))
    needed = max(b - a for a, b in zip(start, end, strict=True)) - 1
    n = min(most_steps, next((size for size in STEP_BUCKETS if size >= needed), most_steps))
    predicted = np.array(start)[:, None] + np.arange(n)[None] + 1
    answers = (predicted >= np.array(first_answer)[:, None]) & (predicted < np.array(end)[:, None])
    if not answers.any(1).all():
      begins = max(b - a for a, b in zip(start, first_answer, strict=True))
      raise ValueError(
        f"{most_steps} decode steps end before the answer to a question of {task!r} begins: that takes {begins}, and "
        f"{needed} for the whole of it"
      )
    return cls(tokens, np.array(start, np.int32), answers)

  @classmethod
  def of_text(
    cls, tokenizer: Tokenizer, n_tokens: int, seeds: range, most_steps: int, text: texts.Text = texts.sentences
  ) -> Instances:
    """Beginnings of texts that no training saw: `training.data` seeds its own with a step number instead of the CRC.

    They are split as those of `of_pieces`.
    """
    tokens = np.zeros((len(seeds), n_tokens), np.int32)
    for row, seed in zip(tokens, seeds, strict=True):
      rng = np.random.default_rng([1, zlib.crc32(TEXT.encode()), n_tokens, seed])
      row[:] = tokenizer.encode(texts.document(rng, n_tokens, text))[:n_tokens]  # a word is a token or more
    return cls.of_pieces(tokens, n_tokens, most_steps)

  @classmethod
  def of_pieces(cls, pieces: np.ndarray, n_tokens: int, most_steps: int) -> Instances:
    """Of texts [B, >= n_tokens] of one length. The last tokens are the answer, at most a half."""
    width, n = -(-n_tokens // max(BLOCK_SIZES)) * max(BLOCK_SIZES), min(most_steps, n_tokens // 2)
    tokens = np.zeros((len(pieces), width), np.int32)
    tokens[:, :n_tokens] = pieces[:, :n_tokens]
    start = np.full(len(pieces), n_tokens - n - 1, np.int32)
    return cls(tokens, start, np.ones((len(pieces), n), bool), by_token=True)

  def mean(self, x: np.ndarray) -> np.ndarray:
    """[B], over the steps of x [B, n] that are answers."""
    return (x * self.answers).sum(1) / self.answers.sum(1)


class Sample(NamedTuple):
  """Instances of a task at a length, and how they are run."""

  task: str  # a name in `tasks.TASKS`, or TEXT
  tokens: int  # of prompt and answer
  instances: int  # of the evaluation split, from its first on
  at_once: int  # of a batch; fewer where memory is short
  steps: int  # decode steps at most; a longer answer is judged by its beginning
  text: tuple[str, ...] = ()  # files that the sentences of tasks are taken from; none: they are generated
  pieces: np.ndarray | None = None  # [instances, tokens] of TEXT, as `Corpus.pieces`; None: it is generated

  def batch(self, tokenizer: Tokenizer, first: int) -> Instances:
    seeds = range(first, min(first + self.at_once, self.instances))
    text = texts.user_text(*self.text) if self.text else texts.sentences
    if self.task == TEXT and self.pieces is not None:
      return Instances.of_pieces(self.pieces[seeds.start : seeds.stop], self.tokens, self.steps)
    if self.task == TEXT:
      return Instances.of_text(tokenizer, self.tokens, seeds, self.steps, text)
    return Instances.of(tokenizer, self.task, self.tokens, seeds, self.steps, text)


def replays(
  model: Model, params: Any, sample: Sample, wanted: Sequence[Case], workers: int = 0
) -> Iterator[tuple[Instances, Case, replay.Replay]]:
  """Yields, for each batch of instances, the replay of each case, on the device. Arguments as those of `measure`."""
  sample = sample._replace(at_once=min(sample.at_once, most_at_once(model.config, sample.tokens)))
  firsts = range(0, sample.instances, sample.at_once)
  batches = processes.ahead(functools.partial(sample.batch, model.tokenizer), firsts, workers)
  name = f"{sample.task} {sample.tokens}"
  with progress.bar(desc=name, total=len(firsts) * len(wanted), unit="setting", leave=False) as bar:
    for batch in batches:
      dense = replay.prefill(model.config, params, batch.tokens)
      for case in wanted:
        yield batch, case, replayed(model, params, case, dense, batch)
        bar.update()


def most_at_once(cfg: ModelConfig, n_tokens: int) -> int:
  """How many sequences of `n_tokens` a prefill has memory for: nothing is tiled in `llama.causal_attention`.

  Raises:
    ValueError: for none.
  """
  kv = n_tokens * kv_bytes(cfg)
  # float32, of one layer: before the softmax and after it.
  scores = 0 if llama.attends_fused(cfg) else 2 * 4 * cfg.n_heads * n_tokens**2
  free = bytes_free()
  if free is None:
    return 1 << 30
  if kv + scores > free:
    raise ValueError(
      f"a sequence of {n_tokens} tokens takes {kv / 2**30:.1f} GiB for keys and values and {scores / 2**30:.1f} GiB "
      f"for the scores of a layer, and {free / 2**30:.1f} GiB are free: take shorter ones"
    )
  return max(1, int(LEAVES * free / (kv + scores)))


def replayed(model: Model, params: Any, case: Case, dense: replay.Prefill, batch: Instances) -> replay.Replay:
  """The replay of a case over the prefill of a batch, or over one of its own if it is sparse, on the device."""
  n = batch.answers.shape[1]
  if case.prefills:
    dense = replay.sparse_prefill(model.config, params, case.config, batch.tokens, batch.start)
  return replay.replay(model.config, params, case.config, dense, batch.start, n, oracle=case.oracle, claims=case.claims)


def measure(
  model: Model, params: Any, sample: Sample, wanted: Sequence[Case], workers: int = 0
) -> Iterator[tuple[Case, Row]]:
  """Yields the row of each case.

  It has the quantities of `summary`: their means over instances, of counts the sums; "agreement", the share of steps
  whose most likely token is dense attention's; under "each" EACH of every instance; under "error_by_layer" the relative
  error of heads' outputs [L]. For a case of sparse prefill: "prompt_nats", those of a prompt's last tokens, "read", the
  share of the blocks before a tile of queries that it reads, and "read_by_layer" [L]. For a case that stops: under
  "by_head" the blocks attended by layer and KV head: their mean over all answers' tokens [L, K], and QUANTILES over
  these tokens [5, L, K].

  Args:
    model: the model.
    params: its parameters on the device.
    sample: the instances.
    wanted: the settings.
    workers: processes that make instances ahead; 0: this one does.
  """
  batches: dict[str, list[_Measured]] = {case.name: [] for case in wanted}
  dense, best_of_dense = next(cases([], [], [])), np.zeros(())
  others = [case for case in wanted if case.series != DENSE]
  for batch, case, found in replays(model, params, sample, [dense, *others], workers):
    found = jax.device_get(found._replace(selected=None))  # by far the largest
    if case is dense:
      best_of_dense = found.best
    if case.name in batches:  # dense may not be wanted itself
      told = summary(model, case, batch, found) | {"agreement": batch.mean(found.best == best_of_dense)}
      answers = batch.answers
      batches[case.name].append(_Measured(told, found.error.mean((3, 4))[answers], found.blocks[answers], found.read))
  for case in wanted:
    each, errors, blocks, reads = zip(*batches[case.name], strict=True)
    whole = {key: np.concatenate([of[key] for of in each]) for key in each[0]}
    row: Row = {key: int(x.sum()) if x.dtype == int else float(x.mean()) for key, x in whole.items()}
    if case.stops:
      of_tokens = np.concatenate(blocks)
      quantiles = np.quantile(of_tokens, QUANTILES, 0)
      row["by_head"] = {"mean": of_tokens.mean(0).round(3).tolist(), "quantiles": quantiles.round(3).tolist()}
    if case.prefills:
      row["read_by_layer"] = np.concatenate(reads).mean(0).round(5).tolist()
    row["error_by_layer"] = np.concatenate(errors).mean(0).round(5).tolist()
    yield case, row | {"each": {key: whole[key].astype(float).round(6).tolist() for key in EACH if key in whole}}


class _Measured(NamedTuple):
  """What a case did of a batch."""

  each: dict[str, np.ndarray]  # [B], by quantity
  errors: np.ndarray  # [tokens of answers, L]
  blocks: np.ndarray  # [tokens of answers, L, K]
  read: np.ndarray | None  # [B, L], of a sparse prefill


def of_all_tasks(rows: Sequence[Row]) -> list[list[Row]]:
  """The rows of each case that all tasks have, in the order of the tasks."""
  by_case: dict[str, list[Row]] = {}
  for row in sorted(rows, key=lambda row: row["task"]):
    by_case.setdefault(row["case"], []).append(row)
  n_tasks = len({row["task"] for row in rows})
  return [ours for ours in by_case.values() if len(ours) == n_tasks]


def summary(model: Model, case: Case, batch: Instances, found: Any) -> dict[str, np.ndarray]:
  """One number of each quantity for each instance, over its answer's steps, layers and heads; counts are integers.

  Of a case that stops, "pairs" counts those of a token and a query head, in every layer; "stopped" those with blocks
  left unread; "violations" those for which the stop test claimed more than the true mass (PSA's where it stopped, the
  certified one in any test, made or not); and "short" those that got less than the threshold. "claimed" and "true" are
  means over those that stopped, 1 if none did. "stops" counts those of a token and a KV head with blocks left unread,
  and "broken" the ones whose query heads have less than the threshold: one of them, or their mean if that is tested.
  """
  cfg, size = model.config, case.config.cache.block_tokens
  answers, mean = batch.answers, batch.mean

  def count(x):
    """Over the answers' steps, all layers and heads of x [B, n, L, K, G]."""
    return (x.sum((2, 3, 4)) * answers).sum(1)

  attended = found.blocks.mean((2, 3))  # [B, n]
  exist = (batch.start[:, None] + np.arange(answers.shape[1])[None]) // size  # [B, n]
  block, digest = 2 * size * cfg.head_dim, case.digest_vectors * cfg.head_dim
  digest *= 1 - case.config.sparse.dense_layers / cfg.n_layers
  read = attended * block + exist * digest  # [B, n] numbers, of a layer and KV head
  told = {
    "accuracy": mean(found.right) if batch.by_token else (found.right | ~answers).all(1),
    "nats": mean(found.nats),
    "blocks": mean(attended),
    "bytes": mean(read / np.maximum(exist * block, 1)),  # of dense's; 0 where only a tail is
    "bytes_read": mean(read * cfg.n_kv_heads * llama.dtype_of(cfg).itemsize),  # a step and layer
    "mass": mean(found.mass.mean((2, 3, 4))),
    "error": mean(found.error.mean((2, 3, 4))),
  }
  if case.prefills:
    told |= {"read": found.read.mean(1), "prompt_nats": found.prompt_nats}
  if case.stops:
    told["estimate_error"] = mean((found.estimate - found.mass).mean((2, 3, 4)))
    sparse = case.config.sparse
    stops = (found.blocks < exist[..., None, None])[..., None]  # [B, n, L, K, 1]
    least = sparse.fixed_threshold - TOLERANCE
    of_stop = found.mass.mean(-1) if sparse.stop_when == "mean_of_heads" else found.mass.min(-1)
    stopped = stops & np.ones_like(found.mass, bool)
    told["pairs"] = count(np.ones_like(found.mass, int))
    told["stopped"] = count(stopped)
    told["violations"] = count(found.excess > TOLERANCE)
    told["short"] = count(found.mass < least)
    told["stops"], told["broken"] = count(stops), count(stops & (of_stop < least)[..., None])
    for key, share in (("claimed", found.estimate), ("true", found.mass)):
      sums = count(np.where(stopped, share, 0.0).astype(float))
      told[key] = np.where(told["stopped"] > 0, sums / np.maximum(told["stopped"], 1), 1.0)
  return told
