"""Checkpoints: what is read, what is refused and how it is said, and that what is written comes back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparse_serve_jax import models
from sparse_serve_jax.config import ModelConfig, RopeConfig, find_config, read_config
from sparse_serve_jax.models import hf, hf_config, llama
from sparse_serve_jax.models.tokenizer import ByteTokenizer

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))
SHAPES = sorted(path.stem for path in find_config("models", "tiny").parent.glob("*.json"))


@pytest.fixture
def checkpoint(tmp_path):
  """Copies a golden directory, with changes to config.json and a function over its tensors."""

  def make(name: str, tensors=None, **changes) -> pathlib.Path:
    directory = pathlib.Path(shutil.copytree(GOLDENS / name, tmp_path / name))
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(raw))
    if tensors:
      file = directory / "model.safetensors"
      safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(file)), file)
    return directory

  return make


def raw_config(name: str, **changes) -> dict:
  return json.loads((GOLDENS / name / "config.json").read_text()) | changes


def same_params(a: llama.Params, b: llama.Params) -> bool:
  equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
  return jax.tree.all(equal)


# Configurations


def test_config_fields_are_read():
  cfg = hf_config.config_from_hf(raw_config("mistral", rms_norm_eps=0.25, rope_theta=5e5))
  assert cfg == ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=1,
    head_dim=16,
    d_ff=40,
    max_context=64,
    norm_eps=0.25,
    rope=RopeConfig(theta=5e5),
    dtype="bfloat16",
  )
  assert hf_config.config_from_hf(raw_config("llama3")).tie_embeddings
  assert (
    hf_config.config_from_hf(raw_config("qwen2")).qkv_bias and hf_config.config_from_hf(raw_config("qwen3")).qk_norm
  )
  assert hf_config.config_from_hf(raw_config("llama2")).dtype == "float32"
  assert hf_config.config_from_hf(raw_config("llama2", torch_dtype="float16")).dtype == "bfloat16"


def test_absent_fields_have_the_architecture_s_defaults():
  raw = raw_config("llama2")
  del raw["head_dim"], raw["num_key_value_heads"], raw["rope_theta"], raw["torch_dtype"]
  cfg = hf_config.config_from_hf(raw)
  assert (cfg.head_dim, cfg.n_kv_heads, cfg.rope.theta, cfg.dtype) == (8, 4, 10000.0, "float32")
  raw = raw_config("qwen3")
  del raw["head_dim"]
  assert hf_config.config_from_hf(raw).head_dim == 128


SCALINGS = {
  "linear": {"factor": 4.0},
  "llama3": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16},
  "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "truncate": False},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_old_and_new_rope_entries_agree(kind):
  raw = raw_config("llama2", rope_theta=2e4)
  old, older = ({**SCALINGS[kind], key: kind} for key in ("rope_type", "type"))
  new = raw_config("llama2", rope_theta=None, rope_scaling=None, rope_parameters=old | {"rope_theta": 2e4})
  cfg = hf_config.config_from_hf(raw | {"rope_scaling": old})
  assert cfg.rope.kind == kind and cfg.rope.theta == 2e4 and cfg.rope.factor == SCALINGS[kind]["factor"]
  assert hf_config.config_from_hf(raw | {"rope_scaling": older}) == cfg
  assert hf_config.config_from_hf(new) == cfg


def test_context_is_counted_after_scaling():
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
  linear = {"rope_type": "linear", "factor": 2.5}
  for scaling, positions, context in ((None, 64, 64), (linear, 64, 160), (yarn, 32, 128), (yarn, 128, 128)):
    raw = raw_config("llama2", rope_scaling=scaling, max_position_embeddings=positions)
    assert hf_config.config_from_hf(raw).max_context == context


def test_yarn_amplitude():
  def amplitude(**changes):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | changes
    return llama.rope_amplitude(hf_config.config_from_hf(raw_config("llama2", rope_scaling=scaling)).rope)

  assert amplitude() == pytest.approx(0.1 * math.log(4) + 1)
  assert amplitude(attention_factor=0.7) == 0.7
  assert amplitude(mscale=0.5, mscale_all_dim=0.25) == pytest.approx(1.0693147 / 1.0346574)
  assert amplitude(mscale=0.5) == pytest.approx(0.1 * math.log(4) + 1)
  assert amplitude(factor=1.0) == 1.0


REFUSALS = [
  ("mistral", {"sliding_window": 4096}, "a sliding window of 4096 tokens"),
  (
    "qwen2",
    {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1, "layer_types": None},
    "a sliding window of 128 tokens",
  ),
  ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer types sliding_attention"),
  ("llama2", {"num_local_experts": 8}, r"a mixture of experts \(num_local_experts=8\)"),
  ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, r"architecture 'Qwen3MoeForCausalLM' \(known: LlamaFor"),
  ("llama2", {"architectures": None, "model_type": None}, "no architectures"),
  ("llama2", {"model_type": "gemma"}, r"model_type 'gemma' \(known: llama, mistral"),
  (
    "llama2",
    {"rope_parameters": {"full_attention": {"rope_theta": 5e6}}, "rope_scaling": None},
    "by layer type .full_a",
  ),
  ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
  ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
  ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
  ("llama2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
  ("llama2", {"attention_bias": True}, "attention_bias"),
  ("llama2", {"mlp_bias": True}, "mlp_bias"),
  ("llama2", {"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
  ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS, ids=[r[2][:24] for r in REFUSALS])
def test_what_is_not_computed_is_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    hf_config.config_from_hf(raw_config(name, **changes))


def test_all_refusals_are_named_at_once():
  with pytest.raises(ValueError, match="sliding window.*hidden_act 'gelu'.*mlp_bias"):
    hf_config.config_from_hf(raw_config("mistral", sliding_window=8, hidden_act="gelu", mlp_bias=True))


def test_a_window_that_is_off_is_no_window():
  hf_config.config_from_hf(raw_config("qwen2", use_sliding_window=False, sliding_window=4096))
  raw = raw_config("qwen2", sliding_window=4096)
  del raw["use_sliding_window"]
  hf_config.config_from_hf(raw)
  raw = raw_config("mistral")
  del raw["sliding_window"]  # absent means 4096 there
  with pytest.raises(ValueError, match="a sliding window of 4096"):
    hf_config.config_from_hf(raw)


def test_a_lacking_key_is_named():
  raw = raw_config("llama2")
  del raw["intermediate_size"]
  with pytest.raises(ValueError, match=r"config.json lacks 'intermediate_size'"):
    hf_config.config_from_hf(raw)
  with pytest.raises(ValueError, match=r"config.json, rope_scaling lacks 'factor'"):
    hf_config.config_from_hf(raw_config("llama2", rope_scaling={"rope_type": "linear"}))


# Tensors


def test_all_mismatches_are_listed_at_once(checkpoint):
  def break_it(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["lm_head.weight"] = np.zeros((97, 32), np.float32)
    return tensors

  with pytest.raises(ValueError) as error:
    models.load_model(checkpoint("llama2", break_it))
  lines = sorted(line.strip().rstrip(";") for line in str(error.value).splitlines()[1:])
  assert "in 5 tensors" in str(error.value)
  assert lines == [
    "missing: model.layers.1.self_attn.k_proj.weight (32, 32)",
    "missing: model.norm.weight (32,)",
    "shape: lm_head.weight is (97, 32), the configuration says (96, 32)",
    "unknown: model.layers.0.self_attn.q_proj.bias (32,)",
    "unknown: model.layers.2.mlp.up_proj.weight (40, 32)",
  ]


def test_ignorable_tensors(checkpoint):
  def add(tensors):
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    return tensors | head | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}

  params = models.load_model(checkpoint("llama3", add)).params
  assert same_params(params, models.load_model(GOLDENS / "llama3").params)
  with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
    models.load_model(checkpoint("qwen2", tie_word_embeddings=False))


def test_float16_and_casts(checkpoint):
  def halve(tensors):
    return {name: tensor.astype(np.float16) for name, tensor in tensors.items()}

  whole = models.load_model(GOLDENS / "llama2").params
  half = models.load_model(checkpoint("llama2", halve), dtype="float32").params
  brief = models.load_model(GOLDENS / "llama2", dtype="bfloat16").params
  assert same_params(half, jax.tree.map(lambda a: np.asarray(a).astype(np.float16).astype(np.float32), whole))
  assert same_params(brief, jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), whole))
  with pytest.raises(ValueError, match="expected one of float32, bfloat16, got 'float16'"):
    models.load_model(GOLDENS / "llama2", dtype="float16")


def test_tensors_that_are_no_floats_are_refused(checkpoint):
  """Their numbers mean nothing without the scales that go with them."""

  def quantize(tensors):
    wrong = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    return tensors | {name: np.ones_like(tensors[name], np.int8) for name in wrong}

  with pytest.raises(ValueError) as error:
    models.load_model(checkpoint("llama2", quantize))
  for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
    assert f"type: {name} is I8, not one of F64, F32, F16, BF16" in str(error.value)


def test_strips_of_a_tensor_make_the_whole(monkeypatch):
  whole = {name: jax.tree.map(np.asarray, models.load_model(GOLDENS / name).params) for name in ("qwen2", "llama3")}
  monkeypatch.setattr(hf, "_STRIP_BYTES", 700)
  for name, params in whole.items():
    assert same_params(models.load_model(GOLDENS / name).params, params)


def test_lacking_files_are_named(checkpoint, tmp_path):
  directory = checkpoint("mistral")
  (directory / "model-00002-of-00004.safetensors").unlink()
  with pytest.raises(ValueError, match=r"lacks model-00002-of-00004.safetensors"):
    models.load_model(directory)
  (directory / "model.safetensors.index.json").unlink()
  with pytest.raises(ValueError, match=r"lacks model.safetensors"):
    models.load_model(directory)
  with pytest.raises(ValueError, match=r"no config.json"):
    models.load_model(tmp_path / "nothing")
  with pytest.raises(ValueError, match="llama3-8b.*tiny-qwen3"):
    models.load_model("random:huge")


@pytest.mark.parametrize(
  ("entry", "eos"), [({"eos_token_id": [7, 9]}, (7, 9, 2)), ({"eos_token_id": 5}, (5, 2)), ({}, (2,)), (None, (2,))]
)
def test_every_eos(checkpoint, entry, eos):
  directory = checkpoint("llama2")  # its config.json says 2
  if entry is None:
    (directory / "generation_config.json").unlink()
  else:
    (directory / "generation_config.json").write_text(json.dumps(entry))
  assert models.load_model(directory).eos_token_ids == eos


# Writing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_checkpoint_comes_back(name, tmp_path):
  model = models.load_model(GOLDENS / name)
  models.save_hf(model, tmp_path / "saved", shard_bytes=8192)
  shards = sorted((tmp_path / "saved").glob("*.safetensors"))
  assert all(file.stat().st_mode & 0o444 == 0o444 for file in shards)
  assert len(shards) > 3 and re.fullmatch(r"model-00001-of-\d{5}.safetensors", shards[0].name)
  tensors = {}
  for shard in shards:
    part = safetensors.numpy.load_file(shard)
    assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 8192
    tensors |= part
  for file in (GOLDENS / name).glob("*.safetensors"):
    for key, tensor in safetensors.numpy.load_file(file).items():
      np.testing.assert_array_equal(tensors.pop(key), tensor)
  assert not tensors
  again = models.load_model(tmp_path / "saved")
  assert same_params(again.params, model.params)
  amplitude = llama.rope_amplitude(model.config.rope)
  rope = dataclasses.replace(model.config.rope, attention_factor=amplitude * (model.config.rope.kind == "yarn"))
  assert again.config == dataclasses.replace(model.config, rope=rope)
  assert again.eos_token_ids == model.eos_token_ids == (2,)


def test_save_hf_refuses_what_no_architecture_has(tmp_path):
  cfg = dataclasses.replace(models.load_model("random:tiny").config, qkv_bias=True, qk_norm=True)
  model = models.Model(cfg, models.init_params(cfg, 0), ByteTokenizer(), (257,), "x")
  with pytest.raises(ValueError, match="no Hugging Face architecture"):
    models.save_hf(model, tmp_path / "x")


def test_orbax_restores_the_model(tmp_path):
  shutil.copytree(GOLDENS / "qwen3_yarn", tmp_path / "hf")
  for file in (GOLDENS / "tokenizer").iterdir():
    shutil.copy(file, tmp_path / "hf")
  for source, text in (("random:tiny", [256, 104, 105]), (tmp_path / "hf", [0])):
    model = models.load_model(source)
    path = tmp_path / f"saved-{model.name.replace(':', '-')}"
    models.save_model(model, path)
    again = models.load_model(path)
    assert same_params(again.params, model.params) and again.config == model.config
    assert (again.name, again.eos_token_ids) == (model.name, model.eos_token_ids)
    assert again.tokenizer.encode("hi")[: len(text)] == text == model.tokenizer.encode("hi")[: len(text)]
    brief = models.load_model(path, dtype="bfloat16")
    assert brief.config.dtype == "bfloat16" and brief.params["embed"].dtype == ml_dtypes.bfloat16
  with pytest.raises(ValueError, match="exists and is not empty"):
    models.save_model(model, path)
  card = json.loads((path / "model.json").read_text())
  card["config"] |= {"d_ff": 44, "qk_norm": False, "qkv_bias": True, "tie_embeddings": False}
  (path / "model.json").write_text(json.dumps(card))
  with pytest.raises(ValueError, match="does not fit its configuration in 6 arrays") as error:
    models.load_model(path)
  for line in ("missing: lm_head ", "missing: layers.bqkv ", "unknown: layers.q_norm ", "shape: layers.w_down is "):
    assert line in str(error.value)


def largest(directory: pathlib.Path) -> pathlib.Path:
  return max(directory.rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


# What may be damaged, and what is told then of the folder of parameters. Half of a file is left, or nothing.
DAMAGED = {
  "_METADATA": (lambda params: params / "_METADATA", "/_METADATA:1: not JSON", " is no whole checkpoint: it has no _M"),
  "manifest": (lambda params: params / "manifest.ocdbt", " cannot be read, .*manifest", " is no whole .* no manifest"),
  "index": (lambda params: next((params / "d").iterdir()), " cannot be read, the check", " cannot be read, the check"),
  "values": (largest, r": [\w.]+ cannot be read, the checkpoint is", r": [\w.]+ cannot be read, the checkpoint is"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_orbax_s_damaged_directories_are_one_line(tmp_path, what, capfd):
  models.save_model(models.load_model("random:tiny"), tmp_path)
  find, *told = DAMAGED[what]
  file = find(params := tmp_path / "params")
  for damage, message in zip((lambda: os.truncate(file, file.stat().st_size // 2), file.unlink), told, strict=True):
    damage()
    with pytest.raises(ValueError, match=f"^{params}{message}") as error:
      jax.tree.map(np.asarray, models.load_model(tmp_path).params)
    assert "\n" not in str(error.value)
  assert capfd.readouterr().err == ""  # threads of orbax's have nothing to tell


# Shapes

# As published.
PARAMETERS = {
  "llama3-8b": 8.03e9,
  "llama3-8b-1048k": 8.03e9,
  "llama-3.1-70b": 70.55e9,
  "lwm-7b": 6.74e9,
  "llama-3.2-1b": 1.236e9,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_what_they_say(name):
  cfg = read_config(ModelConfig, find_config("models", name))
  count = sum(jax.tree.leaves(llama.map_shapes(lambda _, shape: math.prod(shape), cfg)))
  if name.startswith("tiny"):
    assert count < 500_000 and cfg.vocab_size >= ByteTokenizer.vocab_size and cfg.dtype == "float32"
  else:
    assert count == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_random_models_have_the_byte_tokenizer():
  model = models.load_model("random:tiny", dtype="bfloat16", seed=3)
  assert isinstance(model.tokenizer, ByteTokenizer) and model.eos_token_ids == (257,)
  assert model.name == "random:tiny" and model.params["embed"].dtype == ml_dtypes.bfloat16
  assert not np.array_equal(model.params["embed"], models.load_model("random:tiny", dtype="bfloat16").params["embed"])


def test_random_weights_of_bfloat16_are_those_of_float32_rounded():
  cfg = read_config(ModelConfig, find_config("models", "tiny"))
  wide, narrow = (models.init_params(dataclasses.replace(cfg, dtype=of), 3) for of in ("float32", "bfloat16"))
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16).view(np.uint16), b.view(np.uint16))
