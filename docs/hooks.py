"""What mkdocs shows beside the files in docs/: README, method cards, recipes, the API reference.

Each of these pages stands in the repository where its reader looks for it. Links between them are
paths in the repository, so that they work there; here they are turned to the pages of the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from hf_stable.public_modules import PUBLIC

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "index.md",
    "hf_stable/methods/sigma_reparam/README.md": "methods/sigma-reparam.md",
    "hf_stable/methods/layernorms/README.md": "methods/layernorms.md",
    "hf_stable/adamw2/README.md": "methods/adamw2.md",
    "hf_stable/monitor/README.md": "methods/monitor.md",
    "hf_stable/report/README.md": "methods/report.md",
    "hf_stable/checkpoints/README.md": "methods/checkpoints.md",
    "hf_stable/commands/README.md": "methods/commands.md",
    "recipes/README.md": "recipes/index.md",
    "recipes/evidence/README.md": "recipes/evidence.md",
    "recipes/scale.md": "recipes/scale.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Path in the repository -> page of the site, of every page that is not in docs/."""

ASSETS = ("CITATION.cff", "recipes/evidence/figures/*.svg", "recipes/evidence/*.py")
"""Other files that pages link to."""

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_config(config: Any) -> Any:
    """Put a page for each public module behind the rest."""
    pages = [{_title(module): _reference_uri(module)} for module in PUBLIC]
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that stand elsewhere, and write the reference."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for pattern in ASSETS:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for module, names in PUBLIC.items():
        uri = _reference_uri(module)
        files.append(File.generated(config, uri, content=reference_page(module, names)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository to links between pages."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    source = next((path for path, page_uri in PAGES.items() if page_uri == uri), f"docs/{uri}")
    return site_links(markdown, source, uri)


def site_links(markdown: str, source: str, uri: str) -> str:
    """Return a page whose relative links lead to pages of the site.

    Args:
        markdown: with links that are right in the repository.
        source: its path there.
        uri: its own page.
    """

    def replace(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        there = PAGES.get(path, path.removeprefix("docs/"))
        relative = os.path.relpath(there, os.path.dirname(uri) or ".")
        return f"{before}{relative}{anchor or ''}{after}"

    return _LINK.sub(replace, markdown)


def reference_page(module: str, names: tuple[str, ...]) -> str:
    """Return the page of a public module, which mkdocstrings fills with docstrings."""
    qualified = _title(module)
    entries = [f"::: {qualified}.{name}" for name in names]
    return "\n\n".join([f"# {qualified}", *entries]) + "\n"


def _title(module: str) -> str:
    return f"hf_stable.{module}" if module else "hf_stable"


def _reference_uri(module: str) -> str:
    return f"reference/{_title(module)}.md"
