"""Makes tests/goldens/files: what `transformers` makes of model directories whose files disagree or leave things out.

Needs transformers and torch, which nothing else here does:

  pip install torch transformers
  python tools/make_file_goldens.py tests/goldens

`configs.json` holds config.json's and the rope, shape and class that transformers computes from each. `tokenizers.json`
holds changes to the files of `goldens/tokenizer`, and ids, special tokens and rendered conversations. An error of
transformers is kept as its type.
"""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import tempfile
from typing import Any

import transformers

BASE = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 96,
  "hidden_size": 64,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 20000.0,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NEW = {"rope_type": "default", "rope_theta": 5e6}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 5e6}}

# name -> (changes of BASE, keys that are absent). Each is a pair of places that say different things, or a default.
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
  "rope_parameters + rope_scaling": (QWEN3 | {"rope_parameters": NEW, "rope_scaling": YARN}, ("rope_theta",)),
  "rope_parameters + rope_scaling with theta": (
    QWEN3 | {"rope_parameters": NEW, "rope_scaling": YARN | {"rope_theta": 1e5}},
    ("rope_theta",),
  ),
  "rope_parameters + rope_scaling + rope_theta": ({"rope_parameters": NEW, "rope_scaling": YARN}, ()),
  "rope_parameters + rope_scaling {}": ({"rope_parameters": NEW, "rope_scaling": {}}, ()),
  "rope_parameters.theta + rope_theta": ({"rope_parameters": NEW}, ()),
  "rope_scaling.theta + rope_theta": ({"rope_scaling": LINEAR | {"rope_theta": 5e6}}, ()),
  "rope_parameters without theta": ({"rope_parameters": LINEAR}, ()),
  "rope_type + type": ({"rope_scaling": YARN | {"rope_type": "linear"}}, ()),
  "type + rope_type default": ({"rope_scaling": YARN | {"rope_type": "default"}}, ()),
  "original inside + outside": ({"rope_scaling": YARN, "original_max_position_embeddings": 8}, ()),
  "original outside": (
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 8},
    (),
  ),
  "original absent": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ()),
  "llama3 original inside + outside": (
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 8},
    (),
  ),
  "llama3 original absent": ({"rope_scaling": LLAMA3}, ()),
  "yarn attention_factor + mscale": (
    {"rope_scaling": YARN | {"attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.25}},
    (),
  ),
  "nested rope_parameters": ({"rope_parameters": NESTED}, ("rope_theta",)),
  "nested rope_parameters, layer types": (QWEN3 | {"rope_parameters": NESTED}, ("rope_theta",)),
  "architectures mistral + model_type llama": ({"architectures": ["MistralForCausalLM"]}, ()),
  "architectures llama + model_type mistral": (
    MISTRAL | {"architectures": ["LlamaForCausalLM"], "sliding_window": 4096},
    (),
  ),
  "architectures qwen2 + model_type qwen3": (QWEN3 | {"architectures": ["Qwen2ForCausalLM"]}, ()),
  "architectures absent": ({}, ("architectures",)),
  "architectures null": ({"architectures": None}, ()),
  "model_type unknown": ({"model_type": "x"}, ()),
  "head_dim + hidden_size": ({"head_dim": 32}, ()),
  "head_dim null": (QWEN2 | {"head_dim": None}, ()),
  "qwen2 head_dim": (QWEN2 | {"head_dim": 32}, ()),
  "qwen3 head_dim absent": (QWEN3, ()),
  "dtype + torch_dtype": ({"dtype": "float32", "torch_dtype": "bfloat16"}, ()),
  "torch_dtype": ({"torch_dtype": "bfloat16"}, ()),
  "tie absent": ({}, ()),
  "rms_norm_eps absent": ({}, ("rms_norm_eps",)),
  "rope_theta absent": ({}, ("rope_theta",)),
  "qwen2 rope_theta absent": (QWEN2, ("rope_theta",)),
  "max_position_embeddings absent": ({}, ("max_position_embeddings",)),
  "mistral max_position_embeddings absent": (MISTRAL, ("max_position_embeddings",)),
  "qwen2 max_position_embeddings absent": (QWEN2, ("max_position_embeddings",)),
  "kv heads absent": ({}, ("num_key_value_heads",)),
  "kv heads null": (QWEN3 | {"num_key_value_heads": None}, ()),
  "mistral kv heads absent": (MISTRAL | {"num_attention_heads": 16}, ("num_key_value_heads",)),
  "qwen2 kv heads absent": (QWEN2 | {"num_attention_heads": 32}, ("num_key_value_heads",)),
  "use_sliding_window, every layer full": (
    QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    (),
  ),
  "use_sliding_window, max_window_layers absent": (QWEN2 | {"use_sliding_window": True, "sliding_window": 8}, ()),
  "use_sliding_window + layer_types": (
    QWEN3
    | {
      "use_sliding_window": True,
      "sliding_window": 8,
      "max_window_layers": 0,
      "layer_types": ["full_attention"] * 2,
    },
    (),
  ),
  "use_sliding_window, some layers": (
    QWEN3 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    (),
  ),
}


def raw_config(name: str) -> dict[str, Any]:
  changes, absent = CONFIGS[name]
  return {key: value for key, value in (BASE | changes).items() if key not in absent}


def compute_config(raw: dict[str, Any]) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "config.json").write_text(json.dumps(raw))
    try:
      config = transformers.AutoConfig.from_pretrained(folder)
      model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
      return {"error": type(error).__name__}
  rotary, attention = model.model.rotary_emb, model.model.layers[0].self_attn
  return {
    "class": type(model).__name__,
    "inv_freq": [float(f"{f:.7g}") for f in rotary.inv_freq.tolist()],
    "amplitude": rotary.attention_scaling,
    "kv_heads": attention.k_proj.weight.shape[0] // attention.head_dim,
    "head_dim": attention.head_dim,
    "norm_eps": model.model.norm.variance_epsilon,
    "positions": config.max_position_embeddings,
    "dtype": str(config.dtype).removeprefix("torch."),
    "tied": config.tie_word_embeddings,
    "windows": [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers],
  }


def make_configs() -> dict[str, Any]:
  return {name: {"raw": raw_config(name), "computed": compute_config(raw_config(name))} for name in CONFIGS}


def write(file: pathlib.Path, cases: Any) -> None:
  made = {"transformers": transformers.__version__, "cases": cases}
  file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def main(out: pathlib.Path) -> None:
  logging.disable(logging.WARNING)
  (out / "files").mkdir(exist_ok=True)
  write(out / "files" / "configs.json", make_configs())


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
