"""`sparse-serve bench`: sparse_serve_jax/commands/bench.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("bench")
