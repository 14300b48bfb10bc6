"""`sparse-serve ladder`: sparse_serve_jax/commands/ladder.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("ladder")
