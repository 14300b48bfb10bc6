"""`sparse-serve calibrate`: sparse_serve_jax/commands/calibrate.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("calibrate")
