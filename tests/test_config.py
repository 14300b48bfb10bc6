"""Configuration: what is read, what is refused and with which words, and that nothing in it is idle."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve_jax import config as config_lib
from sparse_serve_jax.config import (
  CacheConfig,
  EngineConfig,
  ModelConfig,
  RopeConfig,
  SchedulerConfig,
  SparseConfig,
  find_config,
  from_dict,
  load_config,
  override,
  parse_bytes,
  read_config,
  to_json,
)
from sparse_serve_jax.training.config import TrainConfig
from sparse_serve_jax.workloads import ArrivalConfig, WorkloadConfig, load_workload

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
  "serving": (EngineConfig, functools.partial(read_config, EngineConfig)),
  "models": (ModelConfig, functools.partial(read_config, ModelConfig)),
  "training": (TrainConfig, functools.partial(read_config, TrainConfig)),
  "workloads": (WorkloadConfig, load_workload),
}
LADDER = (
  "dense",
  "sparse",
  "sparse_offload",
  "flash_transfer",
  "working_set",
  "sparse_serve",
  "psa",
  "psa_host_loop",
)
STAGE = {"tokens": 8, "sequences": 1, "steps": 200}
SHAPE = dict(vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96, max_context=512)
RECIPE = {"model": SHAPE, "stages": [STAGE], "sources": {"text": 1.0}}


def write(folder: Path, name: str, data: object) -> Path:
  path = folder / f"{name}.json"
  path.write_text(data if isinstance(data, str) else json.dumps(data))
  return path


# What is shipped.


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.*")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_file_in_configs_loads(path: Path):
  assert path.suffix == ".json" and path.parent.name in KINDS
  kind = path.parent.name
  made, read = KINDS[kind]
  assert isinstance(read(path), made)
  assert find_config(kind, path.stem) == path


def test_ladder_changes_what_each_rung_is_named_for():
  def rung(name: str) -> dict[str, object]:
    loaded = load_config(name)
    return {
      "policy": loaded.sparse.policy,
      "offload": loaded.cache.offload,
      "load": loaded.cache.load,
      "save": loaded.cache.save,
      "prefill": loaded.scheduler.prefill,
      "batch_control": loaded.scheduler.batch_control,
      "stop": loaded.sparse.stop,
    }

  rungs = [rung(name) for name in LADDER]
  first = {"policy": "dense", "offload": False, "prefill": "chunked", "batch_control": "none"}
  assert rungs[0] == first | {"load": "fused", "save": "auto", "stop": "kernel"}
  changes = [{key: b[key] for key in b if a[key] != b[key]} for a, b in itertools.pairwise(rungs)]
  assert changes == [
    {"policy": "topk"},
    {"offload": True, "load": "per_block", "save": "per_block"},
    {"load": "gather", "save": "staged"},
    {"batch_control": "working_set"},
    {"prefill": "layer_segmented", "load": "fused", "save": "auto"},
    {"policy": "psa"},
    {"stop": "host_loop"},
  ]
  assert len({load_config(name).cache.hbm_bytes for name in LADDER}) == 1


def test_ladder_extends_rung_by_rung():
  bases = [json.loads((ROOT / f"configs/serving/{name}.json").read_text()).get("extends") for name in LADDER]
  assert bases == [None, *LADDER[:-1]]


def test_configs_are_found_in_an_installed_package(tmp_path: Path):
  shutil.copytree(
    ROOT / "sparse_serve_jax", tmp_path / "sparse_serve_jax", ignore=shutil.ignore_patterns("__pycache__")
  )
  shutil.copytree(ROOT / "configs", tmp_path / "sparse_serve_jax/configs")
  (tmp_path / "configs/serving").mkdir(parents=True)  # another package's, beside ours
  code = "from sparse_serve_jax import config; print(config.__file__, config.load_config('psa').sparse.policy)"
  out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
  assert out.split() == [str(tmp_path / "sparse_serve_jax/config/__init__.py"), "psa"]


def test_every_field_is_read():
  """Counts attribute reads by name, checks in `__post_init__` aside."""
  read = set()
  for path in [*ROOT.glob("sparse_serve_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
      node = waiting.pop()
      if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        continue
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
      waiting.extend(ast.iter_child_nodes(node))
  classes = [RopeConfig, ModelConfig, CacheConfig, SparseConfig, SchedulerConfig, EngineConfig]
  classes += [ArrivalConfig, WorkloadConfig]
  idle = [f"{cls.__name__}.{f.name}" for cls in classes for f in dataclasses.fields(cls) if f.name not in read]
  assert not idle


# Reading.


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("8GiB", 8 << 30),
    ("512MiB", 512 << 20),
    ("1.5GB", 1_500_000_000),
    ("4096B", 4096),
    ("3 KiB", 3072),
    ("7KB", 7000),
    ("2TiB", 2 << 40),
    ("0.3KiB", 307),
  ],
)
def test_parse_bytes(text: str, size: int):
  assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "GiB", "8Gb", "8 gib", "-1GiB", "1e3KB", "1,5GB", ""])
def test_parse_bytes_refuses(text: str):
  with pytest.raises(ValueError, match="GiB"):
    parse_bytes(text)


def test_read_config_merges_a_chain(tmp_path: Path):
  write(tmp_path, "a", {"cache": {"lanes": 3, "hbm_bytes": "1MiB"}, "tp": 2})
  write(tmp_path, "b", {"extends": "a", "cache": {"lanes": 4}, "sparse": {"policy": "psa"}})
  path = write(tmp_path, "c", {"extends": "b", "sparse": {"threshold": 1}})
  assert load_config(path) == EngineConfig(
    cache=CacheConfig(lanes=4, hbm_bytes=1 << 20), sparse=SparseConfig(policy="psa", threshold=1.0), tp=2
  )


@pytest.mark.parametrize(
  ("data", "words"),
  [
    ({"sparse": {"token_budgt": 4096}}, ["'token_budgt'", "section 'sparse'", "'token_budget'"]),
    ({"schedular": {}}, ["'schedular'", "'scheduler'"]),
    ({"sparse": 4096}, ["'sparse'", "expected an object", "4096"]),
    ([], ["expected an object"]),
    ({"sparse": {"token_budget": "many"}}, ["sparse.token_budget", "expected int", "'many'", "str"]),
    ({"sparse": {"token_budget": 2048.0}}, ["sparse.token_budget", "expected int", "2048.0", "float"]),
    ({"tp": True}, ["tp", "expected int", "True", "bool"]),
    ({"cache": {"offload": 1}}, ["cache.offload", "expected bool", "int"]),
    ({"cache": {"hbm_bytes": "8Gb"}}, ["cache.hbm_bytes", "'8Gb'", "GiB"]),
    ({"cache": {"hbm_bytes": None}}, ["cache.hbm_bytes", "expected int", "NoneType"]),
    ({"cache": {"lanes": "8GiB"}}, ["cache.lanes", "expected int"]),
    ({"sparse": {"policy": "pas"}}, ["sparse.policy", "dense, topk, psa", "'pas'"]),
    ('{"tp": 1, "tp": 2}', ["given twice", "tp"]),
    ('{"tp": 1,}', ["bad.json:1: not JSON: ", "column "]),
    ({"extends": "nowhere"}, ["extends", "'nowhere'", "bad"]),
    ({"extends": ["bad"]}, ["extends", "bad"]),
    ({"extends": "bad"}, ["circle", "bad -> bad"]),
  ],
)
def test_read_config_refuses(tmp_path: Path, data: object, words: list[str]):
  path = write(tmp_path, "bad", data)
  with pytest.raises(ValueError) as error:
    load_config(path)
  for word in ["bad.json", *words]:
    assert word in str(error.value)


def test_extends_names_the_file_at_fault(tmp_path: Path):
  write(tmp_path, "base", {"tpp": 2})
  with pytest.raises(ValueError, match=r"base\.json.*'tpp'.*'tp'"):
    load_config(write(tmp_path, "top", {"extends": "base"}))


def test_extends_in_a_long_circle(tmp_path: Path):
  write(tmp_path, "a", {"extends": "c"})
  write(tmp_path, "b", {"extends": "a"})
  with pytest.raises(ValueError, match="c -> b -> a -> c"):
    load_config(write(tmp_path, "c", {"extends": "b"}))


def test_a_file_elsewhere_extends_a_shipped_one(tmp_path: Path):
  """A file beside it of the same name comes first, and a file may extend the shipped one of its own name."""
  psa, dense = load_config("psa"), load_config("dense")
  mine = write(tmp_path, "mine", {"extends": "psa", "cache": {"lanes": 3}})
  assert load_config(mine) == dataclasses.replace(psa, cache=dataclasses.replace(psa.cache, lanes=3))
  own = write(tmp_path, "dense", {"extends": "dense", "cache": {"lanes": 5}})
  assert load_config(own) == dataclasses.replace(dense, cache=dataclasses.replace(dense.cache, lanes=5))
  write(tmp_path, "psa", {"tp": 2})
  assert load_config(mine) == EngineConfig(CacheConfig(lanes=3), tp=2)
  with pytest.raises(ValueError, match=r"'extends' names 'pso', which is none of: .*sparse_offload.*mine"):
    load_config(write(tmp_path, "bad", {"extends": "pso"}))
  (tmp_path / "models").mkdir()
  with pytest.raises(ValueError, match="'extends' names 'dense'"):  # a model extends models
    read_config(ModelConfig, write(tmp_path / "models", "shape", {"extends": "dense"}))


def test_a_dict_is_what_a_file_holds():
  psa = load_config("psa")
  assert load_config({}) == load_config(EngineConfig()) == EngineConfig()
  assert load_config({"cache": {"hbm_bytes": "1MiB"}, "tp": 2}) == EngineConfig(CacheConfig(hbm_bytes=1 << 20), tp=2)
  changed = load_config({"extends": "psa", "cache": {"lanes": 3}})
  assert changed == dataclasses.replace(psa, cache=dataclasses.replace(psa.cache, lanes=3))
  whole = load_config({"extends": "psa", "cache": CacheConfig(lanes=3)})
  assert whole == dataclasses.replace(psa, cache=CacheConfig(lanes=3))
  with pytest.raises(ValueError, match="unknown key 'tpp'.*'tp'"):
    load_config({"extends": "psa", "tpp": 2})
  with pytest.raises(ValueError, match="unknown key 1"):
    load_config({1: 2})


def test_unknown_name_lists_what_there_is():
  with pytest.raises(
    ValueError,
    match="'pso'.*dense, fifo, flash_transfer, hot_buffer, per_layer_pools, psa, psa_host_loop, psa_paper, sparse, "
    "sparse_offload, sparse_serve, working_set",
  ):
    load_config("pso")
  with pytest.raises(ValueError, match="elsewhere/psa.json is no file"):
    load_config("elsewhere/psa.json")


def test_from_dict_names_every_missing_key():
  with pytest.raises(ValueError, match="lacks vocab_size, d_ff"):
    from_dict(ModelConfig, {key: value for key, value in SHAPE.items() if key not in ("vocab_size", "d_ff")})


def test_from_dict_reads_sections_and_integers_for_floats():
  shape = from_dict(ModelConfig, SHAPE | {"rope": {"theta": 500000}})
  assert shape == ModelConfig(**SHAPE, rope=RopeConfig(theta=500000.0))
  assert type(shape.rope.theta) is float


@pytest.mark.parametrize(
  "config",
  [
    EngineConfig(),
    EngineConfig(CacheConfig(hbm_bytes=123, offload=False), SparseConfig("psa", threshold=0.3), tp=4),
    ModelConfig(**SHAPE, rope=RopeConfig(kind="yarn", original_context=64), tie_embeddings=True),
  ],
  ids=lambda c: type(c).__name__,
)
def test_to_json_round_trips(config: EngineConfig | ModelConfig):
  assert from_dict(type(config), json.loads(to_json(config))) == config


# Overriding.


def test_override_reads_text_by_the_field_s_type():
  changed = override(
    EngineConfig(),
    [
      "cache.hbm_bytes=1.5GB",
      "cache.dram_bytes=123456",
      "cache.offload=false",
      "sparse.policy=psa",
      "sparse.threshold=1",
      "sparse.method = 4",
      "tp=2",
    ],
  )
  assert changed == EngineConfig(
    CacheConfig(hbm_bytes=1_500_000_000, dram_bytes=123456, offload=False),
    SparseConfig(policy="psa", threshold=1.0, method="4"),
    tp=2,
  )


def test_override_applies_assignments_together():
  """Neither alone would hold sinks and window in its budget."""
  changed = override(EngineConfig(), ["sparse.sink_tokens=2048", "sparse.token_budget=4096"])
  assert changed.sink_blocks == 64 and changed.budget_blocks == 128


def test_override_takes_one_assignment_or_a_dict():
  expected = override(EngineConfig(), ["cache.hbm_bytes=1MiB", "sparse.sink_tokens=96", "tp=2"])
  nested = {"cache": {"hbm_bytes": "1MiB"}, "sparse": {"sink_tokens": 96}, "tp": 2}
  dotted = {"cache.hbm_bytes": 1 << 20, "sparse.sink_tokens": 96, "tp": 2}
  assert override(EngineConfig(), nested) == override(EngineConfig(), dotted) == expected
  assert override(EngineConfig(), "tp=2") == EngineConfig(tp=2)
  assert override(expected, {}) == override(expected, ()) == expected
  with pytest.raises(ValueError, match="unknown key 'cache.hbm'; the nearest is 'cache.hbm_bytes'"):
    override(EngineConfig(), {"cache": {"hbm": 1}})
  with pytest.raises(ValueError, match="tp: expected int, got '2'"):  # values are not text
    override(EngineConfig(), {"tp": "2"})


def test_override_takes_a_field_that_is_an_object_whole():
  config = WorkloadConfig("text", arrivals=ArrivalConfig("gamma", options={"cv": 2.0, "other": 1}))
  for changes in ({"arrivals.options": {"cv": 3.0}}, {"arrivals": {"options": {"cv": 3.0}}}):
    assert override(config, changes).arrivals.options == {"cv": 3.0}
  assert override(config, {"arrivals.options": {}}).arrivals == ArrivalConfig("gamma")
  assert from_dict(WorkloadConfig, json.loads(to_json(config))) == config


def test_override_of_a_model_leaves_the_original():
  shape = ModelConfig(**SHAPE)
  assert override(shape, ["rope.factor=2", "n_layers=3"]) == ModelConfig(
    **SHAPE | {"n_layers": 3}, rope=RopeConfig(factor=2.0)
  )
  assert shape == ModelConfig(**SHAPE)


@pytest.mark.parametrize(
  ("assignment", "words"),
  [
    ("sparse.token_budgt=1", ["'sparse.token_budgt'", "'sparse.token_budget'"]),
    ("token_budget=4096", ["'token_budget'", "'sparse.token_budget'"]),
    ("sparse=1", ["'sparse'"]),
    ("sparse.token_budget", ["key=value"]),
    ("sparse.token_budget=", ["expected int", "''"]),
    ("sparse.token_budget=1e3", ["expected int", "1000.0"]),
    ("cache.offload=False", ["expected bool", "'False'"]),
    ("cache.hbm_bytes=8gb", ["cache.hbm_bytes", "'8gb'"]),
    ("scheduler.prefill=chunk", ["layer_segmented, chunked", "'chunk'"]),
    ("sparse.threshold=NaN", ["nan", "(0, 1]"]),
    ("sparse.threshold=true", ["sparse.threshold", "expected float", "True (bool)"]),
    ("sparse.threshold=auto", ["'auto'", "(0, 1]", "auto:P"]),
    ("sparse.threshold=auto:", ["'auto:'", "auto:P"]),
    ("sparse.threshold=auto:1", ["'auto:1'", "[0.0001, 0.9999]"]),
    ("sparse.threshold=auto:1e-310", ["'auto:1e-310'", "[0.0001, 0.9999]"]),
    ("sparse.threshold=auto:-0.1", ["'auto:-0.1'", "[0.0001, 0.9999]"]),
    ("sparse.threshold=auto:0.99999", ["auto:0.99999", "[0.0001, 0.9999]"]),
    ("sparse.threshold=0,9", ["'0,9'", "(0, 1]"]),
    ("sparse.threshold=auto:0.95", ["'auto:0.95'", "policy='psa', not 'topk'"]),
    ("sparse.audit=0.01", ["audit=0.01", "policy='psa', not 'topk'"]),
  ],
)
def test_override_refuses(assignment: str, words: list[str]):
  with pytest.raises(ValueError) as error:
    override(EngineConfig(), [assignment])
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(("changes", "got"), [(3, "3"), (None, "None"), (["tp=1", 3], "3"), (b"tp=1", "116")])
def test_override_refuses_what_is_no_text(changes, got: str):
  with pytest.raises(ValueError, match=f'overrides are assignments such as "tp=2", .*; got {got}$'):
    override(EngineConfig(), changes)


# What the dataclasses themselves refuse.


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: ModelConfig(**SHAPE | {"n_heads": 6, "n_kv_heads": 4}), ["n_heads=6", "n_kv_heads=4"]),
    (lambda: ModelConfig(**SHAPE | {"head_dim": 15}), ["head_dim=15"]),
    (lambda: ModelConfig(**SHAPE | {"n_layers": 0}), ["n_layers=0"]),
    (lambda: ModelConfig(**SHAPE, norm_eps=float("inf")), ["norm_eps=inf"]),
    (lambda: RopeConfig(kind="llama3"), ["original_context"]),
    (lambda: RopeConfig(kind="llama3", original_context=8, low_freq_factor=4.0), ["4.0"]),
    (lambda: RopeConfig(kind="yarn", original_context=8, beta_fast=0.5), ["0.5"]),
    (lambda: RopeConfig(theta=0.0), ["theta=0.0"]),
    (lambda: CacheConfig(block_tokens=48), ["block_tokens=48", "32"]),
    (lambda: CacheConfig(hbm_bytes=0), ["hbm_bytes=0"]),
    (lambda: CacheConfig(lanes=-1), ["lanes=-1"]),
    (lambda: SparseConfig(threshold=0.0), ["threshold=0.0"]),
    (lambda: SparseConfig(threshold=1.01), ["threshold=1.01"]),
    (lambda: SparseConfig(policy="psa", audit=0.11), ["audit=0.11", "[0, 0.1]"]),
    (lambda: SparseConfig(policy="psa", audit=-0.01), ["audit=-0.01", "[0, 0.1]"]),
    (lambda: SparseConfig(policy="psa", threshold="auto:0.9").fixed_threshold, ["'auto:0.9'", "must be a number"]),
    (lambda: SparseConfig(prefill_share=0.0), ["prefill_share=0.0", "(0, 1]"]),
    (lambda: SparseConfig(prefill_share=1.5), ["prefill_share=1.5"]),
    (lambda: SparseConfig(sink_tokens=-1), ["sink_tokens=-1"]),
    (lambda: SparseConfig(group_blocks=0), ["group_blocks=0"]),
    (lambda: SparseConfig(group_blocks=3), ["group_blocks=3", "power of two"]),
    (lambda: override(EngineConfig(), "sparse.prefill=topk"), ["sparse.prefill", "dense, top_k, threshold", "'topk'"]),
    (lambda: SchedulerConfig(max_batch=-1), ["max_batch=-1"]),
    (lambda: SchedulerConfig(max_context=-1), ["max_context=-1"]),
    (lambda: SchedulerConfig(max_tokens=-1), ["max_tokens=-1"]),
    (lambda: SchedulerConfig(max_inject_tokens=-1), ["max_inject_tokens=-1"]),
    (lambda: EngineConfig(scheduler=SchedulerConfig(max_tokens=31)), ["max_tokens=31", "block of 32", "0 for no"]),
    (lambda: EngineConfig(tp=0), ["tp=0"]),
    (lambda: EngineConfig(SparseConfig()), ["section 'cache': expected an object"]),
    (lambda: EngineConfig(scheduler=SchedulerConfig(prefill="chunked", chunk_tokens=1000)), ["1000", "32"]),
  ],
)
def test_dataclasses_refuse(make, words: list[str]):
  with pytest.raises(ValueError) as error:
    make()
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "change",
  [
    *("cache.lanes=-1", "cache.lanes=x", "cache.hbm_bytes=0", "cache.block_tokens=5", "tp=0"),
    *("scheduler.max_batch=-1", "scheduler.max_tokens=31", "sparse.group_blocks=3", "sparse.sink_tokens=-1"),
    *("sparse.threshold=2", "sparse.threshold=auto:2", "sparse.audit=1", "sparse.audit=0.1"),
    *("sparse.prefill_share=2", "sparse.token_budget=31"),
  ],
)
def test_an_error_names_the_key_that_was_set(change):
  key = change.partition("=")[0]
  with pytest.raises(ValueError, match=rf"^{re.escape(key)}[=:]") as error:
    override(EngineConfig(), [change])
  assert "Config" not in str(error.value)


@pytest.mark.parametrize(
  ("kind", "given", "message"),
  [
    (EngineConfig, {"cach": {}}, "unknown key 'cach' in the configuration; the nearest is 'cache'"),
    (EngineConfig, {"cache": 5}, "section 'cache': expected an object, got 5 (int)"),
    (ModelConfig, {"vocab_size": 5}, "the configuration lacks d_model, n_layers, "),
    (WorkloadConfig, {"source": "text", "prompt_tokens": 1}, "prompt_tokens=1: a prompt whose middle"),
    (WorkloadConfig, {"source": "text", "shortest": 2}, "shortest=2.0 is not"),
    (WorkloadConfig, {"source": "text", "arrivals": {"seed": -1}}, "arrivals.seed=-1 must not"),
    (TrainConfig, RECIPE | {"sources": {}}, "sources are shares of at least 0, and one is more, got {'text': 0.0"),
    (TrainConfig, RECIPE | {"optimizer": {"learning_rate": 0}}, "optimizer: learning_rate is more than 0, "),
    (TrainConfig, RECIPE | {"stages": [STAGE | {"steps": 0}]}, "stages: tokens, sequences and steps are at least 1, "),
  ],
)
def test_an_error_names_no_class(kind, given, message):
  with pytest.raises(ValueError) as error:
    from_dict(kind, given)
  assert str(error.value).startswith(message)
  assert not re.search(r"Config|Stage|Sources|Optimizer", str(error.value))


def test_blocks_round_up_for_sinks_and_down_for_the_budget():
  config = EngineConfig(
    CacheConfig(block_tokens=16), SparseConfig(token_budget=95, sink_tokens=17, window_tokens=48, policy="topk")
  )
  assert (config.budget_blocks, config.sink_blocks, config.window_blocks) == (5, 2, 3)


def test_budget_holds_sinks_and_window():
  blocks_of_32 = CacheConfig(block_tokens=32)
  sparse = SparseConfig(token_budget=159, sink_tokens=64, window_tokens=65)  # 4 blocks for 2 + 3
  with pytest.raises(ValueError, match=r"token_budget=159 is 4 blocks.*2 blocks.*3 blocks.*need 5.*at least 160"):
    EngineConfig(blocks_of_32, sparse)
  EngineConfig(blocks_of_32, dataclasses.replace(sparse, token_budget=160))
  EngineConfig(blocks_of_32, dataclasses.replace(sparse, policy="psa"))  # has no budget
  with pytest.raises(ValueError, match="token_budget=31 is 0 blocks"):
    EngineConfig(blocks_of_32, SparseConfig(token_budget=31, sink_tokens=0, window_tokens=0))


def test_a_threshold_moves_or_stays():
  psa = load_config("psa")
  moving = override(psa, ["sparse.threshold=auto:0.9"])
  assert (psa.sparse.promise, psa.sparse.fixed_threshold, psa.sparse.moves) == (0.95, 0.95, False)
  assert (moving.sparse.promise, moving.sparse.moves) == (0.9, True)
  shares = [override(of, [f"sparse.audit={x}"]).sparse.audit_share for of in (psa, moving) for x in (0, 0.02)]
  assert shares == [0.0, 0.02, 0.01, 0.02]
  assert from_dict(EngineConfig, json.loads(to_json(moving))) == moving
  assert override(moving, ["sparse.threshold=1"]).sparse.threshold == 1.0


def test_block_sizes_are_powers_of_two():
  assert all(size & (size - 1) == 0 for size in config_lib.BLOCK_SIZES)
  assert CacheConfig().block_tokens in config_lib.BLOCK_SIZES


def test_rungs_of_zones_change_zones_alone():
  for name, base, zones in (("hot_buffer", "sparse_serve", "lane"), ("per_layer_pools", "psa", "layer")):
    expected = load_config(base)
    assert expected.cache.zones == "shared"
    assert load_config(name) == dataclasses.replace(expected, cache=dataclasses.replace(expected.cache, zones=zones))
