"""`sparse-serve accuracy`: sparse_serve_jax/commands/accuracy.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("accuracy")
