"""`sparse-serve bench-prefill`: sparse_serve_jax/commands/bench_prefill.py."""

from sparse_serve_jax.commands.bench_prefill import command

if __name__ == "__main__":
  command()
