"""`sparse-serve simulate`: sparse_serve_jax/commands/simulate.py."""

from sparse_serve_jax.commands.simulate import command

if __name__ == "__main__":
  command()
