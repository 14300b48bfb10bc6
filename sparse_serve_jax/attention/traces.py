"""Recorded selections of a trained model: which blocks each of successive decode steps attended to."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
import zlib

import numpy as np

from sparse_serve_jax.files import writing

# What numpy, zipfile and zlib raise for a file that is no trace, or a damaged one.
_BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Trace:
  """The selections of n successive decode steps of R requests.

  A file of one is a numpy .npz of three arrays: `selected`, packed eight steps to a byte, since a block is mostly
  selected or not for many steps in a row and that compresses well; `lengths`; and `about`, the rest as JSON.
  """

  selected: np.ndarray  # [R, n, L, K, N] bool: blocks attended, sinks and window included, the tail not
  lengths: np.ndarray  # [R] int32, tokens of a request before its first step; its full blocks are those of S tokens
  block_tokens: int  # S
  case: str  # such as "cuboid_mean 2048"
  model: str
  task: str
  policy: str = "topk"  # sparse.policy; of "psa" all that was read before the stop test passed is selected

  def ids(self) -> np.ndarray:
    """Block ids [n, L, R, K, C], ascending; C is the most that a step selects, and -1 stands beyond a count.

    They are int16, or int32 where a request has more than 32,768 blocks.
    """
    by_step = self.selected.transpose(1, 2, 0, 3, 4)
    count = by_step.sum(-1)
    dtype = np.int16 if by_step.shape[-1] <= 2**15 else np.int32
    ids = np.argsort(~by_step, -1, stable=True)[..., : count.max()].astype(dtype)
    return np.where(np.arange(ids.shape[-1]) < count[..., None], ids, dtype(-1))

  def save(self, file: str | pathlib.Path) -> None:
    about = {key: getattr(self, key) for key in ("block_tokens", "case", "model", "task", "policy")}
    about["steps"] = self.selected.shape[1]
    packed = np.packbits(np.moveaxis(self.selected, 1, -1), -1)  # [R, L, K, N, n / 8]
    with writing(file):
      np.savez_compressed(file, selected=packed, lengths=self.lengths, about=np.array(json.dumps(about)))

  @classmethod
  def load(cls, file: str | pathlib.Path) -> Trace:
    """Reads a file that `save` wrote.

    Raises:
      ValueError: it is no such file, or nothing is selected in it.
    """
    try:
      with open(file, "rb") as opened, np.load(opened) as arrays:
        about = json.loads(str(arrays["about"]))
        selected = np.unpackbits(arrays["selected"], axis=-1, count=about.pop("steps")).astype(bool)
        trace = cls(np.moveaxis(selected, -1, 1), arrays["lengths"], **about)
    except _BROKEN as error:
      what = "it is no .npz file" if "pickle" in str(error) else getattr(error, "strerror", None) or error
      raise ValueError(f"{file} is no trace of selections: {what}") from error
    if not trace.selected.any():
      raise ValueError(f"{file} is a trace of nothing: of shape {trace.selected.shape}, and no block is selected")
    return trace
