"""`sparse-serve bench-prefill`: sparse_serve_jax/commands/bench_prefill.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("bench-prefill")
