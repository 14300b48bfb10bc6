"""`sparse-serve bench-step`: sparse_serve_jax/commands/bench_step.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("bench-step")
