"""What a setup's steps are compiled to: per-device functions over a mesh, with the cache donated."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.mesh import AXIS
from sparse_serve_jax.models import llama
from sparse_serve_jax.step import Setup, StepOutput, decode_step, prefill_segment


@functools.lru_cache(maxsize=32)
def programs(setup: Setup, mesh: Mesh) -> Programs:
  """The programs of a setup: engines of the same setup share what has been compiled."""
  return Programs(setup, mesh)


class Programs:
  """The jitted programs of one setup. Calling one donates the cache it is given.

  decode(params, cache, batch, width), prefill(params, cache, x, batch, width) and working_sets(hot, batch, width): a
  `width` is static. admit(hot, lane, table) and release(hot, freed, idle) also return something to wait for.
  """

  def __init__(self, setup: Setup, mesh: Mesh):
    specs, whole = kv_cache.cache_specs(), cast(Any, P())
    params = llama.param_specs(setup.model, mesh.size)
    cache, everywhere = kv_cache.cache_shardings(mesh, setup.offload), cast(Any, NamedSharding(mesh, whole))

    def program(f, in_specs, out_specs, out_shardings, donate=(), sized=False):
      """f(*arrays), or if `sized` f(width, *arrays), called with the static width last."""

      def run(*args):
        arrays, per_device = (args[:-1], functools.partial(f, args[-1])) if sized else (args, f)
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*arrays)

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
    done = (specs.hot, whole), (cache.hot, everywhere)
    self.admit = program(_and_done(kv_cache.admit), (specs.hot, whole, whole), *done, (0,))
    self.release = program(_and_done(kv_cache.release), (specs.hot, whole, whole), *done, (0,))
    self.working_sets = program(working_sets, (specs.hot, whole), whole, everywhere, sized=True)


def _and_done(f):
  """f(hot, ...), and something that is there when it has run."""

  def run(hot, *args):
    hot = f(hot, *args)
    return hot, hot.clock + 0

  return run
