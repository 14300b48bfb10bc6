"""`sparse-serve bench-kernels`: sparse_serve_jax/commands/bench_kernels.py."""

from sparse_serve_jax.commands import main

if __name__ == "__main__":
  main("bench-kernels")
