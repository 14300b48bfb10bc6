"""What stands in the environment when JAX starts, seen from fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAG = "--xla_gpu_enable_triton_gemm"
LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def run(code: str, **environment: str) -> dict:
  """Runs `code` in a new process without our variables and returns the JSON it prints."""
  ours = ("XLA_FLAGS", LIMIT, *(environment.pop("without", "").split()))
  clean = {key: value for key, value in os.environ.items() if key not in ours}
  command = [sys.executable, "-c", f"import json, os, sys\n{code}"]
  environment = clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def configured(call: str = "runtime.configure()", **environment: str) -> dict:
  return run(f"from sparse_serve_jax import runtime; {call}; print(json.dumps(dict(os.environ)))", **environment)


def test_jax_on_a_cpu_accepts_what_is_set():
  """XLA ends the process at a flag it does not know."""
  code = """
from sparse_serve_jax import runtime
runtime.configure()
import jax
print(json.dumps({"sum": float(jax.numpy.ones(3).sum()), "flags": os.environ["XLA_FLAGS"]}))
"""
  assert run(code) == {"sum": 3.0, "flags": f"{FLAG}=false"}


def test_adds_to_the_user_s_flags_once():
  twice = configured("runtime.configure(); runtime.configure()", XLA_FLAGS="--xla_dump_to=/nowhere")
  assert twice["XLA_FLAGS"].split() == ["--xla_dump_to=/nowhere", f"{FLAG}=false"]


@pytest.mark.parametrize("flags", [f"{FLAG}=true", f"{FLAG}", f"--xla_dump_to=/a {FLAG}=true"])
def test_the_user_s_flag_stays(flags: str):
  assert configured(XLA_FLAGS=flags)["XLA_FLAGS"] == flags


def test_a_file_of_flags_stays():
  assert configured(XLA_FLAGS="/etc/xla_flags")["XLA_FLAGS"] == "/etc/xla_flags"


def test_pinned_limit():
  gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  assert gib <= int(configured()[LIMIT]) < gib + 1
  assert configured(**{LIMIT: "7"})[LIMIT] == "7"


def test_importing_the_package_is_light():
  code = """
import sparse_serve_jax
heavy = [name for name in ("jax", "numpy", "flax") if name in sys.modules]
print(json.dumps({"heavy": heavy, "version": sparse_serve_jax.__version__, "flags": os.environ.get("XLA_FLAGS")}))
"""
  assert run(code) == {"heavy": [], "version": "0.1.0", "flags": None}


def test_public_names_load_and_configure_first():
  code = """
import sparse_serve_jax
names = {name: getattr(sparse_serve_jax, name).__name__ for name in sparse_serve_jax.__all__}
print(json.dumps({"names": names, "flags": os.environ["XLA_FLAGS"]}))
"""
  found = run(code)
  assert all(name == value for name, value in found["names"].items()) and "LLM" in found["names"]
  assert found["flags"] == f"{FLAG}=false"


@pytest.mark.parametrize("module", ["llm", "serving.executor"])
def test_modules_that_run_a_model_configure_too(module: str):
  code = f"import sparse_serve_jax.{module}; print(json.dumps(os.environ['XLA_FLAGS']))"
  assert run(code) == f"{FLAG}=false"


def test_unknown_public_name():
  import sparse_serve_jax

  with pytest.raises(AttributeError, match="'LMM'"):
    _ = sparse_serve_jax.LMM


CACHE = "JAX_COMPILATION_CACHE_DIR"
KEPT = """
if {early}: import jax
from sparse_serve_jax import runtime
runtime.configure()
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
f = jax.jit(lambda x: sum(x @ x * i for i in range(60)))
f(jax.numpy.ones((8, 8))).block_until_ready()
n = sum(hit == "/jax/compilation_cache/cache_hits" for hit in hits)
print(json.dumps({{"hits": n, "folder": jax.config.jax_compilation_cache_dir}}))
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path):
  """Whether JAX was imported before, as in the second, or not, as in the first."""
  settings = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  first, second = (run(KEPT.format(early=early), without=CACHE, **settings) for early in (False, True))
  assert first["folder"] == second["folder"] and Path(first["folder"]).parent == tmp_path / "sparse_serve_jax"
  assert first["hits"] == 0 < second["hits"]


def test_the_user_s_folder_of_programs_stays():
  assert configured(**{CACHE: "/mine"})[CACHE] == "/mine"
  assert configured(**{CACHE: ""})[CACHE] == ""


def test_where_nothing_can_be_written_no_program_is_kept(tmp_path: Path):
  (tmp_path / "file").write_text("")
  found = run(KEPT.format(early=False), without=CACHE, XDG_CACHE_HOME=str(tmp_path / "file"))
  assert found == {"hits": 0, "folder": None}
