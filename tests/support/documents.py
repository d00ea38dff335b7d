"""The documents that users read, and the code blocks in them.

A code block is run as it is shown, unless one of these says otherwise:

- its first line is `# NAME.py` or `# NAME.yaml`: it is written to that file, for a later block;
- its first line begins with `# Excerpt:`, which tells the reader what it needs beside itself;
- `<!-- run: NAME -->` stands before it: `.ci/run` runs it;
- it is `text`: what a command prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CARDS = sorted((ROOT / "hf_stable").rglob("README.md"))
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [README, *CARDS, *GUIDES]

_FENCE = re.compile(r"^(?:<!-- run: (?P<name>[\w-]+) -->\n)?```(?P<language>\w*)\n", flags=re.M)
_FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class CodeBlock:
    """A code block of a document.

    Attributes:
        place: `document:line` of its first line.
        language: behind its fence.
        text: between its fences.
        name: of the marker before it, or an empty string.
    """

    place: str
    language: str
    text: str
    name: str

    @property
    def is_excerpt(self) -> bool:
        """Say whether it tells the reader that it does not run alone."""
        return self.text.startswith("# Excerpt: ")

    @property
    def file(self) -> str | None:
        """Return the name of the file that it is the content of."""
        found = _FILE.match(self.text)
        return found[1] if found else None


def code_blocks(document: Path) -> list[CodeBlock]:
    """Return the code blocks of a document, in its order."""
    text = document.read_text()
    blocks = []
    position = 0
    while found := _FENCE.search(text, position):
        end = text.index("\n```", found.end() - 1) + 1
        line = text.count("\n", 0, found.end()) + 1
        name = document.relative_to(ROOT) if document.is_relative_to(ROOT) else document
        blocks.append(
            CodeBlock(
                f"{name}:{line}", found["language"], text[found.end() : end], found["name"] or ""
            )
        )
        position = end + 4
    return blocks


def named_block(document: Path, name: str) -> str:
    """Return the code block behind a marker.

    Raises:
        LookupError: if the document has none of that name.
    """
    for block in code_blocks(document):
        if block.name == name:
            return block.text
    raise LookupError(f"{document} lost its {name} block")
