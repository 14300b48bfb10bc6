"""`sparse-serve prefix`: sparse_serve_jax/commands/prefix.py."""

from sparse_serve_jax.commands.prefix import command

if __name__ == "__main__":
  command()
