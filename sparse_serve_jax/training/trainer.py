"""The training loop: optax on the model's own layers, checkpoints by orbax, a run that can stop anywhere."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.models import llama, orbax
from sparse_serve_jax.training.attention_losses import LOSSES
from sparse_serve_jax.training.config import AttentionLossWeights, Optimizer, Stage, TrainConfig
from sparse_serve_jax.training.data import SOURCES, Batch

SAVE_EVERY = 60.0  # seconds
QUERIES_PER_SEQUENCE = 128  # tokens of a sequence whose attention is looked at


class TrainState(NamedTuple):
  """All that a run goes on from, besides its configuration."""

  step: jax.Array  # int32, steps made
  params: llama.Params  # float32
  optimizer: Any


class StepMetrics(NamedTuple):
  loss: jax.Array  # nats a token, weighted
  attention: dict[str, jax.Array]  # of `attention_losses.LOSSES` those that count
  answers: jax.Array  # [len(SOURCES)] int32, tokens of weight 1 and more
  right: jax.Array  # [len(SOURCES)] int32, of these, the most likely ones
  grad_norm: jax.Array


def init_params(cfg: ModelConfig, key: jax.Array) -> llama.Params:
  """Float32 parameters to train from: normal, by fan-in, residual branches scaled by (2 L)^-0.5 (GPT-2)."""
  shapes = llama.param_shapes(cfg)
  leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = iter(jax.random.split(key, len(leaves)))

  def leaf(path, shape):
    name, rng = path[-1].key, next(keys)
    if name.endswith("norm"):
      return jnp.ones(shape, jnp.float32)
    if name == "bqkv":
      return jnp.zeros(shape, jnp.float32)
    fan_in = {"wo": cfg.n_heads * cfg.head_dim, "w_down": cfg.d_ff}.get(name, cfg.d_model)
    scale = fan_in**-0.5 * ((2 * cfg.n_layers) ** -0.5 if name in ("wo", "w_down") else 1)
    return scale * jax.random.normal(rng, shape, jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def forward(
  cfg: ModelConfig, params: llama.Params, tokens: jax.Array, look: Callable[..., Any] | None = None
) -> tuple[jax.Array, Any]:
  """By dense causal attention.

  Args:
    cfg: the model.
    params: its parameters.
    tokens: [B, T] int32.
    look: what to tell of a layer's queries [B, T, K, G, D] and keys [B, T, K, D], any tree.

  Returns:
    Logits float32 [B, T, V], and the mean over layers of what `look` tells.
  """
  cos_sin = llama.rope(cfg, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

  def layer(x, lp):
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    o = llama.causal_attention(cfg, q, k, v)
    return llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None), look(q, k) if look else ()

  # Unrolled, as a loop would stack what each layer keeps for the backward pass.
  x, told = lax.scan(layer, llama.embed(params, tokens), params["layers"], unroll=cfg.n_layers)
  return llama.logits(cfg, params, x, None), jax.tree.map(lambda x: x.mean(0), told)


def loss(
  config: TrainConfig, params: llama.Params, batch: Batch, key: jax.Array, attention_loss: AttentionLossWeights
) -> tuple[jax.Array, dict[str, Any]]:
  """What is minimised, and all of StepMetrics but the norm.

  That is the weighted mean cross entropy in nats, and by their weights the losses of attention at QUERIES_PER_SEQUENCE
  tokens of each sequence: those that predict answers before others, otherwise at random by `key`.
  """
  cfg = config.model
  tokens, weights, sources = map(jnp.asarray, batch)
  answers = weights >= 1
  params = jax.tree.map(lambda x: x.astype(llama.dtype_of(cfg)), params)
  order = answers.astype(jnp.float32) + jax.random.uniform(key, weights.shape)
  at = lax.top_k(order, min(QUERIES_PER_SEQUENCE, weights.shape[1]))[1]

  loss_weights = {name: weight for name, weight in dataclasses.asdict(attention_loss).items() if weight}

  def look(q: jax.Array, k: jax.Array) -> dict[str, jax.Array]:
    return {name: LOSSES[name](q, k, at) for name in loss_weights}

  logits, of_attention = forward(cfg, params, tokens[:, :-1], look)
  targets = tokens[:, 1:]
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  of_source = sources[None] == jnp.arange(len(SOURCES))[:, None]  # [sources, B]

  def count(tokens):
    """By source, of tokens [B, n] that count."""
    return jnp.where(of_source, tokens.sum(1)[None], 0).sum(1)

  right = answers & (logits.argmax(-1) == targets)
  of_tokens = (weights * nats).sum() / jnp.maximum(weights.sum(), 1)
  total = of_tokens + sum(weight * of_attention[name] for name, weight in loss_weights.items())
  return total, dict(loss=of_tokens, attention=of_attention, answers=count(answers), right=count(right))


def _float32(cfg: ModelConfig, params: llama.Params) -> llama.Params:
  """Given parameters as those that are trained, one after another.

  Raises:
    ValueError: they are of another model.
  """
  shapes = jax.tree.map(lambda x: tuple(x.shape), params)
  if shapes != llama.param_shapes(cfg):
    raise ValueError(f"the parameters to start from are of another model: {shapes}")
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), params)


def optimizer_of(config: Optimizer, n_steps: int) -> optax.GradientTransformation:
  rate, warmup, decay = config.learning_rate, config.warmup_steps, config.decay_steps
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0, rate, warmup),
      optax.constant_schedule(rate),
      optax.linear_schedule(rate, 0, max(1, decay)),
    ],
    [warmup, max(warmup, n_steps - decay)],
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule,
      config.beta1,
      config.beta2,
      weight_decay=config.weight_decay,
      # Layers are stacked, so that a norm's weights have two dimensions too.
      mask=functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: not path[-1].key.endswith(("norm", "bqkv"))
      ),
    ),
  )


def step_bytes(cfg: ModelConfig, stage: Stage) -> int:
  """About what a step needs where the devices are the host: within a quarter of what XLA's CPU compiler says (losses of
  attention not counted). Parameters, their gradients and two moments; and what the backward pass reads: scores and
  probabilities of all pairs of tokens, what layers keep, logits.
  """
  params = sum(map(math.prod, jax.tree.leaves(llama.param_shapes(cfg), is_leaf=lambda x: isinstance(x, tuple))))
  layer = 4 * cfg.d_model + 4 * cfg.d_ff + 3 * (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
  token = cfg.n_layers * (3 * cfg.n_heads * stage.tokens + layer) + 2 * cfg.vocab_size
  return 4 * (4 * params + stage.sequences * stage.tokens * token)


class Trainer:
  """A run in a directory: made anew, or gone on with from the last checkpoint there.

  The sequences of a step are split over as many of the devices as they can be split over evenly; each has all of the
  parameters.
  """

  def __init__(self, config: TrainConfig, directory: str | pathlib.Path, start_from: llama.Params | None = None):
    """`start_from`: parameters to begin a new run with, instead of random ones. They may be a loaded model's.

    Raises:
      ValueError: the checkpoint to go on from is damaged, or `start_from` is of another model.
    """
    import orbax.checkpoint as ocp  # slow to import

    self.config = config
    self._args = ocp.args
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    self._folder = pathlib.Path(directory).resolve() / "checkpoints"
    self._checkpoints = ocp.CheckpointManager(self._folder, options=options)
    optimizer = optimizer_of(config.optimizer, config.steps)
    count = math.gcd(jax.device_count(), *(stage.sequences for stage in config.stages))
    mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
    whole, self._split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def begin(params: llama.Params) -> TrainState:
      return jax.device_put(TrainState(jnp.int32(0), params, optimizer.init(params)), whole)

    def anew() -> TrainState:
      return begin(init_params(config.model, jax.random.key(config.seed)))

    def step(state: TrainState, batch: Batch, attention_loss: AttentionLossWeights) -> tuple[TrainState, StepMetrics]:
      f = jax.value_and_grad(functools.partial(loss, config, attention_loss=attention_loss), has_aux=True)
      (_, found), grads = f(state.params, batch, jax.random.fold_in(jax.random.key(config.seed), state.step))
      with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        updates, opt = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
      return TrainState(state.step + 1, params, opt), StepMetrics(**found, grad_norm=optax.tree.norm(grads))

    self._step = jax.jit(step, static_argnums=2, donate_argnums=0, out_shardings=whole)
    if (last := self._checkpoints.latest_step()) is None:
      self.state = anew() if start_from is None else begin(_float32(config.model, start_from))
    else:
      # With a sharding of now, otherwise a checkpoint asks for the devices that it was made on.
      like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(anew))
      orbax.check(self._folder / str(last) / "default", values=True)
      with orbax.reading(str(self._folder / str(last))):
        restored: Any = self._checkpoints.restore(last, args=ocp.args.StandardRestore(like))
      self.state = TrainState(*restored)

  @property
  def step(self) -> int:
    return int(self.state.step)

  def run(
    self, batches: Iterable[Batch], seconds: float, on_step: Callable[[int, StepMetrics, Batch], None] | None = None
  ) -> None:
    """Makes a step of every batch until there is none, or so many seconds have passed.

    A checkpoint is saved every SAVE_EVERY seconds and at the end, also when that is an exception. `on_step` is called
    with the steps made and the metrics of the step before the last one, so that the device never waits for the host,
    nor the host runs far ahead.
    """
    end, save_at, waiting, done = time.monotonic() + seconds, time.monotonic() + SAVE_EVERY, None, self.step
    try:
      for batch in batches:
        loss_weights = self.config.stage_of(done).attention_loss
        self.state, metrics = self._step(self.state, jax.device_put(batch, self._split), loss_weights)
        done += 1
        if waiting is not None:
          jax.block_until_ready(waiting[0])
          if on_step:
            on_step(done - 1, *waiting)
        waiting = metrics, batch
        if time.monotonic() > save_at:
          self.save()
          save_at = time.monotonic() + SAVE_EVERY
        if time.monotonic() > end:
          break
      if on_step and waiting is not None:
        on_step(done, *waiting)
    finally:
      if not any(x.is_deleted() for x in jax.tree.leaves(self.state)):  # a step that failed has lost its state
        self.save()

  def save(self) -> None:
    """Writes a checkpoint of where the run is, unless there is one. Raises OSError, which names it: it cannot be."""
    if self._checkpoints.latest_step() != self.step:
      with orbax.saving(self._folder / str(self.step)):
        self._checkpoints.save(self.step, args=self._args.StandardSave(self.state))
        self._checkpoints.wait_until_finished()

  def params(self) -> llama.Params:
    """The parameters on the host, in the model's dtype."""
    return jax.tree.map(lambda x: np.asarray(x).astype(llama.dtype_of(self.config.model)), self.state.params)
