"""Loops over layers whose bounds XLA knows: it copies the weights of each layer of other loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


def over_range(
  run: Callable[[Any, Any, Any], Any], first: Int32[Array, ""], length: Int32[Array, ""], usual: int, n: int, carry: Any
) -> Any:
  """`run(begin, end, carry)` of a range in [0, n), whose bounds are integers of Python if it is a usual one: the next
  `usual`, from a multiple of them on, or what is left of n. With `usual` 0 none is."""
  end = first + length
  if not usual:
    return run(first, end, carry)
  ranges = [(begin, min(begin + usual, n)) for begin in range(0, n, usual)]
  found = jnp.stack([(first == begin) & (end == until) for begin, until in ranges])
  branches = [functools.partial(run, *bounds) for bounds in ranges]
  which = jnp.where(found.any(), jnp.argmax(found), len(ranges))
  return jax.lax.switch(which, [*branches, functools.partial(run, first, end)], carry)
