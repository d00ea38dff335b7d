"""What hf_stable changes where the Trainer trains: no decay of gamma, pending values."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model
from tiny_training import make_trainer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainerCallback

import hf_stable

try:
    import peft
except ImportError:  # the oldest versions are tested without it
    peft = None


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
