"""Pushing to a Hub, by every way that transformers has, and the card that comes with a model."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import struct
import subprocess
import sys

import pytest
import torch
import transformers
from exported_cases import patched
from hub_stand_in import TOKEN, assert_published, card_of, files
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from tiny_models import tiny_model
from tiny_training import make_trainer

import hf_stable
from hf_stable._file_names import SIDECAR_FILE
from hf_stable.checkpoints.card_pictures import PICTURE_FILE, draw_curves
from hf_stable.checkpoints.model_cards import END, START, amend_card
from hf_stable.checkpoints.provenance import TrainingRecord, read_training, record_of
from hf_stable.checkpoints.saved_models import export_saved

METHODS = pytest.mark.parametrize("method", ["sigma", "sigma_no_norms"])


@METHODS
def test_push_to_hub(hub, method):
    model = patched("vit", "ViTForImageClassification", method)
    url = hf_stable.push_to_hub(model, "me/vit", private=True, commit_message="First")
    assert url == f"{hub.endpoint}/me/vit/commit/{hub.repos['me/vit'].sha}"
    assert_published(hub, "me/vit", model, with_norms=method == "sigma")
    assert hub.repos["me/vit"].visibility == "private"
    assert [commit["summary"] for commit in hub.repos["me/vit"].commits] == ["First"]
    assert 'from_pretrained("me/vit"' in card_of(hub, "me/vit").text


def test_the_token_is_used_and_a_refusal_is_an_error(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    model = patched("vit", "ViTForImageClassification", "sigma")
    with pytest.raises(HfHubHTTPError, match="401"):
        hf_stable.push_to_hub(model, "me/vit", token="hf_wrong")
    assert not hub.repos
    hf_stable.push_to_hub(model, "me/vit", token=TOKEN)
    assert "model.safetensors" in files(hub, "me/vit")


def test_a_second_push_keeps_what_the_owner_wrote_in_the_card(hub):
    model = patched("vit", "ViTForImageClassification", "sigma")
    hf_stable.push_to_hub(model, "me/vit")
    repo = hub.repos["me/vit"]
    card = repo.files["README.md"].decode()
    card = card.replace("---\n\n# vit", "license: mit\n---\n\n# My digits\n\nBy hand.")
    repo.files["README.md"] = (card + "\n## Limits\n\nDigits only.\n").encode()
    repo.commits.append({})
    other = patched("vit", "ViTForImageClassification", "sigma_no_norms")
    hf_stable.push_to_hub(other, "me/vit")
    card = card_of(hub, "me/vit")
    for text in ("# My digits", "By hand.", "Digits only.", "trust_remote_code=True"):
        assert card.text.count(text) == 1, text
    assert card.text.count(START) == card.text.count(END) == 1
    assert card.data.license == "mit"
    assert card.data.tags == ["hf_stable", "sigma_reparam", "remove_pre_layernorm"]


@pytest.mark.parametrize("sizes", [("50GB", "5KB"), ("5KB", "50GB")], ids=["split", "joined"])
def test_a_push_in_other_files_replaces_the_weights(hub, sizes):
    model = patched("vit", "ViTForImageClassification", "sigma_no_norms")
    hf_stable.push_to_hub(model, "me/vit", max_shard_size=sizes[0])
    hub.repos["me/vit"].files["model.fp16.safetensors"] = b"the owner's own"
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    hf_stable.push_to_hub(model, "me/vit", max_shard_size=sizes[1])
    weights = {name for name in files(hub, "me/vit") if "safetensors" in name}
    assert weights > {"model.fp16.safetensors"}
    assert ("model.safetensors" in weights) == (sizes[1] == "50GB") == (len(weights) == 2)
    loaded = transformers.AutoModelForImageClassification.from_pretrained("me/vit")
    torch.testing.assert_close(loaded.classifier.weight, model.classifier.weight)


def test_a_push_to_a_branch_amends_the_card_of_the_branch(hub):
    model = patched("vit", "ViTForImageClassification", "sigma")
    hf_stable.push_to_hub(model, "me/vit")
    hf_stable.push_to_hub(model, "me/vit", revision="dev")
    repo = hub.repos["me/vit"]
    for branch, text in (("main", "On main."), ("dev", "On dev.")):
        card = repo.branches[branch]["README.md"].decode()
        repo.branches[branch]["README.md"] = f"{card}\n{text}\n".encode()
    main = dict(repo.files)
    hf_stable.push_to_hub(model, "me/vit", revision="dev")
    card = repo.branches["dev"]["README.md"].decode()
    assert "On dev." in card and "On main." not in card
    assert repo.files == main


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT's own
def test_what_cannot_be_pushed_leaves_nothing_on_the_hub(hub):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(TypeError, match="merge_and_unload"):
        hf_stable.push_to_hub(peft.get_peft_model(tiny_model("gpt2"), config), "me/adapter")
    assert not hub.repos
    model = patched("vit", "ViTForImageClassification", "sigma")
    hf_stable.push_to_hub(model, "me/vit")
    hub.repos["me/vit"].files["README.md"] = b"---\n- a list\n---\n"
    hub.repos["me/vit"].commits.append({})
    with pytest.raises(ValueError, match="README.md of me/vit on the Hub is .* no model card"):
        hf_stable.push_to_hub(model, "me/vit")
    assert len(hub.repos["me/vit"].commits) == 2


@METHODS
def test_the_models_own_push_to_hub(hub, method):
    model = patched("vit", "ViTForImageClassification", method)
    model.push_to_hub("me/vit")
    assert_published(hub, "me/vit", model, with_norms=method == "sigma")


@METHODS
def test_save_pretrained_that_pushes_keeps_the_sidecar_here_only(hub, method, tmp_path):
    model = patched("vit", "ViTForImageClassification", method)
    model.save_pretrained(tmp_path / "vit", push_to_hub=True, repo_id="me/vit")
    assert (tmp_path / "vit" / SIDECAR_FILE).is_file()
    assert_published(hub, "me/vit", model, with_norms=method == "sigma")


@METHODS
def test_a_trainer_that_pushes(hub, method, tmp_path):
    model = patched("vit", "ViTForImageClassification", method)
    trainer = make_trainer(
        model.train(),
        tmp_path / "run",
        max_steps=2,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_strategy="every_save",
        hub_always_push=True,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()
    assert_published(hub, "me/run", model, with_norms=method == "sigma")
    assert hub.repos["me/run"].commits[-1]["summary"] == "End of training"
    first = hub.repos["me/run"].commits[1]
    assert first["summary"].startswith("Training in progress")
    assert ("modeling_hf_stable.py" in first["files"]) == (method != "sigma")
    assert (tmp_path / "run" / "checkpoint-2" / SIDECAR_FILE).is_file()
    card = card_of(hub, "me/run")
    assert {"generated_from_trainer", "hf_stable", "sigma_reparam"} <= set(card.data.tags)
    assert card.text.count("## Trained with hf_stable") == 1
    assert "### Training hyperparameters" in card.text


def test_a_checkpoint_that_is_pushed_to_be_continued_can_be(hub, tmp_path):
    model = patched("vit", "ViTForImageClassification", "sigma_no_norms").train()
    trainer = make_trainer(
        model,
        tmp_path / "run",
        max_steps=1,
        push_to_hub=True,
        hub_model_id="me/run",
        hub_strategy="checkpoint",
    )
    trainer.train()
    content = files(hub, "me/run")
    assert SIDECAR_FILE not in content
    folder = tmp_path / "fetched"
    for name, data in content.items():
        if name.startswith("last-checkpoint/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    loaded = hf_stable.load(transformers.ViTForImageClassification, folder / "last-checkpoint")
    assert hf_stable.is_patched(loaded)


def test_create_model_card_amends_the_card_of_a_patched_or_folded_model_only(tmp_path):
    for kind in ("plain", "patched", "folded"):
        model = tiny_model("vit")
        if kind != "plain":
            hf_stable.patch(model, "sigma_reparam", init="one")
        trainer = make_trainer(model, tmp_path / kind, max_steps=1, save_strategy="no")
        trainer.train()
        if kind == "folded":
            hf_stable.fold(model)
            assert not hf_stable.is_patched(model)
        trainer.create_model_card(model_name="digits", tags=["mine"])
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert ({"hf_stable", "sigma_reparam"} <= set(card.data.tags)) == (kind != "plain")
        assert (START in card.text) == (kind != "plain")
        assert "mine" in card.data.tags and "# digits" in card.text
        if kind != "plain":
            config = "`SigmaReparamConfig(init='one'"
            assert f"{'Patched' if kind == 'patched' else 'Trained'} with {config}" in card.text
            assert "### How to load it" in card.text and "ViTForImageClassification" in card.text
    # What is exported from the folded model says it too, and it is a plain model for pickle.
    hf_stable.export(model, tmp_path / "out")
    assert "Trained with `SigmaReparamConfig(" in (tmp_path / "out" / "README.md").read_text()
    assert b"SigmaReparamConfig" in (dumped := pickle.dumps(model))
    assert b"hf_stable.methods" not in dumped


def test_what_metadata_say_is_text_in_a_card():
    hostile = "x <!-- hf_stable: end --> <script>alert(1)</script> [a](http://b) `c` | d\n# e"
    training = TrainingRecord({hostile: hostile}, {hostile: 1.5}, [])
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    text = amend_card(None, model, name=f'me/a"{hostile}', training=training).text
    body = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)  # code is shown as it is
    assert text.count(START) == text.count(END) == 1 and "<script>" not in body
    assert not re.search(r"(?<!\\)\]\(http://b", body) and "\n# e" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\[a\\](http://b) \\`c\\` \\| d # e: x" in text
    assert r'from_pretrained("me/a\"x \u003c!--' in text and r"\n# e" in text
    # Our section is found again as a whole, and harmless texts stay as they are.
    again = amend_card(ModelCard(text), model, name="me/b", training=TrainingRecord({"a_b": "c_d"}))
    assert "script" not in re.sub(r"`[^`]*`", "", again.text.split("# ", 2)[2])
    assert "- a_b: c_d" in again.text


@pytest.mark.slow
def test_transformers_alone_loads_from_the_hub(hub, tmp_path):
    model = patched("gpt2", "GPT2LMHeadModel", "sigma_no_norms")
    hf_stable.push_to_hub(model, "me/gpt")
    ids = torch.tensor([[1, 2, 3]])
    script = (
        "import sys, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('me/gpt', "
        "trust_remote_code=True)\n"
        "import torch\n"
        "made = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)\n"
        "assert 'hf_stable' not in sys.modules\n"
        "print(made.tolist(), type(model).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        },
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    assert result.stdout.strip() == f"{tokens} HfStableGPT2LMHeadModel"


# The card


def trained_checkpoint(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.compute_metrics = lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())}
    trainer.train()
    return trainer, tmp_path / "checkpoint-2"


def test_the_card_quotes_what_the_trainer_left(tmp_path):
    trainer, checkpoint = trained_checkpoint(tmp_path / "run")
    record = read_training(checkpoint)
    last = [r for r in trainer.state.log_history if "eval_loss" in r][-1]
    assert record.metrics == {"loss": last["eval_loss"], "accuracy": last["eval_accuracy"]}
    assert record.settings["optimizer steps"] == 2
    assert record.settings["peak learning rate"] == pytest.approx(1e-2)
    hf_stable.export(trainer.model, tmp_path / "out", checkpoint=checkpoint)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.metrics == ["accuracy"]
    assert f"{last['eval_loss']:.4g}" in card.text and "optimizer steps: 2" in card.text
    # Of a folder, it is what lies in the folder.
    export_saved(checkpoint, tmp_path / "saved")
    assert settings_in(tmp_path / "saved") == settings_in(tmp_path / "out") != []
    with pytest.raises(FileNotFoundError, match="no training to quote"):
        hf_stable.export(trainer.model, tmp_path / "typo", checkpoint=tmp_path / "checkpoint-3")
    assert not (tmp_path / "typo").exists()


def settings_in(folder):
    """The lines below "Training" of a folder's card."""
    text = (folder / "README.md").read_text().partition("### Training\n")[2]
    return [line for line in text.partition("###")[0].splitlines() if line]


def test_a_trained_model_knows_its_own_training(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    trainer = make_trainer(
        model,
        tmp_path / "run",
        max_steps=4,
        optim="adamw2",
        optim_args="tau=0.02",
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        callbacks=[hf_stable.StabilityCallback(every=1)],
    )
    trainer.train()
    metrics = trainer.evaluate()  # joins the record, as it joins the Trainer's log
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each, name in ((model, "out"), (copied, "copied")):
        hf_stable.export(each, tmp_path / name)
        assert settings_in(tmp_path / name) == [
            "- optimizer: adamw2",
            "- optimizer options: tau=0.02",
            "- betas, epsilon: 0.9, 0.999, 1e-08",
            "- learning rate: 0.01",
            "- weight decay: 0.1",
            "- learning rate schedule: cosine over 4 steps",
            "- warmup steps: 2",
            "- batch size: 8 x 2 accumulated x 1 process",
            "- gradients clipped at norm: 1",
            "- precision: float32",
            "- seed: 3",
            "- optimizer steps: 4",
            f"- epochs: {trainer.state.epoch:.4g}",
            "- peak learning rate: 0.01",
        ]
        text = (tmp_path / name / "README.md").read_text()
        assert f"{metrics['eval_loss']:.4g}" in text and f"]({PICTURE_FILE})" in text
    export_saved(tmp_path / "run" / "checkpoint-4", tmp_path / "saved")
    assert settings_in(tmp_path / "saved") == settings_in(tmp_path / "out")
    model.save_pretrained(tmp_path / "by hand")
    found = {file.name: file.read_bytes() for file in (tmp_path / "by hand").iterdir()}
    sidecar = found.pop(SIDECAR_FILE)
    assert b"tau=0.02" in sidecar and not any(b"tau=0.02" in content for content in found.values())


def test_no_card_quotes_the_training_of_another_model(tmp_path):
    """A model that goes on from a checkpoint is not what the checkpoint's Trainer trained."""
    _, checkpoint = trained_checkpoint(tmp_path / "first")
    loaded = hf_stable.load(transformers.ViTForImageClassification, checkpoint)
    hf_stable.export(loaded, tmp_path / "loaded")
    assert settings_in(tmp_path / "loaded") == []
    make_trainer(
        loaded.train(), tmp_path / "second", max_steps=3, save_strategy="no", learning_rate=0.5
    ).train()
    hf_stable.export(loaded, tmp_path / "out")
    lines = settings_in(tmp_path / "out")
    assert "- optimizer steps: 3" in lines and "- learning rate: 0.5" in lines
    # Trained again when it is plain, and cut short: that is what is quoted then.
    plain = hf_stable.fold(loaded)
    trainer = make_trainer(plain, tmp_path / "third", max_steps=4, save_strategy="no")
    trainer.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert record_of(plain).settings["optimizer steps"] == 0
    untouched = tiny_model("vit")
    make_trainer(untouched, tmp_path / "plain", max_steps=1, save_strategy="no").train()
    assert record_of(untouched).settings == {}


def test_an_optimizer_that_was_handed_over_is_not_described_by_the_arguments(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    trainer = make_trainer(model, tmp_path, max_steps=1, save_strategy="no")
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer.train()
    settings = record_of(model).settings
    assert settings["optimizer"] == "SGD, handed to the Trainer"
    assert not {"learning rate", "weight decay", "betas, epsilon"} & settings.keys()


@pytest.mark.parametrize("methods", [["sigma_reparam"], ["remove_pre_layernorm"]])
def test_the_base_model_comes_through_checkpoints_and_is_never_a_folder(methods, tmp_path):
    def base_of(folder):
        return ModelCard.load(folder / "README.md").data.base_model

    for base in ("google/vit-base-patch16-224", "vit", str(tmp_path), "no id/at all"):
        model = hf_stable.patch(tiny_model("vit"), methods)
        model.config._name_or_path = base
        model.save_pretrained(tmp_path / "saved")
        loaded = hf_stable.load(transformers.ViTForImageClassification, tmp_path / "saved")
        assert loaded.name_or_path == str(
            tmp_path / "saved"
        )  # what PEFT takes for an adapter's base
        loaded.save_pretrained(tmp_path / "again")
        export_saved(tmp_path / "again", tmp_path / "out")
        expected = base if base in ("google/vit-base-patch16-224", "vit") else None
        assert base_of(tmp_path / "out") == expected
        (tmp_path / "out" / "README.md").unlink()


def png_size(path):
    """Width and height of a PNG file."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_the_card_shows_loss_and_entropy(tmp_path):
    model = hf_stable.patch(tiny_model("vit"), "sigma_reparam")
    trainer = make_trainer(
        model, tmp_path / "run", max_steps=2, callbacks=[hf_stable.StabilityCallback(every=1)]
    )
    trainer.train()
    hf_stable.export(model, tmp_path / "out", checkpoint=tmp_path / "run" / "checkpoint-2")
    shown = f"]({PICTURE_FILE})"
    assert (tmp_path / "out" / "README.md").read_text().count(shown) == 1
    width, height = png_size(tmp_path / "out" / PICTURE_FILE)
    # Exported again without a record of the training, the card shows no picture of it.
    loaded = hf_stable.load(type(model), tmp_path / "run" / "checkpoint-2")
    hf_stable.export(loaded, tmp_path / "out")
    assert shown not in (tmp_path / "out" / "README.md").read_text()
    # Without the monitor there is one panel: the loss.
    history = [
        {k: v for k, v in r.items() if "stability" not in k} for r in trainer.state.log_history
    ]
    assert draw_curves(history, tmp_path) == PICTURE_FILE
    assert png_size(tmp_path / PICTURE_FILE) == (width // 2, height)
    trainer.create_model_card()
    assert shown in (tmp_path / "run" / "README.md").read_text()
    assert png_size(tmp_path / "run" / PICTURE_FILE) == (width, height)


@pytest.mark.parametrize(
    "history", [[], [{"step": 1, "loss": 1.0}], [{"step": i, "loss": math.nan} for i in range(9)]]
)
def test_no_picture_of_nothing(history, tmp_path):
    assert draw_curves(history, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    history = [{"step": step, "loss": 1.0} for step in range(3)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(history, tmp_path) is None
    monkeypatch.undo()
    assert draw_curves(history, tmp_path) == PICTURE_FILE


def test_the_header_of_a_new_card(tmp_path):
    model = patched("gpt2", "GPT2LMHeadModel", "sigma_no_norms")
    model.config._name_or_path = "openai-community/gpt2"
    hf_stable.export(model, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "tags": ["hf_stable", "sigma_reparam", "remove_pre_layernorm"],
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
    }


def test_an_existing_card_in_the_folder_is_kept_and_amended(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nlibrary_name: keras\ntags: [mine]\npipeline_tag: depth-estimation\n"
        "---\n# Title\n\nText.\n"
    )
    hf_stable.export(patched("vit", "ViTForImageClassification", "sigma"), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "keras"
    assert card.data.pipeline_tag == "depth-estimation"
    assert card.data.tags == ["mine", "hf_stable", "sigma_reparam"]
    assert card.text.startswith("# Title\n\nText.\n")
    assert "Trained with hf_stable" in card.text


def test_the_card_says_what_was_done_and_with_what(tmp_path):
    model = patched("bert", "BertForMaskedLM", "sigma_no_norms")
    text = amend_card(None, model, name="me/bert").text
    for part in (
        "`output.LayerNorm` of every `BertLayer`",
        "`LayerNorm` of every `BertEmbeddings`",
        "RemoveLayerNormConfig(scope='all')",
        "SigmaReparamConfig(init='spectral'",
        f"hf_stable {hf_stable.__version__}",
        f"transformers {transformers.__version__}",
        f"torch {torch.__version__}",
        "arxiv.org/abs/2303.06296",
        "arxiv.org/abs/2505.21910",
    ):
        assert part in text, part


@pytest.mark.parametrize("method", ["sigma", "no_norms_in_blocks"])
@pytest.mark.parametrize(
    ("model_type", "head"),
    [("gpt2", "GPT2LMHeadModel"), ("gpt2", "GPT2DoubleHeadsModel"), ("vit", "ViTModel")],
)
def test_the_code_in_the_card_runs(model_type, head, method, tmp_path, monkeypatch):
    model = patched(model_type, head, method)
    hf_stable.export(model, tmp_path / "exported")
    text = (tmp_path / "exported" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert type(names["model"]).__name__.removeprefix("HfStable") == head
    assert names["model"].state_dict().keys() == {
        key for key in model.state_dict() if not key.endswith(("gamma", "sigma", "_u", "_v"))
    }
