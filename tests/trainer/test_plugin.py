"""The closed list of what importing hf_stable changes, and each change that has no own file."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_stable.commands.launch.launcher import LAUNCHER
from tiny_models import add_adapter, tiny_batch, tiny_model
from tiny_training import dropout_model, make_trainer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel, Trainer, TrainerCallback

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.trainer.changes import ON_IMPORT, listed
from hf_stable.trainer.plugin import register

try:
    import peft
except ImportError:  # the oldest versions are tested without it
    peft = None

TARGETS = {
    "transformers.modeling_utils:PreTrainedModel.save_pretrained",
    "transformers.modeling_utils:PreTrainedModel.push_to_hub",
    "transformers.modeling_utils:PreTrainedModel.resize_token_embeddings",
    "transformers.trainer:Trainer.push_to_hub",
    "transformers.trainer:Trainer._push_from_checkpoint",
    "transformers.trainer:Trainer.create_model_card",
    "transformers.trainer:Trainer._load_from_checkpoint",
    "transformers.trainer:Trainer._load_optimizer_and_scheduler",
    "transformers.trainer:Trainer._save_checkpoint",
    "transformers.trainer:Trainer._load_best_model",
    "transformers.trainer:Trainer.get_decay_parameter_names",
    "transformers.trainer:Trainer.log",
    "transformers.trainer:Trainer.train",
    "transformers.trainer:Trainer.training_step",
    "transformers.trainer:get_last_checkpoint",
    "transformers.trainer:_parse_optim_args",
    "peft.tuners.tuners_utils:BaseTuner.__init__",
    "peft.peft_model:PeftModel.__init__",
}
ADDED_TO = {
    "transformers.training_args:OptimizerNames",
    "transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
    "transformers:AutoConfig.register",
    "torch.optim.optimizer:register_optimizer_step_post_hook",
}

LAUNCHER_TARGETS = {
    "transformers.trainer:Trainer.__init__",
    "transformers.trainer:Trainer.train",
}

SNAPSHOT = """
import sys
import torch, transformers, transformers.trainer, transformers.modeling_utils

def functions():
    seen = {}
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] in ("transformers", "peft")
                   or n.startswith("torch.optim")]:
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
print(sorted(name for name in after.keys() - before.keys() if ".ADAMW2" in name))
args = transformers.TrainingArguments("out", optim="adamw2", report_to="none", use_cpu=True)
print(args.optim.value)
"""


def test_the_list_is_pinned_and_says_why():
    by_maker = {
        maker: [wrap for wrap in listed() if wrap.made_by == maker]
        for maker in {wrap.made_by for wrap in listed()}
    }
    assert by_maker.keys() == {ON_IMPORT, LAUNCHER}
    assert {wrap.target for wrap in by_maker[ON_IMPORT] if wrap.wrapper} == TARGETS
    assert {wrap.target for wrap in by_maker[ON_IMPORT] if not wrap.wrapper} == ADDED_TO
    assert {wrap.target for wrap in by_maker[LAUNCHER]} == LAUNCHER_TARGETS
    assert len(listed()) == len(TARGETS | ADDED_TO) + len(LAUNCHER_TARGETS)
    assert all(10 < len(wrap.reason) < 120 and "\n" not in wrap.reason for wrap in listed())


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


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw2"])
def test_gamma_is_never_decayed(model_type, optim, tmp_path):
    model = hf_stable.patch(tiny_model(model_type), "sigma_reparam")
    assert_gammas_undecayed(model, tmp_path, optim)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw2"])
def test_gamma_of_a_block_wrapped_for_checkpointing_is_never_decayed(optim, tmp_path):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    model.transformer.h[1] = checkpoint_wrapper(model.transformer.h[1])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert_gammas_undecayed(model, tmp_path, optim)


def assert_gammas_undecayed(model, folder, optim):
    trainer = make_trainer(model, folder, optim=optim, weight_decay=0.1)
    trainer.create_optimizer()
    decay = {
        id(param): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for param in group["params"]
    }
    layers = [m for m in model.modules() if hasattr(m, "gamma")]
    assert layers
    assert {decay[id(layer.gamma)] for layer in layers} == {0.0}
    assert {decay[id(layer.weight)] for layer in layers} == {0.1}


class Pending(TrainerCallback):
    """Holds one value per step, as a monitor does."""

    def __init__(self) -> None:
        self.pending: dict[str, float] = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.pending = {"stability/step": float(state.global_step)}

    def take_pending_logs(self) -> dict[str, float]:
        taken, self.pending = self.pending, {}
        return taken


def test_pending_values_join_the_record_of_their_step(tmp_path):
    trainer = make_trainer(
        tiny_model("vit"), tmp_path, callbacks=[Pending()], save_strategy="no", max_steps=4,
        logging_steps=2,
    )  # fmt: skip
    output = trainer.train()
    records = [r for r in trainer.state.log_history if "stability/step" in r]
    assert [(r["step"], r["stability/step"]) for r in records] == [(2, 2.0), (4, 4.0)]
    assert all("loss" in record and "epoch" in record for record in records)
    assert "epoch" in output.metrics and "stability/step" not in output.metrics


def test_pending_values_stay_out_of_the_callers_metrics(tmp_path):
    callback = Pending()
    trainer = make_trainer(tiny_model("vit"), tmp_path, callbacks=[callback], save_strategy="no")
    trainer.state.epoch = 0.5
    callback.pending = {"stability/step": 7.0}
    metrics = trainer.evaluate()
    assert "stability/step" not in metrics and metrics["epoch"] == 0.5
    assert trainer.state.log_history[-1]["stability/step"] == 7.0


# PEFT (whose release reads a name that this transformers deprecates)

NEEDS_PEFT = pytest.mark.skipif(peft is None, reason="needs the package peft")
PEFTS_OWN = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def lora(**options):
    return peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, **options)


WAYS_TO_ADAPT = {
    "get_peft_model": lambda model: peft.get_peft_model(model, lora()),
    "inject_adapter_in_model": lambda model: peft.inject_adapter_in_model(lora(), model),
    "add_adapter": lambda model: add_adapter(model, lora()),
    "dora": lambda model: peft.get_peft_model(model, lora(use_dora=True)),
    "mixed": lambda model: peft.get_peft_model(model, lora(), mixed=True),
}


def with_prompts(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


@NEEDS_PEFT
@PEFTS_OWN
@pytest.mark.parametrize("inject", WAYS_TO_ADAPT.values(), ids=WAYS_TO_ADAPT)
def test_adapters_on_an_unfolded_model_are_refused(inject):
    model = hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"reparametrised.*hf_stable\.fold\(model\) first"):
        inject(model)
    assert [name for name, _ in model.named_modules()] == names


@NEEDS_PEFT
@PEFTS_OWN
@pytest.mark.parametrize(
    "inject", [*WAYS_TO_ADAPT.values(), with_prompts], ids=[*WAYS_TO_ADAPT, "prompts"]
)
def test_adapters_where_norms_were_removed_in_this_process_are_refused(inject):
    model = hf_stable.patch(tiny_model("gpt2"), "remove_pre_layernorm")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"4 LayerNorms.*hf_stable\.export\), load that folder"):
        inject(model)
    assert [name for name, _ in model.named_modules()] == names


@NEEDS_PEFT
@PEFTS_OWN
def test_folded_model_takes_an_adapter_and_merges_right():
    model = hf_stable.fold(hf_stable.patch(tiny_model("gpt2"), "sigma_reparam")).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        plain = model(**batch).logits
        adapted = peft.get_peft_model(model, lora(init_lora_weights=False)).eval()
        with_adapter = adapted(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-3


# Publishing


class Hub:
    """Stands in for the Hub: remembers which files of a folder were there to be uploaded."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.repo_id = "me/model"

    def create_repo(self, *args, **kwargs):
        return self

    def create_commit(self, repo_id, operations, **kwargs):
        self.files = {operation.path_in_repo for operation in operations}
        return self

    def upload_folder(self, folder_path, **kwargs):
        self.files = set(os.listdir(folder_path))
        return self


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    card = SimpleNamespace(save=lambda path: None)
    for module in (transformers.utils.hub, transformers.modeling_utils, transformers.trainer):
        monkeypatch.setattr(module, "hf_api", lambda *args, **kwargs: hub)
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: card)
    return hub


def test_saving_with_push_uploads_no_sidecar(hub, tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files
    assert (tmp_path / "model" / SIDECAR_FILE).is_file()
    hub.files.clear()
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert SIDECAR_FILE not in hub.files


def test_pushing_a_model_uploads_no_sidecar(hub):
    hf_stable.patch(tiny_model("vit"), "sigma_reparam").push_to_hub("me/model")
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files


def test_pushing_from_the_trainer_uploads_no_sidecar(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "create_model_card", lambda *args, **kwargs: None)
    model = hf_stable.patch(dropout_model("vit"), "sigma_reparam")
    trainer = make_trainer(model, tmp_path, save_steps=2, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / SIDECAR_FILE).is_file()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files and SIDECAR_FILE not in hub.files
    assert (tmp_path / "checkpoint-2" / SIDECAR_FILE).is_file()
