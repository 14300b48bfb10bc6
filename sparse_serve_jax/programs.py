"""What a setup's steps are compiled to: per-device functions over a mesh, with the cache donated. And what is refused
before."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Maps
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.mesh import AXIS
from sparse_serve_jax.models import llama
from sparse_serve_jax.step import Setup, StepOutput, decode_step, prefill_segment

COMPILES = "/jax/core/compile/backend_compile_duration"  # JAX tells its begin and its end, an error's too


@functools.lru_cache(maxsize=32)
def programs(setup: Setup, mesh: Mesh) -> Programs:
  """The programs of a setup: engines of the same setup share what has been compiled."""
  return Programs(setup, mesh)


class Programs:
  """The jitted programs of one setup. Calling one donates the cache it is given.

  decode(params, cache, batch, width), prefill(params, cache, kept, batch, width) and working_sets(hot, batch, width): a
  `width` is static. release_and_admit(hot, freed, idle, lanes, tables) also returns something to wait for.
  """

  def __init__(self, setup: Setup, mesh: Mesh):
    specs, whole = kv_cache.cache_specs(), cast(Any, P())
    params = llama.param_specs(setup.model, mesh.size)
    cache, everywhere = kv_cache.cache_shardings(mesh, setup.offload), cast(Any, NamedSharding(mesh, whole))

    def program(f, in_specs, out_specs, out_shardings, donate=(), sized=False):
      """f(*arrays), or if `sized` f(width, *arrays), called with the static width last."""

      def run(*args):
        arrays, per_device = (args[:-1], functools.partial(f, args[-1])) if sized else (args, f)
        return _mapped(per_device, mesh, in_specs, out_specs, arrays)

      static = len(in_specs) if sized else ()
      # A pool in host memory stays there only if the result says so.
      return jax.jit(run, static_argnums=static, donate_argnums=donate, out_shardings=out_shardings)

    def working_sets(width, hot, batch):
      n_blocks = batch.positions // hot.tail.shape[4]
      counts = kv_cache.working_sets(hot, batch.lanes, n_blocks, batch.steps, width, setup.working_set_steps)
      return jax.lax.psum(counts, AXIS)

    heads, held = cast(Any, (specs.hot.tail, cache.hot.tail))  # of what an audit finds
    output = StepOutput(whole, whole, whole, audit=heads)
    read = StepOutput(everywhere, everywhere, everywhere, audit=held)
    decode, prefill = functools.partial(decode_step, setup), functools.partial(prefill_segment, setup)
    self.decode = program(decode, (params, specs, whole), (specs, output), (cache, read), (1,), sized=True)
    self.prefill = program(
      prefill,
      (params, specs, whole, whole),
      (specs, whole, specs.hot.tail, output),
      (cache, everywhere, cache.hot.tail, read),
      (1, 2),
      sized=True,
    )

    def release_and_admit(hot, *changes):
      hot = kv_cache.release_and_admit(hot, *changes)
      return hot, hot.clock + 0  # is there when it has run

    done = (specs.hot, whole), (cache.hot, everywhere)
    self.release_and_admit = program(release_and_admit, (specs.hot, *[whole] * 4), *done, (0,))
    self.working_sets = program(working_sets, (specs.hot, whole), whole, everywhere, sized=True)


def _mapped(f, mesh: Mesh, in_specs, out_specs, arrays):
  """f(*arrays) on each device's parts. Arrays of size 0 (the slots of a cache in HBM, the digests of a dense one) are
  made within: jaxlib 0.11.2 crashes when it compiles for two devices and one of them is an operand."""
  leaves, tree = jax.tree.flatten(arrays)
  specs = jax.tree.leaves(jax.tree.broadcast(in_specs, arrays))
  made = [None if x.size else NamedSharding(mesh, s).shard_shape(x.shape) for x, s in zip(leaves, specs, strict=True)]

  def per_device(*parts):
    parts = iter(parts)
    whole = [next(parts) if s is None else jnp.zeros(s, x.dtype) for s, x in zip(made, leaves, strict=True)]
    return f(*tree.unflatten(whole))

  operands, in_specs = zip(*((x, s) for x, s in zip(leaves, specs, strict=True) if x.size), strict=True)
  return jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def implementation_of(config: EngineConfig, head_dim: int) -> str:
  """The implementation of kernels that a configuration asks for.

  Raises:
    NotImplementedError: it does not run here.
  """
  backend, name = jax.default_backend(), config.implementation
  if name == "auto":
    name = "triton" if backend == "gpu" else "xla"
  if name == "triton" and backend != "gpu":
    raise NotImplementedError(f"implementation='triton' needs an NVIDIA GPU, JAX runs on {backend}")
  if name != "xla" and head_dim & (head_dim - 1):
    raise NotImplementedError(f"{head_dim=} is not a power of two: only implementation='xla' can, in HBM")
  if name == "xla" and config.cache.offload and backend == "gpu":
    raise NotImplementedError(
      "implementation='xla' cannot read a pool in host memory; use 'triton', or cache.offload=false"
    )
  return name


def check_variants(config: EngineConfig, setup: Setup, shape: CacheShape) -> None:
  """Raises ValueError if a variant's results have not the shape that they are read with."""
  method, G = setup.attention.selector.method, setup.model.n_heads // setup.model.n_kv_heads
  maps = jax.eval_shape(lambda: Maps.empty(shape.K, shape.L, shape.M, shape.P))
  of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  keys, dtype = jax.ShapeDtypeStruct((2, shape.S, shape.D), setup.model.dtype), jnp.dtype(setup.model.dtype)
  made = {
    f"cache.eviction={config.cache.eviction}": (
      jax.eval_shape(setup.eviction, maps, jax.ShapeDtypeStruct((), jnp.int32)),
      jax.ShapeDtypeStruct((shape.P,), jnp.int32),
    )
  }
  if config.selects:
    digest = jax.ShapeDtypeStruct((2, method.vectors, shape.D), dtype)
    made[f"the digest of sparse.method={config.sparse.method}"] = jax.eval_shape(method.summarize, keys), digest
    scores = jax.eval_shape(method.score, of((G, shape.D)), of((3, method.vectors, shape.D)))
    made[f"the score of sparse.method={config.sparse.method}"] = scores, of((G, 3))
  for name, (actual, expected) in made.items():
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
      raise ValueError(f"{name} gives {actual.dtype}{list(actual.shape)}, not {expected.dtype}{list(expected.shape)}")
