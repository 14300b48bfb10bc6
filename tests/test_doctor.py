"""What a machine has and what is wrong with it, by machines that are made up; and `sparse-serve doctor` on this one."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from sparse_serve_jax.benchmarks import machine
from sparse_serve_jax.benchmarks.machine import Machine
from sparse_serve_jax.config import load_config, override
from tests.forks import start

H200 = Machine("gpu", ("NVIDIA H200",), 9.0, "580.65.06", True, 13)
SEEN = dataclasses.replace(H200, backend="cpu", devices=("cpu",), capability=None)  # JAX sees none of the GPU


@pytest.mark.parametrize(
  ("found", "trouble"),
  [
    (H200, None),
    (Machine("cpu", ("cpu",)), None),
    (
      dataclasses.replace(H200, devices=("Tesla T4",), capability=7.5),
      "Tesla T4 has compute capability 7.5, and the kernels need 8.0 (A100 and later)",
    ),
    (Machine("gpu", ("AMD Instinct MI300X",)), "JAX runs on AMD Instinct MI300X, for which there are no kernels"),
    (Machine("tpu", ("TPU v5",)), "JAX runs on tpu, for which there are no kernels"),
    (dataclasses.replace(SEEN, driver=None), "no driver: install NVIDIA's driver 580 or later"),
    (dataclasses.replace(SEEN, driver=None, cuda=12), "no driver: install NVIDIA's driver 525 or later"),
    (dataclasses.replace(SEEN, driver="535.129.03"), "driver is 535.129.03, and CUDA 13 needs 580 or later"),
    (dataclasses.replace(SEEN, driver="535.129.03", cuda=12, platforms="cpu"), "JAX_PLATFORMS=cpu keeps JAX from it"),
    (dataclasses.replace(SEEN, cuda=None), "(driver 580.65.06) and this JAX has no CUDA: pip install '.[gpu]'"),
    (SEEN, "JAX does not use this machine's devices: it found no GPU, though there is one"),
    (Machine("", (), error="Unable to initialize backend 'cuda'"), "devices: Unable to initialize backend 'cuda'"),
  ],
)
def test_what_is_wrong_is_a_line(found: Machine, trouble: str | None):
  assert (found.trouble is None) == (trouble is None)
  if trouble is not None:
    assert found.trouble and trouble in found.trouble and "\n" not in found.trouble


def test_the_driver_and_hardware_are_read_from_the_system(tmp_path: Path):
  module = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)\nGCC version: 12"
  )
  (tmp_path / "version").write_text(module)
  assert machine.driver_version(tmp_path / "version") == "570.86.15"
  assert machine.driver_version(tmp_path / "absent") is None
  for name, vendor, kind in (("0000:00:01.0", "0x8086", "0x030000"), ("0000:00:02.0", "0x10de", "0x040300")):
    (tmp_path / "pci" / name).mkdir(parents=True)
    (tmp_path / "pci" / name / "vendor").write_text(vendor + "\n")
    (tmp_path / "pci" / name / "class").write_text(kind + "\n")
  assert not machine.has_nvidia(tmp_path / "pci") and not machine.has_nvidia(tmp_path / "absent")
  (tmp_path / "pci" / "0000:00:02.0" / "class").write_text("0x030200\n")  # a 3D controller, as data centres have
  assert machine.has_nvidia(tmp_path / "pci")


def test_the_table_and_the_proposed_line_are_of_what_fits():
  done = start("sparse_serve_jax", "doctor", "--config=psa", "--set", "sparse.threshold=0.9")
  *table, last = done.stdout.splitlines()
  told = json.loads(last)
  if told["trouble"] is None:
    assert (done.returncode, done.stderr) == (0, "")
  names = [line.partition("  ")[0] for line in table]
  assert names[:6] == ["devices", "driver", "versions", "device memory", "host memory", "can be pinned"]
  assert told["rates"] and all(rate > 1e8 for rate in told["rates"].values())
  assert {f"fits: {name}" for name in told["fits"]} == {name for name in names if name.startswith("fits: ")}
  assert {"llama3-8b", "llama-3.2-1b", "reference"} <= set(told["fits"])
  assert told["fits"]["reference"]["refused"] is None and told["fits"]["reference"]["max_context"] > 1024
  assert table[-1].endswith(told["command"])
  words = shlex.split(told["command"])
  assert words[:4] == ["sparse-serve", "serve", "MODEL", "--config=psa"]
  proposed = override(load_config("psa"), [word for word in words[4:] if word != "--set"])
  assert isinstance(proposed.cache.hbm_bytes, int) and isinstance(proposed.cache.dram_bytes, int)
  assert proposed.sparse.threshold == 0.9 and proposed.scheduler.max_context >= 1024


def test_the_proposed_line_can_be_pasted(tmp_path: Path):
  (tmp_path / "my model").symlink_to(Path(__file__).resolve().parent.parent / "models" / "reference")
  done = start("sparse_serve_jax", "doctor", str(tmp_path / "my model"))
  assert shlex.split(json.loads(done.stdout.splitlines()[-1])["command"])[2] == str(tmp_path / "my model")


def test_a_model_that_does_not_fit_is_told_with_numbers():
  done = start("sparse_serve_jax", "doctor", "random:tiny", "--set=cache.dram_bytes=1024TiB")
  *table, last = done.stdout.splitlines()
  assert done.returncode == 0 and json.loads(last)["command"] is None and "proposed" not in done.stdout
  (line,) = [line for line in table if line.startswith("fits: random:tiny")]
  assert re.search(r"no: cache.dram_bytes asks for 1048576.00 GiB of the host, which has \d+\.\d\d GiB free", line)
