"""`import hf_stable` costs little and is enough, whatever was imported before it or comes after."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import TrainingArguments

import hf_stable
from hf_stable import _library

CHECK = """
import sys
from hf_stable.trainer.changes import ON_IMPORT, is_in_place, listed
from transformers import TrainingArguments
assert TrainingArguments("out", optim="adamw2", report_to=[]).optim == "adamw2"
missing = [wrap.target for wrap in listed()
           if wrap.made_by == ON_IMPORT and not is_in_place(wrap)
           and "step_post_hook" not in wrap.target]  # it comes with the first patch
assert not missing, missing
assert len({(wrap.target, wrap.made_by) for wrap in listed()}) == len(listed()), listed()
assert not any("_registering" in type(each).__module__ for each in sys.meta_path)
"""

FIRST = "import hf_stable; from transformers import TrainingArguments"
ORDERS = {
    "hf_stable last": "from transformers import TrainingArguments; import hf_stable",
    "the Trainer before": "from transformers import Trainer; import hf_stable",
    "an auto class after": "import hf_stable; from transformers import AutoConfig\n"
    "AutoConfig.for_model('hf_stable_gpt2')",
    "torch between": "import torch, hf_stable, torch.distributed, transformers; "
    "transformers.TrainingArguments",
    "peft after": "import hf_stable, peft",
    "peft before": "import peft, hf_stable",
    "accelerate after": "import hf_stable, accelerate; from transformers import AutoModel",
    "a module of ours": "from hf_stable.methods.patching import patch",
    "a face, then the Trainer": "import hf_stable.entropy; from transformers import Trainer",
    "everything": "from hf_stable import *; assert callable(patch)",
    "in a thread": "import hf_stable, threading\n"
    "def work():\n    from transformers import TrainingArguments\n"
    "thread = threading.Thread(target=work); thread.start(); thread.join()",
}

FORKS = """
import os, sys
import datasets, jinja2, scipy.optimize, torch._dynamo, torch.distributed.tensor
watched = {"accelerate", "hf_stable", "peft", "transformers"} & sys.modules.keys()
assert not watched, watched
for code in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(code, {})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs each argument in a fork of a process that has imported what transformers imports, and none
of the packages that hf_stable looks after: those take most of an import's time."""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_every_change_is_made_where_nothing_was_imported_before():
    done = run(f"{FIRST}\n{CHECK}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_change_is_made_in_any_order():
    # Of the last one, which fails, it is seen that a fork's failure shows.
    codes = [f"{order}\n{CHECK}" for order in (*ORDERS.values(), "import no_such_module")]
    done = run(FORKS, *codes)
    ends = dict(zip((*ORDERS, "a failure"), done.stdout.split(), strict=True))
    assert ends == dict.fromkeys(ORDERS, "0") | {"a failure": "1"}, done.stderr


def test_importing_takes_none_of_the_heavy_packages():
    heavy = "{'torch', 'transformers', 'accelerate', 'numpy', 'peft'} & sys.modules.keys()"
    done = run(f"import sys, hf_stable, hf_stable.commands.main; print({heavy})")
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.slow
def test_a_process_that_imports_nothing_reads_pickled_arguments(tmp_path):
    import torch

    torch.save(TrainingArguments("out", optim="adamw2", report_to=[]), tmp_path / "args.bin")
    read = "import sys, torch; print(torch.load(sys.argv[1], weights_only=False).optim == 'adamw2')"
    done = run(read + CHECK, tmp_path / "args.bin")
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_a_transformers_that_does_not_fit_is_said_at_its_import():
    lack = (
        "import sys, types\n"
        "import hf_stable\n"
        "sys.modules['transformers.trainer_optimizer'] = types.ModuleType('without handlers')\n"
        "from transformers.training_args import TrainingArguments\n"
    )
    done = run(lack)
    assert done.returncode == 1 and "hf_stable does not fit transformers" in done.stderr


def test_names_are_those_of_the_library():
    for name in hf_stable.__all__:
        assert getattr(hf_stable, name) is getattr(_library, name)
        assert name in dir(hf_stable)
    with pytest.raises(AttributeError, match="has no attribute 'ptach'"):
        _ = hf_stable.ptach
