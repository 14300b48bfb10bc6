"""`sparse-serve bench-step`: sparse_serve_jax/commands/bench_step.py."""

from sparse_serve_jax.commands.bench_step import command

if __name__ == "__main__":
  command()
