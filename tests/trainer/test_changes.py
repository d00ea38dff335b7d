"""The closed list of what hf_stable changes in a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import transformers
from transformers import PreTrainedModel, Trainer

from hf_stable.commands.launch.attaching import LAUNCHER
from hf_stable.commands.preflight.child import PREFLIGHT
from hf_stable.trainer.changes import ON_IMPORT, listed
from hf_stable.trainer.deepspeed_engine import ON_DEEPSPEED
from hf_stable.trainer.plugin import register

try:
    import peft
except ImportError:  # the oldest versions are tested without it
    peft = None

TARGETS = {
    "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "transformers.modeling_utils:PreTrainedModel.from_pretrained",
    "torch.nn.modules.module:Module.load_state_dict",
    "transformers.modeling_utils:PreTrainedModel.push_to_hub",
    "transformers.modeling_utils:PreTrainedModel.resize_token_embeddings",
    "transformers.trainer:Trainer.push_to_hub",
    "transformers.trainer:Trainer._push_from_checkpoint",
    "transformers.trainer:Trainer.create_model_card",
    "transformers.trainer:Trainer._load_from_checkpoint",
    "transformers.trainer:Trainer._load_optimizer_and_scheduler",
    "transformers.trainer:Trainer._save",
    "transformers.trainer:Trainer._save_checkpoint",
    "transformers.trainer:Trainer._load_best_model",
    "transformers.trainer:Trainer.create_optimizer",
    "transformers.trainer:Trainer.get_decay_parameter_names",
    "transformers.trainer:Trainer.log",
    "transformers.trainer:Trainer.train",
    "transformers.trainer:Trainer.training_step",
    "transformers.trainer:get_last_checkpoint",
    "transformers.trainer_callback:PrinterCallback.on_log",
    "transformers.trainer_callback:ProgressCallback.on_log",
    "transformers.trainer:_parse_optim_args",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init",
    "torch.optim.lr_scheduler:LambdaLR.__init__",
    "torch.optim.lr_scheduler:MultiplicativeLR.__init__",
    "torch.optim.lr_scheduler:OneCycleLR.__init__",
    "torch.optim.lr_scheduler:CyclicLR.__init__",
    "torch.optim.lr_scheduler:ReduceLROnPlateau.__init__",
    "accelerate.accelerator:Accelerator.get_state_dict",
    "accelerate.accelerator:Accelerator.prepare",
    "peft.tuners.tuners_utils:BaseTuner.__init__",
    "peft.peft_model:PeftModel.__init__",
}


ADDED_TO = {
    "transformers.training_args:OptimizerNames",
    "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
    "transformers:AutoConfig.register",
    "torch.optim.optimizer:register_optimizer_step_post_hook",
}

DEEPSPEED_TARGETS = {
    "deepspeed.runtime.engine:DeepSpeedEngine.__init__",
    "deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint",
    "deepspeed.runtime.engine:DeepSpeedEngine.step",
}

LAUNCHER_TARGETS = {
    "torch.optim.optimizer:register_optimizer_step_pre_hook",
    "transformers.trainer:Trainer.__init__",
    "transformers.trainer:Trainer.train",
}

PREFLIGHT_TARGETS = {
    "transformers.training_args:TrainingArguments.__post_init__",
    "transformers.trainer:Trainer.__init__",
    "transformers.trainer:Trainer.train",
}

SNAPSHOT = """
import sys
import torch, transformers, transformers.trainer, transformers.modeling_utils
import torch.distributed.fsdp

def functions():
    seen = {}
    looked_at = ("torch.optim", "torch.nn", "torch.distributed.fsdp")
    for module in [m for n, m in sys.modules.items() if n.startswith(looked_at)
                   or n.split(".")[0] in ("accelerate", "transformers", "peft")]:
        for name, value in list(vars(module).items()):
            seen[module.__name__ + ":" + name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                for attribute, member in list(vars(value).items()):
                    seen[f"{module.__name__}:{name}.{attribute}"] = member
    return seen

before = functions()
import hf_stable
after = functions()
names = [name for name in before if before[name] is not None]  # None: what transformers fills late
print(sorted(name for name in names if after.get(name) is not before[name]))
new = after.keys() - before.keys()
print(sorted(n for n in new if ".ADAMW2" in n))
args = transformers.TrainingArguments("out", optim="adamw2", report_to="none", use_cpu=True)
print(args.optim.value)
"""


def test_the_list_is_pinned_and_says_why():
    by_maker = {
        maker: [wrap for wrap in listed() if wrap.made_by == maker]
        for maker in {wrap.made_by for wrap in listed()}
    }
    assert by_maker.keys() == {ON_IMPORT, ON_DEEPSPEED, LAUNCHER, PREFLIGHT}
    assert {wrap.target for wrap in by_maker[ON_IMPORT] if wrap.wrapper} == TARGETS
    assert {wrap.target for wrap in by_maker[ON_IMPORT] if not wrap.wrapper} == ADDED_TO
    assert {wrap.target for wrap in by_maker[LAUNCHER]} == LAUNCHER_TARGETS
    assert {wrap.target for wrap in by_maker[PREFLIGHT]} == PREFLIGHT_TARGETS
    assert {wrap.target for wrap in by_maker[ON_DEEPSPEED]} == DEEPSPEED_TARGETS
    others = len(DEEPSPEED_TARGETS) + len(LAUNCHER_TARGETS) + len(PREFLIGHT_TARGETS)
    assert len(listed()) == len(TARGETS | ADDED_TO) + others
    assert all(10 < len(wrap.reason) < 120 and "\n" not in wrap.reason for wrap in listed())


@pytest.mark.slow
def test_importing_changes_what_is_listed_and_nothing_else(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SNAPSHOT if peft is None else f"import peft\n{SNAPSHOT}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    changed, added, optim = result.stdout.splitlines()
    there = {target for target in TARGETS if peft or not target.startswith("peft.")}
    assert set(eval(changed)) == there
    assert eval(added) == ["transformers.training_args:OptimizerNames.ADAMW2"]
    assert optim == "adamw2"  # TrainingArguments was there before the plugin


def test_registering_again_changes_nothing():
    before = (Trainer.log, PreTrainedModel.save_pretrained, transformers.trainer.Trainer.log)
    num_names = len(list(transformers.training_args.OptimizerNames))
    register()
    assert (Trainer.log, PreTrainedModel.save_pretrained, Trainer.log) == before
    assert len(list(transformers.training_args.OptimizerNames)) == num_names
    assert not hasattr(Trainer.log.__wrapped__, "__wrapped__")


def changed_log(self, records):
    """A Trainer.log with another parameter."""


@pytest.mark.parametrize(
    ("replacement", "problem"),
    [(None, "has no attribute 'log'"), (changed_log, "has no parameter 'logs'")],
)
def test_another_transformers_gets_one_clear_error_and_no_change(replacement, problem, monkeypatch):
    monkeypatch.setattr(Trainer, "_load_best_model", Trainer._load_best_model.__wrapped__)
    if replacement is None:
        monkeypatch.delattr(Trainer, "log")
    else:
        monkeypatch.setattr(Trainer, "log", replacement)
    message = (
        rf"hf_stable does not fit transformers {transformers.__version__}: "
        rf"transformers\.trainer:Trainer\.log is not what it was \(.*{problem}\)"
    )
    with pytest.raises(ImportError, match=message):
        register()
    assert not hasattr(Trainer._load_best_model, "__wrapped__")
