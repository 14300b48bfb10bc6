"""What a machine has, what is wrong with it for this project, and how fast it moves bytes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import time
from collections.abc import Mapping

import jax
import numpy as np

from sparse_serve_jax.benchmarks.timing import Ceilings, Effort

LEAST_CAPABILITY = 8.0  # compute capability: bfloat16 in Triton's products of matrices
LEAST_DRIVERS = {12: 525, 13: 580}  # major version of CUDA -> that of NVIDIA's driver
CUDA = ("jax-cuda13-plugin", "jax-cuda12-plugin")  # packages that bring it to JAX
GPU_EFFORT = Effort(calls=3, seconds=0.02, copy_bytes=512 << 20)
CPU_BYTES = 128 << 20  # that are copied at a time
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI's vendor, and the class that graphics and 3D are of


@dataclasses.dataclass(frozen=True)
class Machine:
  """What there is, as far as it is known; nothing is measured."""

  backend: str  # of JAX: cpu, gpu, tpu; "" if JAX could not begin
  devices: tuple[str, ...]  # kinds, one for each device
  capability: float | None = None  # compute capability of the least of them
  driver: str | None = None  # version of NVIDIA's
  nvidia: bool = False  # whether there is hardware of NVIDIA's, whatever JAX sees
  cuda: int | None = None  # major version of the CUDA that JAX has
  platforms: str = ""  # what JAX_PLATFORMS says
  error: str = ""  # why JAX could not begin
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by package

  @classmethod
  def here(cls) -> Machine:
    """This machine. JAX chooses its devices, if it has not yet."""
    versions = {name: v for name in ("jax", "jaxlib", *CUDA) if (v := _version(name))}
    cuda = next((int(re.sub(r"\D", "", name)) for name in CUDA if name in versions), None)
    try:
      devices, error = jax.devices(), ""
    except RuntimeError as failed:
      devices, error = [], str(failed).strip().partition("\n")[0]
    told = [str(getattr(device, "compute_capability", "")) for device in devices]
    found = [float(of) for of in told if re.fullmatch(r"\d+\.\d+", of)]  # others are not NVIDIA's
    return cls(
      backend=devices[0].platform if devices else "",
      devices=tuple(d.device_kind for d in devices),
      capability=min(found, default=None),
      driver=driver_version(pathlib.Path("/proc/driver/nvidia/version")),
      nvidia=has_nvidia(pathlib.Path("/sys/bus/pci/devices")) or pathlib.Path("/dev/nvidia0").exists(),
      cuda=cuda,
      platforms=os.environ.get("JAX_PLATFORMS", ""),
      error=error,
      versions=versions,
    )

  @property
  def trouble(self) -> str | None:
    """What keeps this project from this machine's GPU, and what mends it, in a line; None if nothing does."""
    least = LEAST_DRIVERS[self.cuda or max(LEAST_DRIVERS)]
    if self.backend in ("gpu", "cuda"):
      if self.capability is None:
        return (
          f"JAX runs on {self.devices[0]}, for which there are no kernels: NVIDIA GPUs and CPUs alone are supported"
        )
      if self.capability < LEAST_CAPABILITY:
        return (
          f"{self.devices[0]} has compute capability {self.capability}, and the kernels need {LEAST_CAPABILITY} (A100 "
          "and later): JAX_PLATFORMS=cpu runs on the CPU"
        )
      return None
    if self.backend not in ("", "cpu"):
      return f"JAX runs on {self.backend}, for which there are no kernels: NVIDIA GPUs and CPUs alone are supported"
    if self.nvidia and self.driver is None:
      return f"there is an NVIDIA GPU and no driver: install NVIDIA's driver {least} or later"
    if self.nvidia and self.driver and self.cuda and int(self.driver.partition(".")[0]) < least:
      return f"NVIDIA's driver is {self.driver}, and CUDA {self.cuda} needs {least} or later: install a newer driver"
    if self.nvidia and self.cuda is None:
      return f"there is an NVIDIA GPU (driver {self.driver}) and this JAX has no CUDA: pip install '.[gpu]' adds it"
    if self.nvidia and self.platforms and not re.search("cuda|gpu", self.platforms):
      return f"there is an NVIDIA GPU, and JAX_PLATFORMS={self.platforms} keeps JAX from it: unset it"
    if self.error or self.nvidia:
      return f"JAX does not use this machine's devices: {self.error or 'it found no GPU, though there is one'}"
    return None


def rates() -> dict[str, float]:
  """Bytes a second that this machine moves, measured now, in some seconds: by what moves them."""
  if jax.default_backend() == "gpu":
    of = Ceilings.measure(GPU_EFFORT)
    return {"HBM, read and written": of.hbm, "PCIe, host to device": of.h2d, "PCIe, device to host": of.d2h}
  source, out = np.ones(CPU_BYTES, np.uint8), np.zeros(CPU_BYTES, np.uint8)
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    np.copyto(out, source)
    seconds.append(time.perf_counter() - start)
  return {"host memory, copied by one thread": CPU_BYTES / min(seconds)}


def driver_version(file: pathlib.Path) -> str | None:
  """Of NVIDIA's driver, by what its kernel module says; None: it is not loaded."""
  found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", file.read_text()) if file.is_file() else None
  return found and found[1]


def has_nvidia(folder: pathlib.Path) -> bool:
  """Whether a graphics or 3D device of NVIDIA's is on the PCI bus."""
  return any(
    _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
    for device in (folder.iterdir() if folder.is_dir() else ())
  )


def _read(file: pathlib.Path) -> str:
  try:
    return file.read_text().strip()
  except OSError:
    return ""


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
