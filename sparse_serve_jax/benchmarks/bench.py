"""What the cases of all ops share: shapes, rates and arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_serve_jax.benchmarks import timing
from sparse_serve_jax.benchmarks.timing import Baselines, Report, Row, Timing

Cases = Iterator[tuple[str, Callable[[], Row]]]


class Bench:
  """The shapes, the rates and the arrays that cases share. `pick` chooses between a real size and one for --smoke."""

  def __init__(self, report: Report):
    self.pick = lambda real, tiny: tiny if report.smoke else real
    self.effort, self.ceilings = report.effort, report.ceilings
    self.kernel: dict[str, Any] = dict(implementation=report.implementation)
    self.xla: dict[str, Any] = dict(implementation="xla")
    self.heads, self.group, self.depth, self.size = self.pick((8, 4, 128, 32), (2, 2, 16, 8))  # K, G, D, S
    self.block_bytes = 2 * self.size * self.depth * 2
    self.digest_bytes = 2 * self.depth * 2  # E = 2
    self.n_pool, self.n_slots = self.pick(65536, 64), self.pick(131072, 128)  # M, P: 8 GiB and 2 GiB
    self.n_variants = self.pick(4, 1)
    self.rng = np.random.default_rng(0)
    self.attention: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"

  def time(self, op: timing.Op, variants: Any, **kwargs: Any) -> Timing:
    return timing.measure(op, variants, self.effort, **kwargs)[0]

  def row(self, measured: Timing, moved: dict[str, float], baselines: Baselines, **others: float) -> Row:
    moved, found = {way: float(amount) for way, amount in moved.items()}, timing.measure_baselines(baselines)
    return timing.row(measured, self.ceilings.floor_us(**moved), moved, baselines=found, **others)

  def row_of_digests(self, op: timing.Op, variants: Any, moved: dict[str, float]) -> Row:
    """A row of an op on the digests [K, 1, M, 2, D] that takes `implementation`."""

    def time(options):
      digest = self.random(self.heads, 1, self.n_pool, 2, self.depth)
      return self.time(functools.partial(op, **options), variants, state=digest)

    return self.row(time(self.kernel), moved, {"xla": lambda: time(self.xla)})

  def variants(self, make: Callable[[], Any]) -> list[Any]:
    return [jax.device_put(make()) for _ in range(self.n_variants)]

  def random(self, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return timing.normal(jax.random.key(int(self.rng.integers(1 << 31)), impl="rbg"), shape, dtype)

  def distinct(self, limit: int, *shape: int) -> np.ndarray:
    return self.rng.permutation(limit)[: np.prod(shape)].reshape(shape).astype(np.int32)

  def blocks(self, *leading: int) -> jax.Array:
    return self.random(*leading, 2, self.size, self.depth)

  @functools.cached_property
  def pool(self) -> jax.Array:
    """[K, 1, M, 2, S, D] of random blocks, in host memory if this device has one of its own."""
    shape = self.heads, 1, self.n_pool, 2, self.size, self.depth
    pool = jax.device_put(np.zeros(shape, jnp.bfloat16), timing.host_sharding())
    timing.fill_pool(pool)
    return pool
