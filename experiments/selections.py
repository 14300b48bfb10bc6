"""`sparse-serve selections`: sparse_serve_jax/commands/selections.py."""

from sparse_serve_jax.commands.selections import command

if __name__ == "__main__":
  command()
