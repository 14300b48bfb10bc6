"""Log probabilities of the tokens of a prompt, which the engine does not make: its prefill keeps the last logits alone.

A forward pass of its own with dense causal attention, over the same weights, whatever attention the engine uses. It
holds activations of the whole prompt, and logits of a chunk at a time. The engine's budget does not count them: XLA
says how much its program takes, and what does not fit beside the engine is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.models import llama
from sparse_serve_jax.sampling_params import MAX_LOGPROBS
from sparse_serve_jax.server.errors import Refused
from sparse_serve_jax.serving import budget
from sparse_serve_jax.serving.plan import TokenLogprobs

_CHUNK = 128  # tokens whose logits are held at a time; lengths are padded to a power of two of at least this


class Scorer:
  """Scores prompts by a model on one device. Not for several threads at once."""

  def __init__(self, cfg: ModelConfig, params: llama.Params):
    self._cfg, self._params = cfg, params
    self._programs: dict[int, jax.stages.Compiled] = {}  # by the number of tokens

  def __call__(self, prompt: Sequence[int], n_top: int) -> list[TokenLogprobs | None]:
    """Of each token after those before it; None of the first, before which there is nothing.

    Args:
      n_top: most likely tokens that are listed beside each.

    Raises:
      Refused: the device has not enough memory for it now.
    """
    n = len(prompt)
    tokens = np.zeros(max(_CHUNK, 1 << (n - 1).bit_length()), np.int32)
    tokens[:n] = prompt
    if len(tokens) not in self._programs:
      self._programs[len(tokens)] = _score.lower(self._cfg, self._params, tokens).compile()
    program = self._programs[len(tokens)]
    _check(n, program)
    own, top, ids = (np.asarray(of)[: n - 1] for of in program(self._params, tokens))
    told = [
      TokenLogprobs(float(one), {int(i): float(v) for i, v in zip(of[:n_top], values[:n_top], strict=True)})
      for one, values, of in zip(own, top, ids, strict=True)
    ]
    return [None, *told]


def _check(n: int, program: jax.stages.Compiled) -> None:
  took, free = program.memory_analysis(), budget.bytes_free()
  if took is None or free is None:
    return
  needed = took.temp_size_in_bytes + took.output_size_in_bytes
  if needed > free:
    raise Refused(
      400,
      f"log probabilities of a prompt (echo) of {n} tokens take {budget.gib(needed)}, and {budget.gib(free)} of memory "
      "are free: give a shorter prompt",
      "prompt",
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(cfg: ModelConfig, params: llama.Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of tokens [T]: what position t says of token t + 1, float32 [T]; the most likely ones, [T, n], and their ids."""
  cos_sin = llama.rope(cfg, jnp.arange(tokens.shape[0], dtype=jnp.int32)[None])

  def layer(x, lp):
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    o = llama.causal_attention(cfg, q, k, v)
    return llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None), None

  x, _ = lax.scan(layer, llama.embed(params, tokens[None]), params["layers"])

  def chunk(of):
    x, target = of
    scores = jax.nn.log_softmax(llama.logits(cfg, params, x, None))
    own = jnp.take_along_axis(scores, target[:, None], 1)[:, 0]
    return own, *lax.top_k(scores, min(MAX_LOGPROBS, scores.shape[1]))

  chunks = x[0].reshape(-1, _CHUNK, x.shape[-1]), jnp.roll(tokens, -1).reshape(-1, _CHUNK)
  own, top, ids = lax.map(chunk, chunks)
  return own.reshape(-1), top.reshape(-1, top.shape[-1]), ids.reshape(-1, ids.shape[-1])
