"""A report needs nothing of torch: it is read where nobody trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_stable

IMPORTS = """
import json, sys, types

# The package itself without what it imports, which is another matter.
package = types.ModuleType("hf_stable")
package.__path__ = [{folder!r}]
sys.modules["hf_stable"] = package
import {module}
print(json.dumps(sorted(sys.modules)))
"""

HEAVY = {"torch", "transformers", "accelerate", "numpy", "matplotlib", "plotly", "jinja2"}


def modules_after(module):
    script = IMPORTS.format(folder=str(Path(hf_stable.__file__).parent), module=module)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_importing_the_report_imports_nothing_heavy():
    assert not HEAVY & modules_after("hf_stable.report")


@pytest.mark.parametrize("module", ["hf_stable.monitor.probing", "torch"])
def test_what_is_heavy_would_be_seen(module):
    assert "torch" in modules_after(module)
