"""Weights that are read when they are wanted and kept by nobody."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

AHEAD = min(16, os.cpu_count() or 1)  # layers of a leaf that are read at the same time


@dataclasses.dataclass(frozen=True)
class FileStamp:
  """A file as it was when its headers were read."""

  path: pathlib.Path
  size: int  # bytes
  modified: int  # nanoseconds

  @classmethod
  def of(cls, path: pathlib.Path) -> FileStamp:
    status = os.stat(path)
    return cls(path, status.st_size, status.st_mtime_ns)

  def now(self) -> str:
    """What has become of it: "unchanged", "changed" or "gone"."""
    try:
      return "unchanged" if FileStamp.of(self.path) == self else "changed"
    except FileNotFoundError:
      return "gone"


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
  """One array of a model's weights, of which only shape and type are in memory.

  `np.asarray(leaf)` reads all of it into a new array. `parts` reads it piece by piece: a stacked leaf by layer, another
  one at once.
  """

  name: str  # "layers.wqkv"
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[int], np.ndarray]  # index of a part -> the part, in `dtype`
  stacked: bool = False  # whether part i is leaf[i]; otherwise part 0 is all
  files: tuple[FileStamp, ...] = ()  # that `read` reads
  # Sharding -> the array on the devices, as long as somebody uses it; see `place_params`.
  placed: weakref.WeakValueDictionary[Any, Any] = dataclasses.field(default_factory=weakref.WeakValueDictionary)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def part(self, i: int) -> np.ndarray:
    """Part i.

    Raises:
      ValueError: a file has gone or has changed.
    """
    for file in self.files:
      if (now := file.now()) != "unchanged":
        raise ValueError(f"weight {self.name!r} cannot be read: {file.path} is {now} since the model was loaded")
    try:
      part = self.read(i)
    except Exception as error:
      error.add_note(f"while part {i} of the weight {self.name!r} was read")
      raise
    assert part.shape == self.shape[self.stacked :] and part.dtype == self.dtype
    return part

  def parts(self) -> Iterator[np.ndarray]:
    """All parts in order. At most AHEAD are in memory besides the one that the caller has."""
    if not self.stacked:
      yield self.part(0)
      return
    waiting: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
      for i in range(self.shape[0]):
        waiting.append(pool.submit(self.part, i))
        if len(waiting) == AHEAD:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    if copy is False:
      raise ValueError(f"weight {self.name!r} is not in memory: it is read anew each time")
    if not self.stacked:
      whole = self.part(0)
    else:
      whole = np.empty(self.shape, self.dtype)
      for i, part in enumerate(self.parts()):
        whole[i] = part
    return whole if dtype is None else whole.astype(dtype, copy=False)


def mismatches(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
  """A line for every array that is missing, unknown or misshapen."""
  lines = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
  lines += [f"unknown: {name} {found[name]}" for name in sorted(found.keys() - wanted.keys())]
  lines += [
    f"shape: {name} is {found[name]}, the configuration says {shape}"
    for name, shape in wanted.items()
    if found.get(name, shape) != shape
  ]
  return lines
