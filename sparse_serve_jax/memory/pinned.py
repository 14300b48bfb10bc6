"""Pinned host memory of exactly the size that is asked for, as JAX arrays.

It is mapped, touched by several threads, registered with CUDA and handed to JAX by DLPack. That takes a tenth of the
time of `cudaHostAlloc`. JAX's own allocator of pinned memory grows by doubling up to a limit for the process, and gives
nothing back: pools of 5 and then 9 GiB took 24 (`experiments/LOG.md`, 2026-11-28).

Such an array may be donated only to a program of which a result aliases it, as every step's does: XLA ends the process
otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_serve_jax.memory.host_pool import THREADS, bytes_at

_PAGE = 4096  # of memory; one lies before the data, for what DLPack says of it
_HUGE_PAGE = 2 << 20
_TOUCHED = 64 << 20  # by a thread at a time
_HOST = 3  # kDLCUDAHost
_NOT_REGISTERED = 1, 713  # what CUDA says of such memory; after a device has failed it says that of any
PART_BYTES = 16 << 20  # of a copy to the host: 0.3 ms
_BUFFERS: list[jax.Array] = []  # never given back
_MAPPED: dict[int, mmap.mmap] = {}  # of arrays, by the address that is registered
_TYPE_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}  # of DLPack


class _Tensor(ctypes.Structure):
  """DLPack's DLManagedTensor, and the shape that it points to. It lies in the page before the data."""

  _fields_ = (
    ("data", ctypes.c_void_p),
    ("device_type", ctypes.c_int32),
    ("device_id", ctypes.c_int32),
    ("ndim", ctypes.c_int32),
    ("code", ctypes.c_uint8),
    ("bits", ctypes.c_uint8),
    ("lanes", ctypes.c_uint16),
    ("shape", ctypes.c_void_p),
    ("strides", ctypes.c_void_p),  # NULL: row-major
    ("byte_offset", ctypes.c_uint64),
    ("manager", ctypes.c_void_p),
    ("deleter", ctypes.c_void_p),
    ("dims", ctypes.c_int64 * 8),
  )


class _Exporter:
  """What `jax.dlpack.from_dlpack` asks for a tensor."""

  def __init__(self, address: int, device_id: int):
    self._address, self._device_id = address, device_id

  def __dlpack_device__(self) -> tuple[int, int]:
    return _HOST, self._device_id

  def __dlpack__(self, **_: Any) -> Any:
    capsule: Any = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return capsule(self._address, b"dltensor", None)


def pinned_array(dims: tuple[int, ...], dtype: str, device: Any) -> jax.Array:
  """An array in pinned memory of its own, on the host of a device. Its values may be anything.

  Raises:
    MemoryError: the system or CUDA has no pinned memory of that size.
    NotImplementedError: JAX has loaded no CUDA runtime.
  """
  name, n_bytes = jnp.dtype(dtype).name, math.prod(dims) * jnp.dtype(dtype).itemsize
  address, device_id = _register(_PAGE + n_bytes), device.local_hardware_id
  tensor = _Tensor.from_address(address)
  tensor.data, tensor.device_type, tensor.device_id = address + _PAGE, _HOST, device_id
  tensor.ndim, tensor.shape = len(dims), address + _Tensor.dims.offset
  tensor.dims[: len(dims)] = dims
  tensor.code, tensor.bits, tensor.lanes = _TYPE_CODES[name.rstrip("0123456789")], 8 * jnp.dtype(dtype).itemsize, 1
  tensor.strides, tensor.byte_offset, tensor.manager = None, 0, None
  # Called by XLA, from any thread and also while the process ends, with the tensor's address: which is what CUDA knows.
  tensor.deleter = ctypes.cast(_cuda_runtime().cudaHostUnregister, ctypes.c_void_p).value
  return jax.dlpack.from_dlpack(_Exporter(address, device_id), copy=False)


def give_back() -> None:
  """Gives the memory of arrays that are gone back to the system. Whoever asks what is free calls it first."""
  for address in list(_MAPPED):
    flags, runtime = ctypes.c_uint(), _cuda_runtime()
    if error := runtime.cudaHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(address)):
      runtime.cudaGetLastError()  # forgets that
    if error in _NOT_REGISTERED and (memory := _MAPPED.pop(address, None)):  # None: another thread has it
      memory.close()


def _register(n_bytes: int) -> int:
  """The address of so much pinned memory. It is given back once it is no longer registered."""
  give_back()
  refused = f"the host has no {n_bytes} bytes of pinned memory"
  try:
    memory = mmap.mmap(-1, n_bytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  except OSError as error:
    raise MemoryError(f"{refused} ({error})") from error
  with contextlib.suppress(OSError):  # a kernel that has no huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
  memory.madvise(mmap.MADV_DONTFORK)  # else what is written after a fork lies elsewhere, and the device does not see it
  begin, portable = ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1  # portable: pinned for all devices
  address = begin + -begin % _HUGE_PAGE
  pages = bytes_at(address, n_bytes)

  def touch(start: int) -> None:
    pages[start : start + _TOUCHED : _PAGE] = 0

  list(THREADS.map(touch, range(0, n_bytes, _TOUCHED)))
  runtime = _cuda_runtime()
  if error := runtime.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), portable):
    runtime.cudaGetLastError()
    memory.close()
    raise MemoryError(f"{refused} (cudaHostRegister: error {error})")
  _MAPPED[address] = memory
  ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))  # XLA reads the deleter when the process ends, after Python has
  return address


@functools.cache
def pinned_buffer(shape: tuple[int, ...], device: Any) -> np.ndarray:
  """Pinned bytes of which the process has one for each shape and device: its programs use it one after the other."""
  array = pinned_array(shape, "uint8", device)
  _BUFFERS.append(array)
  return bytes_at(array.unsafe_buffer_pointer(), array.nbytes).reshape(shape)


def copy_rows(source: jax.Array, out: np.ndarray) -> Iterator[range]:
  """Copies an array of one device, once it is there, to pinned memory row by row, and tells which rows have come.

  The copy runs under what the device computes, on a stream of its own: JAX's run between its programs (jax 0.11.2). It
  goes in parts, and the next begins when one is there: what another stream copies to the host, as a token, waits for
  the part that is on its way, and not for the whole.

  Args:
    source: [rows, ...].
    out: uint8 [rows, bytes of a row].
  """
  source.block_until_ready()
  runtime, (device,) = _cuda_runtime(), source.devices()
  to_host, address, (n_rows, row_bytes) = 2, source.unsafe_buffer_pointer(), out.shape
  _check(runtime.cudaSetDevice(device.local_hardware_id))
  stream, some = _stream(device.local_hardware_id), max(1, PART_BYTES // row_bytes)
  for first in range(0, n_rows, some):
    rows = range(first, min(n_rows, first + some))
    to, at = ctypes.c_void_p(out[first:].ctypes.data), ctypes.c_void_p(address + first * row_bytes)
    _check(runtime.cudaMemcpyAsync(to, at, ctypes.c_size_t(len(rows) * row_bytes), to_host, stream))
    _check(runtime.cudaStreamSynchronize(stream))
    yield rows


@functools.cache
def _stream(device_id: int) -> ctypes.c_void_p:
  """A stream of a device, which is the current one, that waits for no other."""
  stream, non_blocking = ctypes.c_void_p(), 1
  _check(_cuda_runtime().cudaStreamCreateWithFlags(ctypes.byref(stream), non_blocking))
  return stream


def _check(error: int) -> None:
  if error:
    raise RuntimeError(f"a copy to the host failed (CUDA error {error})")


@functools.cache
def _cuda_runtime() -> ctypes.CDLL:
  """The CUDA runtime that JAX has loaded."""
  jax.devices()
  for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
    if "libcudart" in line:
      return ctypes.CDLL(line.split()[-1])
  raise NotImplementedError(
    "this JAX has loaded no CUDA runtime library (libcudart), which a pool in host memory needs"
  )
