"""The main job end to end, and that its verdict follows the figures in either direction."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_stable.commands.demo.course import run_demo
from hf_stable.commands.demo.parts import PARTS
from hf_stable.commands.demo.results import DemoResult, Reload
from hf_stable.commands.demo.runs import RunResult, run_folder
from hf_stable.report.reading import read_run
from hf_stable.report.summary import summarise

SIGMA_PART, ADAMW2_PART = PARTS
SAME_MODEL = Reload(
    accuracy=0.6,
    expected_accuracy=0.6,
    max_difference=1e-6,
    max_logit=5.0,
    key_problems=[],
    imported_hf_stable=False,
)


def demo_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hf_stable.commands.main", "demo", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def run_result(name, loss, accuracy):
    return RunResult(name, loss, accuracy, sigma=1.0, gamma=None, seconds=1.0)


def accuracy_at(loss):
    return math.exp(-loss) if math.isfinite(loss) else 0.1


def demo_result(*, losses=None, reload=SAME_MODEL, quick=False):
    """A result in which both challengers win, unless `losses` says otherwise by run."""
    losses = {
        "plain": 2.3,
        "sigmaReparam": 1.2,
        "AdamW": 1.9,
        "AdamW with warmup": 0.5,
        "AdamW2": 0.3,
        "AdamW at 1e-3": 0.2,
    } | (losses or {})
    runs = {
        part.title: [run_result(run.name, losses[run.name], accuracy_at(losses[run.name]))
                     for run in part.runs]
        for part in PARTS
    }  # fmt: skip
    return DemoResult(
        runs, reload, quick, seed=0, seconds=1.0, output="out", report="r", versions={}
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return demo_command("--quick", "--json", "--output", output), output


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_quick_demo_trains_saves_and_reloads(quick):
    done, output = quick
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] and result["reload"]["agrees"] and result["quick"]
    assert result == json.loads((output / "results.json").read_text())
    names = [[run["name"] for run in runs] for runs in result["runs"].values()]
    assert names == [[run.name for run in part.runs] for part in PARTS]
    gammas = {run["name"]: run["gamma"] for run in result["runs"][SIGMA_PART.title]}
    assert gammas["plain"] is None and gammas["sigmaReparam"] != 1.0  # it was trained
    assert "Training: AdamW2" in done.stderr and "Traceback" not in done.stderr
    page = (output / "report.html").read_text()
    assert result["report"] == str(output / "report.html")
    assert all(run_folder(run, output).name in page for part in PARTS for run in part.runs)
    for part in PARTS:
        for run, measured in zip(part.runs, result["runs"][part.title], strict=True):
            row = summarise(read_run(run_folder(run, output)))
            assert row.accuracy == measured["accuracy"]
            assert read_run(run_folder(run, output)).logged("test_loss") == [(4, measured["loss"])]
            assert f"<td>{row.accuracy:.1%}</td>" in page
    assert "train_runtime" in done.stderr  # the Trainer's own log lines, off the JSON's stream


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_what_is_told_of_the_patched_run_is_that_of_its_files(quick):
    done, output = quick
    found = json.loads(done.stdout)["runs"][SIGMA_PART.title][1]
    saved = load_file(output / "test_digits.safetensors")
    loss = torch.nn.functional.cross_entropy(saved["logits"], saved["labels"])
    hits = saved["logits"].argmax(-1) == saved["labels"]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(hits.float().mean().item(), rel=1e-6)
    state = load_file(output / "model" / "hf_stable_state.safetensors")
    gammas = {name.removesuffix(".gamma"): g for name, g in state.items() if "gamma" in name}
    assert found["gamma"] == min(gamma.min().item() for gamma in gammas.values())
    exact = {n: torch.linalg.svdvals(state[f"{n}.weight"].flatten(1))[0].item() for n in gammas}
    # What power iterations track in four steps at this rate is a little less than that.
    assert found["sigma"] == pytest.approx(min(exact.values()), rel=0.01)
    assert max(exact.values()) > 1.2 * min(exact.values())


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_saved_model_is_plain_and_knows_its_gamma(quick):
    _, output = quick
    weights = load_file(output / "model" / "model.safetensors")
    assert not any("gamma" in name or "sigma" in name for name in weights)
    assert (output / "model" / "hf_stable_state.safetensors").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_the_reload_script_notices_another_model(quick):
    done, output = quick
    found = json.loads(done.stdout)["reload"]
    weights = load_file(output / "model" / "model.safetensors")
    weights["classifier.weight"] *= 2
    save_file(weights, output / "model" / "model.safetensors", metadata={"format": "pt"})
    again = subprocess.run(
        [sys.executable, str(output / "reload.py")], capture_output=True, text=True, check=True
    )
    changed = json.loads(again.stdout)
    assert not changed["imported_hf_stable"] and not changed["key_problems"]
    assert found["max_difference"] < 1e-4 < 1e-2 < changed["max_difference"]
    assert not Reload(**changed, expected_accuracy=found["accuracy"], max_logit=1.0).agrees


def test_a_result_passes_only_if_both_challengers_win_and_the_reload_agrees():
    assert demo_result().passed
    assert not demo_result(losses={"sigmaReparam": 2.4}).passed
    assert not demo_result(losses={"AdamW2": 2.0}).passed
    assert not demo_result(losses={"AdamW2": float("nan")}).passed
    assert demo_result(losses={"AdamW": float("nan")}).passed
    different = Reload(0.6, 0.6, 0.1, 5.0, [], False)
    assert not demo_result(reload=different).passed
    for runs_lost in (True, False):
        losses = {"AdamW2": 2.0} if runs_lost else {}
        assert demo_result(losses=losses, quick=True).passed
        assert not demo_result(losses=losses, quick=True, reload=different).passed


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": 0.61},
        {"max_difference": 1e-2},
        {"max_difference": float("nan")},
        {"key_problems": ["classifier.weight"]},
        {"imported_hf_stable": True},
    ],
)
def test_a_reload_agrees_only_if_all_of_it_does(change):
    assert SAME_MODEL.agrees
    assert not Reload(**(vars(SAME_MODEL) | change)).agrees


def test_a_run_beats_another_by_loss_and_accuracy():
    good, bad, nan = (
        run_result("", loss, acc) for loss, acc in ((1, 0.6), (2, 0.2), (math.nan, 0.1))
    )
    assert good.beats(bad) and not bad.beats(good) and not good.beats(good)
    assert good.beats(nan) and not nan.beats(good) and not nan.beats(nan)
    assert not run_result("", 0.9, 0.5).beats(good)


def test_sentences_follow_the_figures_either_way():
    remark = "robustness to the rate, not a better optimum"
    usual = demo_result().findings
    assert usual[0].startswith("sigmaReparam (test loss 1.200") and " beats plain " in usual[0]
    assert " beats AdamW (" in usual[1]
    assert "AdamW with warmup (test loss 0.500" in usual[2] and "no better than" in usual[2]
    assert "AdamW at 1e-3" in usual[3] and "does better than AdamW2" in usual[3]
    assert remark in usual[3]
    assert "it is the same model" in usual[-1]
    other = demo_result(
        losses={"sigmaReparam": 2.4, "AdamW2": 2.0, "AdamW at 1e-3": 2.1},
        reload=Reload(0.5, 0.6, 0.1, 5.0, ["x.weight"], False),
    ).findings
    assert "does not beat plain" in other[0] and "does not beat AdamW (" in other[1]
    assert "does better than AdamW2." in other[2]
    assert "no better than" in other[3] and remark not in other[3]
    assert "NOT the same model" in other[-1] and "x.weight" in other[-1]
    assert len(demo_result(quick=True).findings) == 1


def test_json_has_no_nan():
    content = demo_result(losses={"plain": float("nan"), "AdamW": float("inf")}).to_dict()
    json.dumps(content, allow_nan=False)
    assert content["runs"][SIGMA_PART.title][0]["loss"] is None
    assert content["passed"] and content["reload"]["agrees"]


@pytest.mark.parametrize("package", ["datasets", "evaluate", "plotly", "sklearn"])
def test_a_missing_extra_says_what_to_install(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)  # what the import system takes for missing
    with pytest.raises(ModuleNotFoundError, match=r'needs .*pip install "hf-stable\[recipes\]"'):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_ends_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file.*choose a directory that can be written to"):
        run_demo(tmp_path / "file", quick=True, on_run=lambda run: pytest.fail("it trained"))
