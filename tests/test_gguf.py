"""GGUF files: made here from goldens, and a real one whose path SPARSE_SERVE_GGUF holds."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from sparse_serve_jax import LLM, models
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.gguf_tokenizer import read_tokenizer
from sparse_serve_jax.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"llama2": "llama", "llama3": "llama", "llama_linear": "llama", "llama_yarn": "llama"}
ARCHITECTURES |= {"mistral": "llama", "qwen2": "qwen2", "qwen2_yarn": "qwen2", "qwen3": "qwen3"}


def by_pairs(tensor: np.ndarray, heads: int) -> np.ndarray:
  """As llama.cpp's converter writes queries and keys of its architecture llama."""
  return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write(path: pathlib.Path, name: str, fields=None, quantized=(), drop=(), extra=None) -> pathlib.Path:
  """A golden checkpoint as GGUF in float32, but for the tensors named in `quantized`, with a tokenizer."""
  cfg, arch = models.load_model(GOLDENS / name).config, ARCHITECTURES[name]
  writer = gguf.GGUFWriter(path, arch)
  shape = {
    "context_length": 64,
    "embedding_length": cfg.d_model,
    "block_count": cfg.n_layers,
    "feed_forward_length": cfg.d_ff,
    "attention.head_count": cfg.n_heads,
    "attention.head_count_kv": cfg.n_kv_heads,
    "attention.key_length": cfg.head_dim,
    "attention.value_length": cfg.head_dim,
    "rope.dimension_count": cfg.head_dim,
    "rope.freq_base": cfg.rope.theta,
    "attention.layer_norm_rms_epsilon": cfg.norm_eps,
  }
  if cfg.rope.kind in ("linear", "yarn"):
    shape |= {"rope.scaling.type": cfg.rope.kind, "rope.scaling.factor": cfg.rope.factor}
  if cfg.rope.kind == "linear":
    shape["context_length"] = 16
  if cfg.rope.kind == "yarn":
    shape |= {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": llama.rope_amplitude(cfg.rope)}
    shape |= {"rope.scaling.yarn_beta_fast": cfg.rope.beta_fast, "rope.scaling.yarn_beta_slow": cfg.rope.beta_slow}
  values = {f"{arch}.{key}": value for key, value in shape.items()} | byte_level() | (fields or {})
  for key, value in values.items():
    add(writer, key, value)
  for file in (GOLDENS / name).glob("*.safetensors"):
    for key, tensor in safetensors.numpy.load_file(file).items():
      stem, _, kind = key.rpartition(".")
      inner = stem.split(".", 3)
      ours = f"blk.{inner[2]}.{NAMES[inner[3]]}.{kind}" if stem.startswith("model.layers.") else f"{NAMES[stem]}.{kind}"
      tensor = tensor.astype(np.float32)
      if arch == "llama" and (".q_proj." in key or ".k_proj." in key):
        tensor = by_pairs(tensor, cfg.n_heads if ".q_proj." in key else cfg.n_kv_heads)
      if ours in quantized:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(ours, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
      elif ours not in drop:
        writer.add_tensor(ours, tensor)
  for key, tensor in (extra or {}).items():
    writer.add_tensor(key, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add(writer, key: str, value) -> None:
  if value is None:
    return
  kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
  kinds.get(type(value), writer.add_array)(key, value)


def byte_level() -> dict:
  """The golden tokenizer's fields."""
  raw = json.loads((GOLDENS / "tokenizer" / "tokenizer.json").read_text())
  vocabulary = raw["model"]["vocab"]
  tokens = sorted(vocabulary, key=vocabulary.__getitem__)
  special = {token["content"] for token in raw["added_tokens"]}
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
    "tokenizer.ggml.merges": [" ".join(merge) for merge in raw["model"]["merges"]],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": (GOLDENS / "tokenizer" / "chat_template.jinja").read_text(),
  }


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "llama3"])
def test_weights_and_shape_are_those_of_the_checkpoint(name, tmp_path):
  model, wanted = models.load_model(write(tmp_path / "a.gguf", name)), models.load_model(GOLDENS / name, "float32")
  for field in dataclasses.fields(wanted.config):
    ours, theirs = getattr(model.config, field.name), getattr(wanted.config, field.name)
    if field.name == "rope":
      assert ours.kind == theirs.kind and llama.rope_amplitude(ours) == pytest.approx(llama.rope_amplitude(theirs))
      np.testing.assert_allclose(llama.rope_frequencies(model.config), llama.rope_frequencies(wanted.config), rtol=1e-6)
    elif field.name == "norm_eps":
      assert ours == pytest.approx(theirs)
    else:
      assert ours == theirs, field.name
  assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), model.params, wanted.params))
  assert models.load_model(tmp_path / "a.gguf", "bfloat16").config.dtype == "bfloat16"


def test_quantized_tensors_are_dequantized(tmp_path):
  names = ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "token_embd.weight")
  model, wanted = (
    models.load_model(write(tmp_path / "a.gguf", "llama2", quantized=names), "float32"),
    models.load_model(GOLDENS / "llama2"),
  )
  assert models.load_model(tmp_path / "a.gguf").config.dtype == "bfloat16"
  for leaf in ("embed", "layers"):
    ours, theirs = (jax.tree.map(np.asarray, m.params[leaf]) for m in (model, wanted))
    error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours, theirs)
    error = {"embed": error} if leaf == "embed" else error
    for key, worst in error.items():
      assert (0 < worst < 0.03) if key in ("embed", "wqkv") else worst == 0, key


def test_rope_factors_of_llama_3(tmp_path):
  cfg = dataclasses.replace(models.load_model(GOLDENS / "llama3").config, head_dim=16)
  rope = dataclasses.replace(cfg.rope, factor=32.0, original_context=8192)
  plain = llama.rope_frequencies(dataclasses.replace(cfg, rope=type(rope)(theta=rope.theta)))
  factors = plain / llama.rope_frequencies(dataclasses.replace(cfg, rope=rope))
  file = write(tmp_path / "a.gguf", "llama3", extra={"rope_freqs.weight": factors.astype(np.float32)})
  assert models.load_model(file).config.rope == rope
  file = write(tmp_path / "b.gguf", "llama3", extra={"rope_freqs.weight": np.full_like(factors, 3, np.float32)})
  with pytest.raises(ValueError, match="rope_freqs.weight is none of the rope scalings"):
    models.load_model(file)


def test_a_byte_level_tokenizer_and_its_template(tmp_path):
  model, wanted = models.load_model(write(tmp_path / "a.gguf", "llama2")), load_tokenizer(GOLDENS / "tokenizer")
  for text in ("the cat sat", "Überraschung: 猫 \x00\n\t x", "", "<s>the</s> mat", "1234 it's"):
    ids = wanted.encode(text)
    assert model.tokenizer.encode(text) == ids and model.tokenizer.decode(ids) == wanted.decode(ids)
  chat = [{"role": "user", "content": "the cat</s>"}]
  assert model.tokenizer.apply_chat_template(chat) == wanted.apply_chat_template(chat)
  assert model.tokenizer.encode_chat(chat) == wanted.encode_chat(chat)
  assert model.eos_token_ids == (1,) and model.name == "a"
  assert model.eos_sources[1].startswith("tokenizer.ggml.eos_token_id, eos_token of a.gguf, the end of a turn")


def test_a_sentencepiece_tokenizer():
  pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
  scored = ["▁the", "▁c", "at", "▁cat", "th", "▁t", "▁th", *"▁theca"]
  pieces += [(token, -float(i), 1) for i, token in enumerate(scored)]
  fields = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [token for token, _, _ in pieces],
    "tokenizer.ggml.scores": [score for _, score, _ in pieces],
    "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
  }

  def read(**more):
    values = {key: (lambda value=value: value) for key, value in (fields | more).items()}
    return read_tokenizer(pathlib.Path("x.gguf"), values).tokenizer

  ids = {token: i for i, (token, _, _) in enumerate(pieces)}
  tokenizer = read()
  assert tokenizer.encode("the cat") == [1, ids["▁the"], ids["▁cat"]]
  assert tokenizer.encode("é", False) == [ids["▁"], ids["<0xC3>"], ids["<0xA9>"]]
  assert tokenizer.encode("the</s>", False) == [ids["▁the"], 2]
  assert 2 not in tokenizer.encode("the</s>", False, "text")
  for text in ("the cat", "é the  猫", ""):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  chatting = read(**{"tokenizer.chat_template": "{% for m in messages %}<s>the {{ m.content }}</s>{% endfor %}"})
  for content in ("the cat", "cat</s> the", "</s>cat", "\n</s>\n cat"):
    made = chatting.encode_chat([{"role": "user", "content": content}])
    whole = chatting.encode(f"<s>the {content}</s>", add_special_tokens=False)
    assert (made == whole) == ("</s>" not in content) and [i for i in made if i in (1, 2)] == [1, 2]
    assert chatting.decode(made, skip_special_tokens=False) == chatting.decode(whole, skip_special_tokens=False)
  bare = read(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
  assert bare.encode("the cat") == [ids["th"], ids["e"], ids["▁cat"]] and bare.decode(bare.encode("the")) == "the"


REFUSED = [
  ({"general.architecture": "gemma3"}, "architecture 'gemma3' is not supported .known: llama, mistral, qwen2, qwen3"),
  ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
  ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count 4 is not supported .head_dim is 8"),
  ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type 'longrope'"),
  ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5' of 278 tokens .known: gpt2, llama"),
  ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre 'default' is not supported .known: llama3, "),
  ({"tokenizer.ggml.eos_token_id": 999}, "{'eos_token': 999} is not within the 278 tokens"),
  ({"llama.block_count": 3}, "num_hidden_layers is 3, the tensors have 2"),
  ({"split.count": 2}, "is one of 2 files"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_what_is_not_supported_is_refused_by_name(fields, message, tmp_path):
  with pytest.raises(ValueError, match=f"a.gguf.*{message}"):
    models.load_model(write(tmp_path / "a.gguf", "llama2", fields))


def test_a_quantization_that_is_not_known(tmp_path, monkeypatch):
  file = write(tmp_path / "a.gguf", "llama2", quantized=("token_embd.weight",))
  monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
  with pytest.raises(ValueError, match="quantization Q8_0 is not supported"):
    models.load_model(file)


def test_what_is_no_gguf(tmp_path):
  (tmp_path / "a.gguf").write_bytes(b"nothing of the kind" * 9)
  with pytest.raises(ValueError, match="a.gguf, 171 bytes, is no GGUF file or not all of one: "):
    models.load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize("quantized", [(), ("token_embd.weight",)])
def test_a_file_that_is_cut_off_is_told_with_its_bytes(quantized, tmp_path):
  file = write(tmp_path / "a.gguf", "llama2", quantized=quantized)
  whole = file.read_bytes()
  for there in (len(whole) // 2, len(whole) - 100):
    file.write_bytes(whole[:there])
    with pytest.raises(ValueError, match=rf"a.gguf is cut off: {there} bytes are there, {len(whole)} are expected$"):
      models.load_model(file)
  file.write_bytes(whole[:5000])  # within its header
  with pytest.raises(ValueError, match="a.gguf, 5000 bytes, is no GGUF file or not all of one"):
    models.load_model(file)


# A real file, such as SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def real() -> pathlib.Path:
  if not (path := os.environ.get("SPARSE_SERVE_GGUF")):
    pytest.skip("a GGUF file: give SPARSE_SERVE_GGUF")
  return pathlib.Path(path)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["The quick brown fox", " it's über\n\n  naïve 猫", "def f(x):\n\treturn x", "<|im_start|>user"]


@pytest.mark.slow
def test_a_real_file_against_transformers(real):
  transformers, torch, _ = (pytest.importorskip(name) for name in ("transformers", "torch", "accelerate"))
  model = models.load_model(real, "float32")
  theirs = transformers.AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
  for text in TEXTS:
    ids = theirs.encode(text)
    assert model.tokenizer.encode(text) == ids
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
  assert model.tokenizer.apply_chat_template(CHAT) == theirs.apply_chat_template(
    CHAT, tokenize=False, add_generation_prompt=True
  )
  ids = model.tokenizer.encode_chat(CHAT)
  assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
  network = transformers.AutoModelForCausalLM.from_pretrained(real.parent, gguf_file=real.name, dtype=torch.float32)
  with torch.no_grad():
    wanted = network(torch.tensor([ids])).logits[0].numpy()
  params = models.place_params(model)
  ours = np.asarray(jax.jit(models.forward, static_argnums=0)(model.config, params, np.asarray(ids, np.int32)))
  np.testing.assert_allclose(ours, wanted, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_real_file_on_every_rung(real):
  small = {
    "cache.lanes": 2,
    "cache.dram_bytes": "64MiB",
    "cache.hbm_bytes": "64MiB",
    "scheduler.max_batch": 2,
    "scheduler.max_context": 512,
    "sparse.token_budget": 512,
  }
  outputs = {}
  for rung in ("dense", "sparse", "sparse_offload", "sparse_serve", "psa"):
    llm = LLM(
      real, config=rung, overrides=small | ({"sparse.threshold": 1.0} if rung == "psa" else {}), dtype="float32"
    )
    prompt = llm.model.tokenizer.encode_chat(CHAT)
    (output,) = llm.generate([prompt], max_new_tokens=24)
    outputs[rung] = output.text
  assert set(outputs.values()) == {outputs["dense"]} and "Paris" in outputs["dense"]
