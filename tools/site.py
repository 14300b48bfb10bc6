"""A hook of mkdocs.yml: pages that others make first, such as docs/notebooks, stand in the menu if they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def there(nav: list[Any], folder: Path) -> list[Any]:
  """The entries of a menu whose files are in a folder; titles without entries are left out."""
  kept = []
  for entry in nav:
    ((title, of),) = entry.items()
    of = there(of, folder) if isinstance(of, list) else of
    if of and (isinstance(of, list) or (folder / of).is_file()):
      kept.append({title: of})
  return kept


def on_config(config: Any) -> Any:
  """Called by mkdocs when it has read mkdocs.yml."""
  config["nav"] = there(config["nav"], Path(config["docs_dir"]))
  return config
