"""`sparse-serve bench-kernels`: sparse_serve_jax/commands/bench_kernels.py."""

from sparse_serve_jax.commands.bench_kernels import command

if __name__ == "__main__":
  command()
