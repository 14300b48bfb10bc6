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
import itertools
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from pallas_kernels.stop import REST, WHEN
from sparse_serve_jax import processes, tasks
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.attention.methods import TOP_P
from sparse_serve_jax.config import EngineConfig, ModelConfig, SparseConfig, override
from sparse_serve_jax.evaluation import replay
from sparse_serve_jax.models import Model, llama
from sparse_serve_jax.models.tokenizer import Tokenizer
from sparse_serve_jax.serving.budget import bytes_free
from sparse_serve_jax.tasks import text as texts

BLOCK_SIZES = (32, 16, 64)  # the first is that of all other comparisons
STEP_BUCKETS = (48, 96)  # steps are padded to one of these, or to the most there may be
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # over tokens
TEXT = "text"
DEFAULT_METHOD = SparseConfig().method

# Variations that may be asked for besides methods, budgets and thresholds. Those of budgets are the default method's.
AXES = {
  "between": "budgets between those given, for comparison with PSA",
  "sinks": "without sinks and window",
  "layers": "two dense layers",
  "heads": "blocks ranked by the best query head of a group, not by the mean",
  "blocks": "blocks of 16 and 64 tokens",
  "stops": "PSA's thresholds on the ranking of min_max too, with its estimate and with a certified stop",
  "rules": "PSA's thresholds with every other rule of the stop test (sparse.rest, sparse.stop_when)",
}

# Series that tables name; those of budgets have their method's name, or the axis's.
DENSE, WINDOW, PSA, PSA_MIN_MAX, CERTIFIED = "dense", "sinks and window", "psa", "psa, min_max", "certified"

# What a stop test claims may exceed the true mass by this: both are sums of float32 shares of a few hundred blocks, and
# the bound allows for the rounding of logits. Thresholds beyond 0.999 are too near to 1 for a stop test in float32.
TOLERANCE = 1e-5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One setting: a point of a series, that is of a line of a plot, at a budget in tokens, a threshold or 1."""

  series: str
  at: float
  config: EngineConfig
  oracle: bool = False
  certified: bool = False

  @property
  def name(self) -> str:
    return f"{self.series} {self.at:g}"

  @property
  def stops(self) -> bool:
    """Whether a test, and no budget, says how much is attended to."""
    return self.config.sparse.policy == "psa"

  @property
  def digest_vectors(self) -> int:
    """Vectors that are read of each block to rank them: none where nothing is ranked, or by true mass."""
    unranked = self.oracle or self.series in (DENSE, WINDOW)
    return 0 if unranked else get_method(self.config.sparse.method).vectors


def cases(
  names: Sequence[str], budgets: Sequence[int], thresholds: Sequence[float], axes: Collection[str] = ()
) -> Iterator[Case]:
  """Dense; every method at every budget; PSA at every threshold; and along the `AXES` that are named."""

  def case(
    series: str,
    at: float,
    *changes: str,
    oracle: bool = False,
    certified: bool = False,
    block_tokens: int = BLOCK_SIZES[0],
  ) -> Case:
    small = f"sparse.sink_tokens={block_tokens}", f"sparse.window_tokens={block_tokens}"
    base = [f"cache.block_tokens={block_tokens}", *small, "sparse.policy=topk"]
    return Case(series, at, override(EngineConfig(), [*base, *changes]), oracle, certified)

  yield case(DENSE, 1, "sparse.policy=dense")
  for low, high in itertools.pairwise(budgets) if "between" in axes else ():
    if (between := (low + high) // 2 // max(BLOCK_SIZES) * max(BLOCK_SIZES)) > low:
      yield case(DEFAULT_METHOD, between, f"sparse.token_budget={between}")
  for budget in budgets:
    of = f"sparse.token_budget={budget}"
    for name in names:
      if name == "window":
        rest = max(0, budget - BLOCK_SIZES[0])
        yield case(WINDOW, budget, of, f"sparse.window_tokens={rest}")
      elif name != "top_p":
        method = DEFAULT_METHOD if name == "oracle" else name
        yield case(name, budget, of, f"sparse.method={method}", oracle=name == "oracle")
    if "sinks" in axes:
      yield case("no sinks, no window", budget, of, "sparse.sink_tokens=0", "sparse.window_tokens=0")
    if "layers" in axes:
      yield case("two layers dense", budget, of, "sparse.dense_layers=2")
    if "heads" in axes:
      yield case("best query head", budget, of, "sparse.group_reduce=max")
    for size in BLOCK_SIZES[1:] if "blocks" in axes else ():
      yield case(f"blocks of {size}", budget, of, block_tokens=size)
  if "top_p" in names:
    yield case("top_p", TOP_P, f"sparse.token_budget={1 << 20}", "sparse.method=top_p")
  for threshold in thresholds:
    of = "sparse.policy=psa", f"sparse.threshold={threshold}"
    yield case(PSA, threshold, *of)
    if "stops" in axes:
      yield case(PSA_MIN_MAX, threshold, *of, "sparse.method=min_max")
      yield case(CERTIFIED, threshold, *of, "sparse.method=min_max", certified=True)
    for rest, when in itertools.product(REST, WHEN) if "rules" in axes else ():
      if (rest, when) != (SparseConfig().rest, SparseConfig().stop_when):
        yield case(f"{PSA}, {rest}, {when}", threshold, *of, f"sparse.rest={rest}", f"sparse.stop_when={when}")


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

    The last tokens are the answer, at most a half.
    """
    width = -(-n_tokens // max(BLOCK_SIZES)) * max(BLOCK_SIZES)
    tokens, n = np.zeros((len(seeds), width), np.int32), min(most_steps, n_tokens // 2)
    for row, seed in zip(tokens, seeds, strict=True):
      rng = np.random.default_rng([1, zlib.crc32(TEXT.encode()), n_tokens, seed])
      row[:n_tokens] = tokenizer.encode(texts.document(rng, n_tokens, text))[:n_tokens]  # a word is a token or more
    start = np.full(len(seeds), n_tokens - n - 1, np.int32)
    return cls(tokens, start, np.ones((len(seeds), n), bool), by_token=True)


class Sample(NamedTuple):
  """Instances of a task at a length, and how they are run."""

  task: str  # a name in `tasks.TASKS`, or TEXT
  tokens: int  # of prompt and answer
  instances: int  # of the evaluation split, from its first on
  at_once: int  # of a batch
  steps: int  # decode steps at most; a longer answer is judged by its beginning
  text: str | None = None  # a file that sentences are taken from; None: they are generated

  def batch(self, tokenizer: Tokenizer, first: int) -> Instances:
    seeds = range(first, min(first + self.at_once, self.instances))
    text = texts.user_text(self.text) if self.text else texts.sentences
    if self.task == TEXT:
      return Instances.of_text(tokenizer, self.tokens, seeds, self.steps, text)
    return Instances.of(tokenizer, self.task, self.tokens, seeds, self.steps, text)


def replays(
  model: Model, params: Any, sample: Sample, wanted: Sequence[Case], workers: int = 0
) -> Iterator[tuple[Instances, Case, replay.Replay]]:
  """Yields, for each batch of instances, the replay of each case, on the device. Arguments as those of `measure`."""
  _check_fits(model.config, min(sample.at_once, sample.instances), sample.tokens)
  firsts = range(0, sample.instances, sample.at_once)
  batches = processes.ahead(functools.partial(sample.batch, model.tokenizer), firsts, workers)
  name = f"{sample.task} {sample.tokens}"
  with tqdm(desc=name, total=len(firsts) * len(wanted), unit="setting", leave=False, disable=None) as bar:
    for batch in batches:
      dense = replay.prefill(model.config, params, batch.tokens)
      for case in wanted:
        yield batch, case, replayed(model, params, case, dense, batch)
        bar.update()


def _check_fits(cfg: ModelConfig, n_sequences: int, n_tokens: int) -> None:
  """Raises ValueError if a prefill needs more memory than there is: nothing is tiled in `llama.causal_attention`."""
  kv = 2 * n_sequences * n_tokens * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * llama.dtype_of(cfg).itemsize
  # float32, of one layer: before the softmax and after it.
  scores = 0 if llama.attends_fused(cfg) else 2 * 4 * n_sequences * cfg.n_heads * n_tokens**2
  free = bytes_free()
  if free is not None and kv + scores > free:
    raise ValueError(
      f"{n_sequences} sequences of {n_tokens} tokens at once take {kv / 2**30:.1f} GiB for keys and values and "
      f"{scores / 2**30:.1f} GiB for the scores of a layer, and {free / 2**30:.1f} GiB are free: lower "
      "--tokens_at_once or the lengths"
    )


def replayed(model: Model, params: Any, case: Case, dense: replay.Prefill, batch: Instances) -> replay.Replay:
  """The replay of a case over the prefill of a batch, on the device."""
  n, options = batch.answers.shape[1], dict(oracle=case.oracle, certified=case.certified)
  return replay.replay(model.config, params, case.config, dense, batch.start, n, **options)


def measure(
  model: Model, params: Any, sample: Sample, wanted: Sequence[Case], workers: int = 0
) -> Iterator[tuple[Case, Row]]:
  """Yields what there is to tell of each case.

  A row has of what `summary` tells means over instances, and sums of counts; under "each" accuracy and nats of every
  instance; for a case that stops, under "by_head" the blocks attended by layer and KV head: their mean over all
  answers' tokens [L, K], and QUANTILES over these tokens [5, L, K].

  Args:
    model: the model.
    params: its parameters on the device.
    sample: the instances.
    wanted: the settings.
    workers: processes that make instances ahead; 0: this one does.
  """
  parts: dict[str, list[dict[str, np.ndarray]]] = {case.name: [] for case in wanted}
  blocks: dict[str, list[np.ndarray]] = {case.name: [] for case in wanted}
  for batch, case, found in replays(model, params, sample, wanted, workers):
    found = jax.device_get(found._replace(selected=None))  # by far the largest
    parts[case.name].append(summary(model, case, batch, found))
    if case.stops:
      blocks[case.name].append(found.blocks[batch.answers])
  for case in wanted:
    whole = {key: np.concatenate([part[key] for part in parts[case.name]]) for key in parts[case.name][0]}
    row: Row = {key: int(x.sum()) if x.dtype == int else float(x.mean()) for key, x in whole.items()}
    if case.stops:
      of_tokens = np.concatenate(blocks[case.name])  # [tokens, L, K]
      quantiles = np.quantile(of_tokens, QUANTILES, 0)
      row["by_head"] = {"mean": of_tokens.mean(0).round(3).tolist(), "quantiles": quantiles.round(3).tolist()}
    yield case, row | {"each": {key: whole[key].astype(float).round(6).tolist() for key in ("accuracy", "nats")}}


def summary(model: Model, case: Case, batch: Instances, found: Any) -> dict[str, np.ndarray]:
  """One number an instance of each quantity, over its answer's steps, layers and heads; counts are integers.

  Of a case that stops, "pairs" counts those of a token and a query head, in every layer; "stopped" those with blocks
  left unread; "violations" those for which the stop test claimed more than the true mass (PSA's where it stopped, the
  certified one in any test, made or not); and "short" those that got less than the threshold. "claimed" and "true" are
  means over those that stopped, 1 if none did. "stops" counts those of a token and a KV head with blocks left unread,
  and "broken" the ones whose query heads have less than the threshold: one of them, or their mean if that is tested.
  """
  cfg, size = model.config, case.config.cache.block_tokens
  answers = batch.answers

  def mean(x):
    """Over the steps of x [B, n] that are answers."""
    return (x * answers).sum(1) / answers.sum(1)

  def count(x):
    """Over the answers' steps, all layers and heads of x [B, n, L, K, G]."""
    return (x.sum((2, 3, 4)) * answers).sum(1)

  attended = found.blocks.mean((2, 3))  # [B, n]
  exist = (batch.start[:, None] + np.arange(answers.shape[1])[None]) // size  # [B, n]
  block, digest = 2 * size * cfg.head_dim, case.digest_vectors * cfg.head_dim
  digest *= 1 - case.config.sparse.dense_layers / cfg.n_layers
  told = {
    "accuracy": mean(found.right) if batch.by_token else (found.right | ~answers).all(1),
    "nats": mean(found.nats),
    "blocks": mean(attended),
    "bytes": mean((attended * block + exist * digest) / np.maximum(exist * block, 1)),  # 0 where only a tail is
    "mass": mean(found.mass.mean((2, 3, 4))),
  }
  if case.stops:
    told["estimate_error"] = mean((found.estimate - found.mass).mean((2, 3, 4)))
    sparse = case.config.sparse
    stops = (found.blocks < exist[..., None, None])[..., None]  # [B, n, L, K, 1]
    least = sparse.threshold - TOLERANCE
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
