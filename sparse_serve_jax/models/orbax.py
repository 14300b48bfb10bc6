"""Directories of parameters that orbax writes and reads, of this package's own layout."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sparse_serve_jax import files
from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import FileStamp, Leaf, mismatches


def open_params(directory: pathlib.Path, cfg: ModelConfig) -> llama.Params:
  """Parameters in cfg.dtype, as leaves that are read when they are wanted, each at once. Only shapes are read now.

  Raises:
    ValueError: as of `check`, or arrays that are missing, unknown or misshapen; all are listed.
  """
  check(directory)
  import orbax.checkpoint as ocp  # slow to import

  with ocp.PyTreeCheckpointer() as checkpointer:
    tree: Any = checkpointer.metadata(directory).item_metadata.tree
  found = jax.tree_util.tree_leaves_with_path(tree)
  shapes: dict[str, tuple[int, ...]] = {}
  llama.map_shapes(shapes.setdefault, cfg)
  lines = mismatches(shapes, {".".join(key.key for key in path): tuple(array.shape) for path, array in found})
  if lines:
    raise ValueError(f"{directory} does not fit its configuration in {len(lines)} arrays:\n  " + ";\n  ".join(lines))
  dtype, stamps = llama.dtype_of(cfg), (FileStamp.of(directory / "_METADATA"),)

  def leaf(name: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf(name, shape, dtype, lambda _: _read(directory, name).astype(dtype, copy=False), files=stamps)

  return llama.map_shapes(leaf, cfg)


def check(directory: pathlib.Path, values: bool = False) -> None:
  """Looks whether a directory that orbax wrote is whole, before orbax does, whose threads would tell it all at once.

  Args:
    directory: of arrays.
    values: whether they are read too, one after another; otherwise only their list is.

  Raises:
    ValueError: a file is missing or cut off; names the directory, and the file or the array.
  """
  import tensorstore  # slow to import

  metadata, manifest = directory / "_METADATA", directory / "manifest.ocdbt"
  if not metadata.is_file():
    raise ValueError(f"{directory} is no whole checkpoint: it has no {metadata.name}")
  told = files.read_json(metadata)
  for file in directory.glob("array_metadatas/*"):
    files.read_json(file)
  if not told.get("use_ocdbt"):
    return
  if not manifest.is_file():
    raise ValueError(f"{directory} is no whole checkpoint: it has no {manifest.name}")
  base = {"driver": "file", "path": f"{directory.resolve()}/"}
  with reading(str(directory)):
    store: Any = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
      with reading(f"{directory}: {key.decode()}"):
        if values and not store.read(key).result().value:  # a file that is missing reads as nothing
          raise ValueError("a file of it is missing")


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Around what reads files of orbax's: what is wrong with them is one ValueError, which begins with `what`."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine or its devices
    raise
  except Exception as error:
    if str(error).startswith(what):  # more was told already
      raise
    raise ValueError(f"{what} cannot be read, the checkpoint is damaged: {str(error)[:300]}") from error


@contextlib.contextmanager
def saving(directory: pathlib.Path) -> Iterator[None]:
  """Around what lets orbax write a directory: what goes wrong is one OSError that names it, and no log of threads."""
  log, hook = logging.getLogger("absl"), sys.unraisablehook
  level = log.level

  def unraisable(of: Any) -> None:  # of threads that write on after the others have failed, also later
    if str(of.exc_value) != "Event loop is closed":
      hook(of)

  log.setLevel(logging.CRITICAL)
  sys.unraisablehook = unraisable
  try:
    with files.writing(directory):
      yield
    sys.unraisablehook = hook
  except ValueError as error:  # of tensorstore
    said = re.search(r"([^:]+) \[os_error_code", str(error))
    raise OSError(f"{directory} cannot be written: {said[1].strip() if said else str(error)[:300]}") from error
  finally:
    log.setLevel(level)


def write_params(directory: pathlib.Path, params: llama.Params) -> None:
  """Writes parameters into a new directory. All of them are in memory then."""
  import orbax.checkpoint as ocp  # slow to import

  with saving(directory), ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory, jax.tree.map(np.asarray, params))


def _read(directory: pathlib.Path, name: str) -> np.ndarray:
  import orbax.checkpoint as ocp  # slow to import

  keys = name.split(".")
  wanted: Any = ocp.RestoreArgs(restore_type=np.ndarray)
  for key in reversed(keys):
    wanted = {key: wanted}
  with reading(f"{directory}: {name}"), ocp.PyTreeCheckpointer() as checkpointer:
    args = ocp.args.PyTreeRestore(wanted, restore_args=wanted, partial_restore=True)
    return functools.reduce(lambda tree, key: tree[key], keys, checkpointer.restore(directory, args=args))
