"""Kernels write where they may and nowhere else: under NVIDIA's memory checker on a GPU, against XLA anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import start

ROOT = Path(__file__).resolve().parent.parent
# A gap after every array, as its neighbour is no error either; what the driver answers to questions about features that
# are not there is none of ours.
SANITIZER = ["compute-sanitizer", "--tool=memcheck", "--padding=65536", "--report-api-errors=no", "--error-exitcode=9"]


def checked(*command: str) -> subprocess.CompletedProcess[str]:
  # One compilation at a time: compute-sanitizer follows every process that XLA starts to assemble a kernel, and
  # now and then crashes itself when several start at once.
  xla = "--xla_gpu_enable_command_buffer= --xla_gpu_force_compilation_parallelism=1"
  env = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": xla}
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.soak
def test_kernels_leave_what_xla_leaves():
  done = start("tests.sanitized")
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("plant", [False, True])
def test_under_the_memory_checker(plant: bool):
  if not shutil.which("compute-sanitizer"):
    pytest.skip("compute-sanitizer is not installed")
  done = checked(*SANITIZER, sys.executable, "-m", "tests.sanitized", *["--plant"] * plant)
  text = done.stdout + done.stderr
  assert (done.returncode == 9 and "Invalid __global__ write" in text) if plant else done.returncode == 0, text[-4000:]
