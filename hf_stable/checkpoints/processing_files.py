"""What lies beside a model's weights and goes where they go: known names, never a link."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DESCRIPTIONS", "PROCESSING_FILES", "copy_files"]

Folder = str | os.PathLike[str]

PROCESSING_FILES = frozenset(
    (
        # tokenizers
        "added_tokens.json", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json",
        "merges.txt", "normalizer.json", "sentencepiece.bpe.model", "sentencepiece.model",
        "source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model",
        "target.spm", "target_vocab.json", "tiktoken.model", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "vocab-src.json", "vocab-tgt.json", "vocab.bpe", "vocab.json",
        "vocab.txt", "word_pronunciation.json", "word_shape.json",
        # processors and chat templates
        "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    )
)  # fmt: skip
"""Names under which tokenizers and processors of transformers write. Nothing is told by a pattern:
`hf_token.json` fits many."""

DESCRIPTIONS = frozenset(("config.json", "generation_config.json", "README.md", "LICENSE"))
"""What else describes a model, and is no code, no weights and no state of a training."""

TEMPLATES = "additional_chat_templates"


def copy_files(source: Folder, target: Folder, names: Iterable[str] = PROCESSING_FILES) -> None:
    """Copy what a folder has of some names, and its chat templates.

    Args:
        source: the folder.
        target: where to; it exists.
        names: the names.

    Raises:
        ValueError: if one of them is a link, or no file at all. Nothing has been copied then.
        OSError: if it cannot be read or written.
    """
    folder = Path(source)
    found = [Path(name) for name in sorted(names) if os.path.lexists(folder / name)]
    templates = folder / TEMPLATES
    if templates.is_dir():
        found += [path.relative_to(folder) for path in sorted(templates.glob("*.jinja"))]
    for name in found:
        refuse_link(folder / name, folder)
    for name in found:
        (Path(target) / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, Path(target) / name, follow_symlinks=False)


def refuse_link(path: Path, folder: Path) -> None:
    """Raise ValueError for what is a link, in a folder that is a link, or is no file."""
    linked = next((p for p in (path, path.parent) if p != folder and p.is_symlink()), None)
    if linked is not None:
        raise ValueError(
            f"{linked} is a link to {os.readlink(linked)}: links are not followed, for what they "
            "lead to may not be meant to be copied or published. Put the file itself there, or "
            "remove the link"
        )
    if not path.is_file():
        raise ValueError(f"{path} is no file; put the file itself there, or remove it")
