"""Weights onto devices, a piece at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import Leaf
from sparse_serve_jax.models.weights import Model

WHOLE_BYTES = 16 << 20  # of a leaf; a larger stacked one travels by layer


def place_params(model: Model, mesh: Mesh | None = None) -> llama.Params:
  """The weights of a model as arrays on the devices of `mesh`, split as `llama.param_specs` says.

  One leaf after another is placed, a large stacked one layer after layer, and what has arrived is forgotten on the
  host: beyond the weights on the devices that takes a few layers of host memory, or the embeddings. The arrays of a
  loaded model are shared: as long as somebody uses them, the next call of the same mesh returns the same ones. A
  model's own arrays are put there at each call.

  Args:
    model: loaded, or one whose `params` are arrays.
    mesh: by default of one device.

  Raises:
    ValueError: the mesh's size does not divide the model, or a weight can no longer be read.
  """
  mesh = make_mesh(1) if mesh is None else mesh
  specs = llama.param_specs(model.config, mesh.size)
  return jax.tree.map(lambda leaf, spec: _place(leaf, NamedSharding(mesh, spec)), model.params, specs)


def is_placed(model: Model, mesh: Mesh) -> bool:
  """Whether `place_params` would return arrays that are on the devices already."""
  specs = llama.param_specs(model.config, mesh.size)
  there = jax.tree.map(lambda leaf, spec: _placed(leaf, NamedSharding(mesh, spec)) is not None, model.params, specs)
  return all(jax.tree.leaves(there))


def _placed(leaf: Leaf | np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array | None:
  placed = leaf.placed.get(sharding) if isinstance(leaf, Leaf) else None
  return None if placed is None or placed.is_deleted() else placed


def _place(leaf: Leaf | np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
  if not isinstance(leaf, Leaf):
    return _put(leaf, sharding)
  placed = _placed(leaf, sharding)
  if placed is None:
    by_layer = leaf.stacked and leaf.nbytes > WHOLE_BYTES
    placed = _put_by_layer(leaf, sharding) if by_layer else _put(np.asarray(leaf), sharding)
    leaf.placed[sharding] = placed
  return placed


def _put(array: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
  """Waits, so that nobody needs the host array any more."""
  if sharding.is_fully_addressable:
    return jax.block_until_ready(jax.device_put(array, sharding))
  # Each process has the whole array; `device_put` would send it to all of them to compare.
  return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, array.__getitem__))


def _put_by_layer(leaf: Leaf, sharding: NamedSharding) -> jax.Array:
  dims: tuple[str | None, ...] = tuple(sharding.spec)
  assert not dims or dims[0] is None, f"layers are not split, got {sharding.spec}"
  of_layer = NamedSharding(sharding.mesh, P(*dims[1:]))
  whole = jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=sharding)()
  write = jax.jit(lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding)
  for i, part in enumerate(leaf.parts()):
    whole = jax.block_until_ready(write(whole, _put(part, of_layer), np.int32(i), 0))
  return whole
