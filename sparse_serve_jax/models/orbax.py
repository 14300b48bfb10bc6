"""Directories of parameters that orbax writes and reads, of this package's own layout."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import FileStamp, Leaf, mismatches


def open_params(directory: pathlib.Path, cfg: ModelConfig) -> llama.Params:
  """Parameters in cfg.dtype, as leaves that are read when they are wanted, each at once. Only shapes are read now.

  Raises:
    ValueError: no such directory, or arrays that are missing, unknown or misshapen; all are listed.
  """
  if not (directory / "_METADATA").is_file():
    raise ValueError(f"{directory} holds no parameters: it has no _METADATA")
  import orbax.checkpoint as ocp  # slow to import

  with ocp.PyTreeCheckpointer() as checkpointer:
    tree: Any = checkpointer.metadata(directory).item_metadata.tree
  found = jax.tree_util.tree_leaves_with_path(tree)
  shapes: dict[str, tuple[int, ...]] = {}
  llama.map_shapes(shapes.setdefault, cfg)
  lines = mismatches(shapes, {".".join(key.key for key in path): tuple(array.shape) for path, array in found})
  if lines:
    raise ValueError(f"{directory} does not fit its configuration in {len(lines)} arrays:\n  " + ";\n  ".join(lines))
  dtype, files = llama.dtype_of(cfg), (FileStamp.of(directory / "_METADATA"),)

  def leaf(name: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf(name, shape, dtype, lambda _: _read(directory, name).astype(dtype, copy=False), files=files)

  return llama.map_shapes(leaf, cfg)


def write_params(directory: pathlib.Path, params: llama.Params) -> None:
  """Writes parameters into a new directory. All of them are in memory then."""
  import orbax.checkpoint as ocp  # slow to import

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory, jax.tree.map(np.asarray, params))


def _read(directory: pathlib.Path, name: str) -> np.ndarray:
  import orbax.checkpoint as ocp  # slow to import

  keys = name.split(".")
  wanted: Any = ocp.RestoreArgs(restore_type=np.ndarray)
  for key in reversed(keys):
    wanted = {key: wanted}
  with ocp.PyTreeCheckpointer() as checkpointer:
    args = ocp.args.PyTreeRestore(wanted, restore_args=wanted, partial_restore=True)
    return functools.reduce(lambda tree, key: tree[key], keys, checkpointer.restore(directory, args=args))
