"""`sparse-serve train-reference`: sparse_serve_jax/commands/train_reference.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("train-reference")
