"""Build hooks of the documentation site: the README is its first page."""

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return the README for index.md, with links as they are from within docs/."""
    if page.file.src_uri != "index.md":
        return markdown
    return (Path(config.config_file_path).parent / "README.md").read_text().replace("](docs/", "](")
