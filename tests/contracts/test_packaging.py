"""What the package declares, and the core tests at the oldest versions that it claims."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from fresh_environments import make_environment

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

CORE_TESTS = [
    "tests/architectures/test_shipped_entries.py::test_the_entry_fits_and_covers_the_model",
    "tests/measures/test_leading.py",
    "tests/measures/test_matrices.py",
    "tests/measures/test_parts.py",
    "tests/measures/test_power_iteration.py",
    "tests/methods/sigma_reparam/test_layers.py",
    "tests/checkpoints/test_saving.py",
    "tests/checkpoints/test_loading.py",
    "tests/checkpoints/test_sidecar.py",
    "tests/checkpoints/test_state_dicts.py",
    "tests/trainer/test_changes.py",
    "tests/trainer/test_saving.py",
    "tests/trainer/test_training.py",
    "tests/contracts/test_resume.py::test_resumed_run_equals_the_uninterrupted_one",
    "tests/contracts/test_resume.py::test_sharded_checkpoint_resumes_exactly",
    "tests/adamw2/test_groups.py",
    "tests/adamw2/test_optimizer.py",
]


def oldest_versions() -> dict[str, str]:
    """Map each dependency to the lowest version that pyproject allows, exclusions skipped."""
    oldest = {}
    for requirement in PROJECT["dependencies"]:
        name, lowest = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        excluded = re.findall(r"!=([\d.]+)", requirement)
        # 5.10 is 5.10.0, which is excluded: the oldest allowed one is the patch release after it.
        oldest[name] = f"{lowest}.1" if f"{lowest}.0" in excluded else lowest
    return oldest


def test_version_has_one_source():
    import hf_stable

    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_stable.__version__)
    assert f"## {hf_stable.__version__}" in (ROOT / "CHANGELOG.md").read_text()


KERNELS = ROOT / "hf_stable" / "kernels"
COMPILERS = {"numba", "llvmlite", "triton", "numpy"}
"""What kernels are compiled by, and what comes with it: an extra's, so no other folder needs it."""


def third_party_imports(paths) -> set[str]:
    """Packages that files import at their top."""
    found = {
        match.split(".")[0]
        for path in paths
        for match in re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), flags=re.M)
    }
    return found - set(sys.stdlib_module_names) - {"hf_stable"}


def test_compilers_of_kernels_are_an_extras_and_no_other_folder_needs_them():
    kernels = set(KERNELS.rglob("*.py"))
    others = set((ROOT / "hf_stable").rglob("*.py")) - kernels
    assert third_party_imports(kernels) - third_party_imports(others) <= COMPILERS
    assert "numba" in third_party_imports(kernels)
    assert any(r.startswith("numba>=") for r in PROJECT["optional-dependencies"]["fast"])


def test_every_import_of_the_package_is_declared():
    files = set((ROOT / "hf_stable").rglob("*.py")) - set(KERNELS.rglob("*.py"))
    third_party = third_party_imports(files)
    declared = {re.match(r"[\w-]+", r).group().lower() for r in PROJECT["dependencies"]}
    origin = packages_distributions()  # yaml comes with PyYAML
    undeclared = {
        name
        for name in third_party
        if not {each.lower().replace("_", "-") for each in origin[name]} & declared
    }
    assert not undeclared
    assert {"torch", "transformers", "safetensors"} <= third_party


def test_core_tests_are_where_their_list_says():
    assert [name for name in CORE_TESTS if not (ROOT / name.partition("::")[0]).is_file()] == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_core_tests_pass_at_the_oldest_versions(tmp_path):
    oldest = oldest_versions()
    pins = [f"{name}=={version}" for name, version in oldest.items()]
    python = make_environment(
        tmp_path / "venv",
        f"torch=={oldest['torch']}",
        " ".join([*pins, "pytest", "pytest-timeout", "numpy<2"]),  # of their time
        f"--no-deps {ROOT}",
    )
    result = subprocess.run(
        # What torch.compile takes minutes for is not what an old version would break.
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-k",
            "not compile",
            "-p",
            "no:cacheprovider",
            *CORE_TESTS,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert re.search(r"\d+ passed", result.stdout)
