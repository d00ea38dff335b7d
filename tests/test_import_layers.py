"""Imports point only up the list of layers; private names of transformers stay in one file."""

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

ROOT = Path(__file__).parents[1]

LEVELS = {
    0: """spectral product_spectra sigma_tracking entropy sharpness method_config
          modeling_hf_stable loss_curves alarms
          stability_log stability_metrics hub_files json_values""",
    1: """sigma_function settling sigma_layers refreshing adamw2_update adamw2_lora adamw2_options
          adamw2_state adamw2""",
    2: "architectures",
    3: """sigma_reparam norm_removal patching describing block_terms records recording probes
          lora_layers provenance adamw2_groups standalone card_pictures model_cards sidecar
          weight_files saved_models checkpoints exporting monitoring monitor_options rollbacks
          run_measures gathering sharding cost_model machines""",
    4: "trainer_plugin callback",
    5: """report demo demo_runs demo_reload bench bench_sigma bench_adamw2 bench_monitor
          bench_scale planning cli_bench
          block_inspection matrix_inspection
          checkpoint_findings checkpoint_comparison inspection folding consolidation diagnosis
          terminal run_options script_running run
          cli""",
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules.split()}

SINGLE_PRIVATE_FILE = "trainer_plugin"

PACKAGE = sorted((ROOT / "hf_stable").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))


def module_of(path: Path) -> str:
    """The module that a file makes, below the package: `architectures` for all files in it."""
    return path.relative_to(ROOT / "hf_stable").parts[0].removesuffix(".py")


def imports_of(source: str) -> Iterator[str]:
    """Every module or name that a source imports, wherever in it, with its whole dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_violations(module: str, source: str) -> list[str]:
    """What a module imports from below itself, or from the package as a whole."""
    if module == "__init__":
        return []
    found = []
    for name in imports_of(source):
        parts = name.split(".")
        if parts[0] == "recipes":
            found.append(f"{module} imports {name}: nothing imports recipes")
        if parts[0] != "hf_stable":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in LEVEL else None
        if target is None and LEVEL[module] < 5:
            found.append(f"{module} imports {name}: only the commands may import the package")
        elif target is not None and LEVEL[target] > LEVEL[module]:
            found.append(
                f"{module} (level {LEVEL[module]}) imports {target} (level {LEVEL[target]})"
            )
    return found


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


def test_every_module_has_its_place():
    unplaced = {module_of(path) for path in PACKAGE} - LEVEL.keys() - {"__init__"}
    assert not unplaced, f"place {sorted(unplaced)} in LEVELS, as high up as its imports allow"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up(path):
    assert layer_violations(module_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_transformers_stay_in_one_file(path):
    found = private_violations(path.read_text())
    assert module_of(path) == SINGLE_PRIVATE_FILE or found == []


def test_the_one_file_does_touch_private_names():
    assert private_violations((ROOT / f"hf_stable/{SINGLE_PRIVATE_FILE}.py").read_text())


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {}
    for path in PACKAGE:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # The top level of a module alone: an import inside a function runs later.
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.stmt)]
        targets = set()
        for node in top:
            if isinstance(node, ast.ImportFrom) and node.module != "hf_stable":
                targets.add(node.module)
        graph[name] = targets
    graph = {name: targets & graph.keys() - {name} for name, targets in graph.items()}
    while leaves := [name for name, targets in graph.items() if not targets]:
        graph = {n: t - set(leaves) for n, t in graph.items() if n not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_file_that_exports_carry_stands_alone():
    source = (ROOT / "hf_stable/modeling_hf_stable.py").read_text()
    assert not [name for name in imports_of(source) if name.startswith("hf_stable")]


MEASURES = (
    "alarms", "cost_model", "entropy", "loss_curves", "machines", "planning", "refreshing",
    "sigma_function", "spectral",
)  # fmt: skip
"""Modules of functions that are public beside the package's own names."""


def recipe_violations(source: str) -> list[str]:
    """Names of the package that a recipe uses though they are not public."""
    public = {f"hf_stable.{name}" for name in hf_stable.__all__} | {"hf_stable"}
    for module in MEASURES:
        names = import_module(f"hf_stable.{module}").__all__
        public |= {f"hf_stable.{module}.{name}" for name in names}
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
        ("spectral", "from hf_stable.sigma_layers import install"),
        ("patching", "def f():\n    import hf_stable.cli"),
        ("sigma_layers", "import hf_stable"),
        ("adamw2", "from hf_stable import patch"),
        ("cli", "from recipes.vit import main"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert layer_violations(module, source)


def test_right_imports_pass():
    assert not layer_violations("patching", "from hf_stable.spectral import RowShard")
    assert not layer_violations("sigma_layers", "from hf_stable.refreshing import refresh")
    assert not layer_violations("cli", "import torch\nfrom hf_stable import __version__")


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
    ["from hf_stable.patching import METHODS", "import hf_stable\nhf_stable.patching.METHODS"],
)
def test_a_recipe_that_reaches_inside_is_found(source):
    assert recipe_violations(source)
    assert not recipe_violations("import hf_stable\nfrom hf_stable import patch\nhf_stable.fold(1)")
