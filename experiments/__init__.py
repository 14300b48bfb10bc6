"""Command lines: flags, a library call, rows, a table."""
