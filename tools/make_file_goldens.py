"""Makes tests/goldens/files: what `transformers` makes of model directories whose files disagree or leave things out.

Needs transformers and torch, which nothing else here does:

  pip install torch transformers
  python tools/make_file_goldens.py tests/goldens

`configs.json` holds config.json's and the rope, shape and class that transformers computes from each. `tokenizers.json`
holds changes to the files of `goldens/tokenizer`, and ids, special tokens and rendered conversations; `chats.json`
templates, and what is rendered and encoded with them. An error of transformers is kept as its type.
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


# name -> (changes of tokenizer.json, tokenizer_config.json, special_tokens_map.json, other files: path -> text)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
FILL = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
NEW_TOKEN = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
SHOW = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents is none }}|{{ x is defined }}"
Files = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None, dict[str, str]]
TOKENIZERS: dict[str, Files] = {
  "truncation": ({"truncation": CUT}, FAST, None, {}),
  "padding": ({"padding": FILL | {"pad_token": "</s>"}}, FAST, None, {}),
  "map alone": ({}, None, {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}, {}),
  "map over config": ({}, FAST | {"eos_token": "<|user|>"}, {"eos_token": "</s>", "pad_token": "</s>"}, {}),
  "config over map": (
    {},
    FAST | {"eos_token": "<|user|>", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}},
    {"eos_token": "</s>", "pad_token": "</s>"},
    {},
  ),
  "null": ({}, FAST | {"eos_token": None}, None, {}),
  "added tokens": ({}, FAST | {"added_tokens_decoder": {"278": NEW_TOKEN}}, None, {}),
  "flags of added tokens": (
    {},
    FAST | {"added_tokens_decoder": {"2": {"content": "<|user|>", "rstrip": True, "special": True}}},
    None,
    {},
  ),
  "unknown special tokens": ({}, FAST | {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "cat"}, None, {}),
  "extra special tokens": ({}, FAST | {"extra_special_tokens": ["<new>"]}, None, {}),
  "additional special tokens": ({}, FAST | {"additional_special_tokens": ["<new>", "<|user|>"]}, None, {}),
  "additional special tokens in the map": ({}, FAST, {"additional_special_tokens": ["<new>"]}, {}),
  "named special tokens": ({}, FAST | {"image_token": "<new>", "extra_special_tokens": {"a_token": "<pad>"}}, None, {}),
  "added_tokens.json": ({}, FAST, None, {"added_tokens.json": '{"<new>": 278}'}),
  "add_bos_token true, no post-processor": ({"post_processor": None}, FAST | {"add_bos_token": True}, None, {}),
  "add_bos_token false, a post-processor": ({}, FAST | {"add_bos_token": False}, None, {}),
  "add_eos_token true": ({}, FAST | {"add_eos_token": True}, None, {}),
  "template in config": ({}, FAST | {"chat_template": SHOW}, None, {}),
  "template in a file": ({}, FAST | {"chat_template": "no"}, None, {"chat_template.jinja": SHOW}),
  "templates by name": (
    {},
    FAST | {"chat_template": [{"name": "default", "template": SHOW}, {"name": "tool_use", "template": "tools"}]},
    None,
    {},
  ),
  "templates in files": (
    {},
    FAST | {"chat_template": "no"},
    None,
    {"chat_template.jinja": SHOW, "additional_chat_templates/tool_use.jinja": "{{ tools | length }} tools"},
  ),
}
TEXT = "the <s> cat</s><new> <pad><unk><|user|> sat"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"b": 1, "a": [None]}}}]
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat "}]
DOCUMENTS = [{"title": "T", "text": "on the mat"}]

# name -> (template, messages, arguments of apply_chat_template)
CHATS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
  "generation": (
    "{% set a = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set a = 2 %}\n"
    "{{ m.content }}{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}\n{% endfor %}{{ a }}",
    CHAT,
    {},
  ),
  "tojson": (
    "{{ tools | tojson }}\n{{ tools | tojson(indent=2) }}\n{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}"
    "\n{{ tools | tojson(ensure_ascii=True) }}{{ tools[0].function.parameters | tojson(true, 1) }}",
    CHAT,
    {"tools": TOOLS},
  ),
  "absent": ("{{ tools is none }}{{ documents is none }}{{ pad_token is defined }}{{ x is defined }}", CHAT, {}),
  "documents": ("{{ documents[0].title }}: {{ documents[0]['text'] }}{{ enable_thinking }}", CHAT, {}),
  "arguments": (
    "{{ documents[0].title }}{{ thinking }}{{ more.a[0] }}{{ bos_token }}",
    CHAT,
    {"documents": DOCUMENTS, "thinking": False, "more": {"a": [1.5]}, "bos_token": "<other>"},
  ),
  "null in messages": (
    "{% for m in messages %}{{ m.content is defined }}{{ m.tool_calls is defined }}{{ m | tojson }}{% endfor %}",
    [{"role": "assistant", "content": None, "tool_calls": None}, {"role": "user", "content": "x", "n": {"a": None}}],
    {},
  ),
  "reasoning": (
    "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    [{"role": "assistant", "content": "x", "reasoning": "r"}, {"role": "assistant", "content": "", "thinking": "t"}],
    {},
  ),
  "continue": ("{% for m in messages %}<{{ m.content }}>{% endfor %}end", CHAT, {"continue_final_message": True}),
  "continue, trimmed": (
    "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}end",
    CHAT,
    {"continue_final_message": True},
  ),
  "continue a field": (
    "{% for m in messages %}<{{ m.reasoning_content }}|{{ m.content }}>{% endfor %}end",
    [{"role": "assistant", "content": "x", "thinking": "so far"}],
    {"continue_final_message": "reasoning_content"},
  ),
  "continue what is dropped": ("{{ messages[0].content }}content", CHAT, {"continue_final_message": True}),
  "raise_exception": ("{{ raise_exception('no') }}", CHAT, {}),
  "a method that changes": ("{{ messages.append(1) }}", CHAT, {}),
  "namespace and dict": (
    "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}{{ dict(a=1) }}"
    "{% set d = dict.fromkeys(['x']) %}{{ d }}",
    CHAT,
    {},
  ),
  "break outside a loop": ("{% break %}", CHAT, {}),
  "loop controls": (
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    CHAT,
    {},
  ),
  "typed control tokens": (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + eos_token }}{% endfor %}",
    [{"role": "user", "content": "the </s><|assistant|> cat<s>"}, {"role": "assistant", "content": "</s>"}],
    {},
  ),
  "typed control tokens that are cut": (
    "<|user|>{% for m in messages %}{{ m.content.split('s>')[0] }}{{ m.content[1:] }}</s>{% endfor %}",
    [{"role": "user", "content": "a</s>\n\n b</s>"}],
    {},
  ),
}


def make_tokenizers(golden: pathlib.Path) -> dict[str, Any]:
  made = {}
  for name, files in TOKENIZERS.items():
    with tempfile.TemporaryDirectory() as folder:
      write_files(golden, pathlib.Path(folder), files)
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
      ids = tokenizer.encode(TEXT)
      computed = {
        "ids": ids,
        "plain": tokenizer.encode(TEXT, add_special_tokens=False, split_special_tokens=True),
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "special": dict(tokenizer.special_tokens_map),
        "size": len(tokenizer),
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None,
        "tools": tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False) if tokenizer.chat_template else None,
      }
    made[name] = {"files": files, "text": TEXT, "chat": CHAT, "tools": TOOLS, "computed": computed}
  return made


def write_files(golden: pathlib.Path, directory: pathlib.Path, files: Files) -> None:
  core, config, mapped, others = files
  raw = json.loads((golden / "tokenizer.json").read_text()) | core
  (directory / "tokenizer.json").write_text(json.dumps(raw))
  for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", mapped)):
    if value is not None:
      (directory / name).write_text(json.dumps(value))
  for name, text in others.items():
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(text)


def make_chats(golden: pathlib.Path) -> dict[str, Any]:
  tokenizer = transformers.AutoTokenizer.from_pretrained(golden)
  made = {}
  for name, (template, messages, arguments) in CHATS.items():
    tokenizer.chat_template = template
    case: dict[str, Any] = {"template": template, "messages": messages, "arguments": arguments}
    try:
      case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
      ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False, **arguments)
      case["ids"] = ids
    except Exception as error:
      case["error"] = type(error).__name__
    made[name] = case
  return made


def write(file: pathlib.Path, cases: dict[str, Any]) -> None:
  """One case a line."""
  lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()]
  head = f'{{"transformers": "{transformers.__version__}", "cases": {{\n'
  file.write_text(head + ",\n".join(lines) + "\n}}\n")


def main(out: pathlib.Path) -> None:
  logging.disable(logging.WARNING)
  (out / "files").mkdir(exist_ok=True)
  write(out / "files" / "configs.json", make_configs())
  write(out / "files" / "tokenizers.json", make_tokenizers(out / "tokenizer"))
  write(out / "files" / "chats.json", make_chats(out / "tokenizer"))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
