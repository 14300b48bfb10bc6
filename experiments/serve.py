"""`sparse-serve run`: sparse_serve_jax/commands/run.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("run")
