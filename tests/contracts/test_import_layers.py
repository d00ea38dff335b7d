"""The shape of the house: which folder may import which, no circles, and what is public.

Every file's whole tree is walked, functions and `if TYPE_CHECKING` included, so an import has no
place to hide; own modules are never imported by a computed name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedModel, Trainer

import hf_stable
from hf_stable import public_modules

ROOT = Path(__file__).parents[2]

FOLDERS = (
    "ground", "measures", "kernels", "architectures", "methods", "adamw2", "monitor",
    "checkpoints", "trainer", "report", "commands", "faces",
)  # fmt: skip
"""From the ground up: a folder imports from itself and from those before it."""

GROUND = (
    "_file_names", "_json", "_late_changes", "_live_objects", "_ranks", "_whole_files", "_wording",
    "modeling_hf_stable",
)  # fmt: skip
FACES = (
    "", "_library", "_registering", "entropy", "public_modules", "run", "spectral",
    "stability_log", "trainer_plugin",
)  # fmt: skip
"""Modules of the package's top level; "" is the package itself."""

PRIVATE_FOLDER = "trainer"

PACKAGE = sorted((ROOT / "hf_stable").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a file below the package; "" for the package itself."""
    parts = path.relative_to(ROOT / "hf_stable").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in PACKAGE}


def folder_of(module: str) -> str:
    if module in FACES:
        return "faces"
    return "ground" if module in GROUND else module.split(".")[0]


def imports_of(source: str) -> Iterator[str]:
    """Every module or name that a source imports, wherever in it, with its whole dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(source: str) -> Iterator[str]:
    """The modules of the package that a source imports, as names below the package."""
    for name in imports_of(source):
        if name == "hf_stable" or name.startswith("hf_stable."):
            below = name.removeprefix("hf_stable").removeprefix(".")
            while below not in MODULES:  # a name that a module holds
                below = below.rpartition(".")[0]
            yield below


def layer_violations(module: str, source: str) -> list[str]:
    """What a module imports from a folder above its own, or from nowhere that it may."""
    found = [
        f"{module} imports {name}: nothing imports recipes"
        for name in imports_of(source)
        if name.split(".")[0] == "recipes"
    ]
    here = folder_of(module)
    for target in own_imports(source):
        there = folder_of(target)
        # The version is the one thing that a command reads from the package itself.
        if FOLDERS.index(there) > FOLDERS.index(here) and not (here == "commands" and not target):
            found.append(f"{module} ({here}) imports {target or 'hf_stable'} ({there})")
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.split(".")[-1] in ("import_module", "__import__", "resolve_name"):
            spelled = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            if any(isinstance(text, str) and text.startswith("hf_stable") for text in spelled):
                found.append(f"{module} hides an import: {ast.unparse(node)}")
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What remains of a graph once leaves are plucked until there are none: circles."""
    while leaves := {name for name, targets in graph.items() if not targets - {name}}:
        graph = {n: t - leaves for n, t in graph.items() if n not in leaves}
    return sorted(graph)


def test_every_module_has_its_place():
    unplaced = [m for m in MODULES if folder_of(m) not in FOLDERS]
    assert not unplaced, f"{unplaced}: a module stands in a folder, or in GROUND or FACES here"
    assert set(GROUND + FACES) <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    assert layer_violations(module, MODULES[module].read_text()) == []


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {
        module: set(own_imports(path.read_text())) - {module, ""}
        for module, path in MODULES.items()
        if folder_of(module) != "faces"
    }
    # A folder's own __init__ names what its files hold; a file may not lean on it.
    assert not circles(graph)


def test_the_file_that_exports_carry_stands_alone():
    source = (ROOT / "hf_stable/modeling_hf_stable.py").read_text()
    assert not list(own_imports(source))


# Private names of transformers and PEFT


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


THEIR_PRIVATE = {
    name
    for cls in (PreTrainedModel, Trainer)
    for name in dir(cls)
    if is_private(name) and not hasattr(nn.Module(), name)
}


def private_violations(source: str) -> list[str]:
    """Private names of transformers that a source imports, reaches by attribute, or spells."""
    tree = ast.parse(source)
    found = [
        name
        for name in imports_of(source)
        if name.split(".")[0] == "transformers" and any(map(is_private, name.split(".")))
    ]
    theirs = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (node.module if isinstance(node, ast.ImportFrom) else alias.name or "").split(".")[0]
        == "transformers"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            name = root.id if isinstance(root, ast.Name) else ""
            if name in theirs or (node.attr in THEIR_PRIVATE and name != "self"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"transformers[\w.:]*[.:]_[a-z]\w*", node.value)
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_private_names_of_transformers_stay_in_one_folder(module):
    found = private_violations(MODULES[module].read_text())
    assert folder_of(module) == PRIVATE_FOLDER or found == []


def test_the_one_folder_does_touch_private_names():
    sources = [path.read_text() for m, path in MODULES.items() if folder_of(m) == PRIVATE_FOLDER]
    assert any(map(private_violations, sources))


# What is public


def test_what_is_public_is_there():
    assert public_modules.PUBLIC[""] == tuple(hf_stable.__all__)
    for module, names in public_modules.PUBLIC.items():
        holder = import_module(f"hf_stable.{module}" if module else "hf_stable")
        assert not [name for name in names if not hasattr(holder, name)], module


def recipe_violations(source: str) -> list[str]:
    """Names of the package that a recipe uses though they are not public."""
    public = {"hf_stable"} | {
        ".".join(filter(None, ("hf_stable", module, name)))
        for module, names in public_modules.PUBLIC.items()
        for name in names
    }
    found = [n for n in imports_of(source) if n.split(".")[0] == "hf_stable" and n not in public]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if node.value.id == "hf_stable" and name not in public:
                found.append(name)
    return found


def test_recipes_use_public_names_only():
    assert {str(p): recipe_violations(p.read_text()) for p in RECIPES} == {
        str(path): [] for path in RECIPES
    }


# The rules can fail


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("measures.entropy", "from hf_stable.methods.patching import patch"),
        ("methods.patching", "def f():\n    import hf_stable.commands.main"),
        (
            "methods.patching",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from hf_stable.trainer.changes import Wrap",
        ),
        ("methods.patching", "import hf_stable"),
        ("adamw2.optimizer", "from hf_stable import patch"),
        ("_json", "from hf_stable.measures.collapse import rank_share"),
        ("monitor.callback", "import importlib\nimportlib.import_module('hf_stable.report')"),
        ("monitor.callback", "__import__('hf_stable.report')"),
        (
            "monitor.callback",
            "from importlib import import_module\nimport_module(f'hf_stable.{x}')",
        ),
        ("commands.main", "from recipes.vit import main"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert layer_violations(module, source)


def test_right_imports_pass():
    assert not layer_violations("methods.patching", "from hf_stable.measures.matrices import x")
    assert not layer_violations("methods.patching", "from hf_stable import modeling_hf_stable")
    assert not layer_violations("commands.main", "import torch\nfrom hf_stable import __version__")


def test_a_circle_is_found_and_a_tree_is_none():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == list("abcd")
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS",
        "import transformers\ntransformers.trainer._is_peft_model(1)",
        "from transformers import Trainer\nTrainer._inner_training_loop",
        "def f(trainer):\n    trainer._load_best_model()",
        "name = 'transformers.trainer:Trainer._load_best_model'",
    ],
)
def test_a_private_name_is_found(source):
    assert private_violations(source)


def test_public_and_own_private_names_pass():
    assert not private_violations(
        "from transformers import Trainer\n"
        "class A:\n    def f(self):\n        self._mine(Trainer.train)"
    )


@pytest.mark.parametrize(
    "source",
    ["from hf_stable.methods.patching import METHODS", "import hf_stable\nhf_stable.methods.x"],
)
def test_a_recipe_that_reaches_inside_is_found(source):
    assert recipe_violations(source)
    assert not recipe_violations("import hf_stable\nfrom hf_stable import patch\nhf_stable.fold(1)")
