"""`sparse-serve demo`: sparse_serve_jax/commands/demo.py."""

from sparse_serve_jax.commands.demo import command

if __name__ == "__main__":
  command()
