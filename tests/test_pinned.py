"""Pinned host memory: what is taken is given back, and what cannot be had is refused with numbers."""

from __future__ import annotations

import ctypes
import gc
import pathlib

import jax
import numpy as np
import pytest

from sparse_serve_jax.memory import pinned
from sparse_serve_jax.serving.budget import host_bytes_free


class FakeRuntime:
  """CUDA's register of host memory."""

  def __init__(self, most: int):
    self.most, self.registered, self.failure = most, {}, 0

  def cudaHostRegister(self, address: ctypes.c_void_p, n_bytes: ctypes.c_size_t, flags: int) -> int:
    if n_bytes.value > self.most:
      return 2
    self.registered[address.value] = n_bytes.value
    return 0

  def cudaHostGetFlags(self, flags: object, address: ctypes.c_void_p) -> int:
    return self.failure or (0 if address.value in self.registered else 1)

  def cudaGetLastError(self) -> int:
    return 0


def flags_of(address: int) -> list[str] | None:
  """Linux's flags of a mapping; None: nothing is mapped there."""
  inside = False
  for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    if (first := line.split()[0]).endswith(":"):
      if inside and first == "VmFlags:":
        return line.split()[1:]
    else:
      start, end = (int(bound, 16) for bound in first.split("-"))
      inside = start <= address < end
  return None


@pytest.fixture
def runtime(monkeypatch) -> FakeRuntime:
  fake = FakeRuntime(most=8 << 20)
  monkeypatch.setattr(pinned, "_cuda_runtime", lambda: fake)
  monkeypatch.setattr(pinned, "_MAPPED", {})
  return fake


def test_memory_goes_back_once_it_is_not_registered(runtime):
  one, other = pinned._register(5000), pinned._register(5 << 20)
  assert one % (2 << 20) == 0 and other % (2 << 20) == 0 and runtime.registered == {one: 5000, other: 5 << 20}
  assert not pinned.bytes_at(other, 5 << 20).any()
  pinned.give_back()
  assert flags_of(one) and flags_of(other)
  del runtime.registered[one]  # as its array's deleter does
  host_bytes_free()
  assert flags_of(one) is None and flags_of(other)
  del runtime.registered[other]
  pinned._register(1)  # also who takes more
  assert flags_of(other) is None


def test_what_cannot_be_registered_is_refused_and_given_back(runtime):
  with pytest.raises(MemoryError, match=r"no 8388609 bytes of pinned memory \(cudaHostRegister: error 2\)"):
    pinned._register((8 << 20) + 1)
  assert not pinned._MAPPED
  with pytest.raises(MemoryError, match=f"no {1 << 60} bytes of pinned memory"):
    pinned._register(1 << 60)


def test_memory_of_a_device_that_has_failed_stays(runtime):
  """Every call says that the device has failed, of memory too that arrays and buffers of the process still have."""
  runtime.failure, address = 700, pinned._register(5000)
  pinned.give_back()
  assert flags_of(address)
  runtime.failure = 0
  del runtime.registered[address]
  pinned.give_back()
  assert flags_of(address) is None


def test_threads_may_give_back_at_once(runtime, monkeypatch):
  address = pinned._register(5000)
  del runtime.registered[address]
  told = runtime.cudaHostGetFlags

  def first_another(flags, address):
    monkeypatch.setattr(runtime, "cudaHostGetFlags", told)
    pinned.give_back()
    return told(flags, address)

  monkeypatch.setattr(runtime, "cudaHostGetFlags", first_another)
  pinned.give_back()
  assert flags_of(address) is None and not pinned._MAPPED


def test_no_child_shares_it(runtime):
  """A page that parent and child share is copied for whoever writes first, and a device goes on with the other."""
  assert "dc" in (flags_of(pinned._register(4 << 20)) or ())


@pytest.mark.gpu
def test_a_device_reads_it_and_it_counts_as_free_when_its_array_is_gone():
  n, device = 2 << 30, jax.devices()[0]
  before = host_bytes_free() or 0
  array = pinned.pinned_array((n,), "uint8", device)
  pinned.bytes_at(array.unsafe_buffer_pointer(), n)[-5:] = 7
  assert np.asarray(jax.device_put(array, jax.sharding.SingleDeviceSharding(device)))[-8:].tolist() == [0] * 3 + [7] * 5
  during = host_bytes_free() or 0
  del array
  gc.collect()
  after = host_bytes_free() or 0
  assert before - during > n // 2 and after - during > n // 2, (before, during, after)
