"""Makes tests/goldens: tiny random checkpoints and what `transformers` computes from them.

Needs torch and transformers, which nothing else here does:

  pip install torch transformers
  python tools/make_goldens.py tests/goldens

Each family gets a Hugging Face directory and an `expected.npz`: tokens [T], hidden [L + 1, T, d] (the embeddings, then
the output of every layer) and logits [T, V], computed in float32 from the weights as they are stored. Contexts before
scaling are 16 tokens and T is 48, so that every rope scaling shows. `tokenizer/` holds a tiny tokenizer with what
`transformers` makes of some texts and conversations.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

SHAPE = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
YARN_PLUS = YARN | {"beta_fast": 4.0, "beta_slow": 0.25, "mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False}

# name -> (class, changes to SHAPE, rope scaling, dtype of the files, whether config.json is written the older way)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str, bool]] = {
  "llama2": ("Llama", {"num_key_value_heads": 4, "head_dim": 8}, None, "float32", True),
  "llama3": ("Llama", {"tie_word_embeddings": True}, LLAMA3, "bfloat16", True),
  "llama_linear": ("Llama", {"max_position_embeddings": 16}, {"rope_type": "linear", "factor": 4.0}, "bfloat16", False),
  "llama_yarn": ("Llama", {}, YARN | {"beta_fast": 1.0, "beta_slow": 0.125}, "float32", False),
  "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}, None, "bfloat16", True),
  "qwen2": ("Qwen2", {"tie_word_embeddings": True, "head_dim": 8}, None, "bfloat16", False),
  "qwen2_yarn": ("Qwen2", {"max_position_embeddings": 16, "head_dim": 8}, YARN, "bfloat16", True),
  "qwen3": ("Qwen3", {}, None, "bfloat16", False),
  "qwen3_yarn": ("Qwen3", {"tie_word_embeddings": True}, YARN_PLUS, "bfloat16", False),
}
SHARDED = ("mistral",)
TOKENS = 48
TEMPLATE = (
  "{%- if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}\n"
  "{{- bos_token }}\n"
  "{%- for message in messages %}\n"
  "    {%- if message.role == 'skip' %}{% continue %}{% endif %}\n"
  "    {{- '<|' + message.role + '|>' + message.content | trim + eos_token }}\n"
  "{%- endfor %}\n"
  "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_family(directory: pathlib.Path, name: str) -> None:
  family, changes, scaling, dtype, old = FAMILIES[name]
  rope = (scaling or {"rope_type": "default"}) | {"rope_theta": 1e6 if family.startswith("Qwen") else 1e4}
  if rope["rope_type"] in ("llama3", "yarn"):
    rope["original_max_position_embeddings"] = 16
  config = getattr(transformers, f"{family}Config")(**(SHAPE | changes), rope_parameters=rope)
  torch.manual_seed(sorted(FAMILIES).index(name))
  model = getattr(transformers, f"{family}ForCausalLM")(config)
  with torch.no_grad():
    for key, p in model.named_parameters():
      p.normal_()
      if key.endswith("norm.weight"):
        p.mul_(0.1).add_(1)
      else:
        p.mul_(0.3 if key.endswith("bias") else p.shape[-1] ** -0.5 * (2 if "q_proj" in key else 1))
  model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="16KB" if name in SHARDED else "1GB")
  if old:
    rewrite_rope(directory / "config.json")
  # Read anew: a model cast to bfloat16 and back would keep rounded rope frequencies.
  stored = type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
  expected = run(stored, torch.randint(0, config.vocab_size, (TOKENS,)))
  np.savez_compressed(directory / "expected.npz", **expected)


def run(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
  states = []
  model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
  with torch.no_grad():
    out = model(tokens[None], output_hidden_states=True)
  states = [h[0] for h in out.hidden_states[:-1]] + states  # the last of hidden_states has been normed
  return {
    "tokens": tokens.numpy().astype(np.int32),
    "hidden": torch.stack(states).numpy(),
    "logits": out.logits[0].numpy(),
  }


def rewrite_rope(file: pathlib.Path) -> None:
  """The form before transformers 5: rope_theta and rope_scaling."""
  raw = json.loads(file.read_text())
  rope = raw.pop("rope_parameters")
  raw["rope_theta"] = rope.pop("rope_theta")
  raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
  raw["torch_dtype"] = raw.pop("dtype")
  file.write_text(json.dumps(raw, indent=2) + "\n")


def make_tokenizer(directory: pathlib.Path) -> None:
  core = tokenizers.Tokenizer(tokenizers.models.BPE())
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )
  core.train_from_iterator(["the cat sat on the mat", "that hat is the cat's"] * 4, trainer)
  core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(directory)
  texts = ["the cat sat", "Überraschung: 猫 \u0000\n\t x", "", "<s>the</s> mat"]
  chats = [
    [{"role": "user", "content": " hat? "}],
    [{"role": "skip", "content": "x"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "é\n"}],
  ]
  expected = {
    "vocab_size": len(tokenizer),
    "ids": [[text, tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)] for text in texts],
    "text": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in texts],
    "chats": [
      [chat, *(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=g) for g in (True, False))]
      for chat in chats
    ],
  }
  (directory / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main(out: pathlib.Path) -> None:
  for name in FAMILIES:
    make_family(out / name, name)
  make_tokenizer(out / "tokenizer")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
