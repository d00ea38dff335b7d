"""Folders as a run leaves them, made from numbers; the format is that of a real run."""

from __future__ import annotations

import json
import math
import re

from hf_stable.monitor.log_file import StabilityLog
from hf_stable.monitor.terms import names_of

FALLING = [2.0 * 0.98**s + 0.1 for s in range(100)]
"""Losses of a run in which all is well."""

LAYERS = ("vit.layers.0", "vit.layers.1")


def energy_curve(share):
    """SEC(16, s) at s = 1, 2, 4, 8, 16 of a head that has this share at 4."""
    return [share * 0.6, share * 0.8, share, (1 + share) / 2, share / share]


def calm(step: int, num_layers: int = 2, num_heads: int = 2, **head):
    """What a probe records of healthy layers; `head` replaces values of layer 0, head 0."""
    values = dict(entropy=2.5, entropy_normalised=0.9, rank=0.9, sigma_qk=1.0, sec=0.5)
    quantities = {}
    for name, value in values.items():
        quantities[name] = {f"vit.layers.{i}": [value] * num_heads for i in range(num_layers)}
        if name in head:
            quantities[name]["vit.layers.0"][0] = head[name]
    quantities["sec_curve"] = {
        layer: energy_curve(max(heads)) for layer, heads in quantities["sec"].items()
    }
    modes = {f"vit.layers.{i}": ["normal"] * num_heads for i in range(num_layers)}
    return quantities | {"mode": modes}


def write_run(
    folder, losses, probes=None, events=(), *, every=1, interrupted_at=None, **options
):  # fmt: skip
    """Write trainer_state.json and stability.jsonl.

    Args:
        losses: by step from 1 on; NaN is written as the Trainer writes it.
        probes: quantities by step.
        events: (event, step, values).
        every: steps between two records of the Trainer.
        interrupted_at: number of the steps that were planned, if the run did not come to them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    history = [
        {"step": s, "epoch": s / 10, "loss": x, "learning_rate": 1e-3, "grad_norm": 1.0}
        for s, x in enumerate(losses, start=1)
        if s % every == 0
    ]
    history.append({"step": len(losses), "eval_loss": 1.0, "eval_accuracy": 0.5})
    if interrupted_at is None:
        history.append({"step": len(losses), "train_runtime": 83.0})
    monitor = {"StabilityCallback": {"args": options, "attributes": {}}}
    planned = interrupted_at or len(losses)
    state = {
        "global_step": len(losses), "max_steps": planned, "log_history": history,
        "stateful_callbacks": monitor,
    }  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(state))
    log = StabilityLog(folder)
    for step, quantities in (probes or {}).items():
        loss = losses[step - 1]
        values = {"loss": loss if math.isfinite(loss) else None, "quantities": quantities}
        log.write("probe", 0, step, values | {"nonfinite_steps": 0})
    for event, step, values in events:
        log.write(event, 0, step, values)
    return folder


def collapsing(folder, *, malignant=True, lost=True, **options):
    """A run whose layer 0, head 0 collapses at step 60, and whose loss is lost some steps later."""
    losses = [2.0 * 0.98**s + 0.1 for s in range(80)]
    losses += [4.0] * 60 if lost else [0.4 * 0.99**s for s in range(60)]
    probes = {}
    for step in range(10, 141, 10):
        head = {}
        if step >= 60:
            head = dict(
                entropy=0.2, entropy_normalised=0.07, rank=0.04 if malignant else 0.95,
                sigma_qk=40.0, sec=0.995,
            )  # fmt: skip
        probes[step] = calm(step, **head)
    alarm = {
        "kind": "collapse", "layer": LAYERS[0], "head": 0, "quantity": "growth of sigma_qk",
        "value": 40.0, "threshold": 4.0, "reason": "because", "advice": "try",
    }  # fmt: skip
    return write_run(folder, losses, probes, [("alarm", 80, alarm)] if lost else [], **options)


def small_maps(num_layers=2, num_heads=2, shift=0):
    rows = [[1.0 if j == (i + shift) % 4 else 0.0 for j in range(4)] for i in range(4)]
    return {"maps": {f"vit.layers.{i}": [rows] * num_heads for i in range(num_layers)}}


def alarm(reason="because", **values):
    found = {
        "kind": "collapse", "layer": LAYERS[0], "head": 0, "quantity": "growth of sigma_qk",
        "value": 40.0, "threshold": 4.0, "reason": reason,
        "advice": "lower the learning rate, warm it up, or use optim='adamw2'; "
        "hf_stable.patch(model, 'sigma_reparam') bounds what grows here",
    }  # fmt: skip
    return found | values


def going_back(folder, *, steps=((10, 30, 50), (50, 90)), alarm_at=(0, 50), num_layers=12):
    """A run with probes and maps at the steps of each attempt, and an alarm."""
    write_run(folder, FALLING)
    log = StabilityLog(folder)
    for attempt, own in enumerate(steps):
        if attempt:
            back = {"to_step": own[0] - 1, "lr_scale": 0.5}
            log.write("rollback", attempt - 1, steps[attempt - 1][-1], back)
        for step in own:
            maps = small_maps(num_layers, shift=step // 10 + attempt)
            log.write("probe", attempt, step, {"quantities": calm(step, num_layers) | maps})
            if (attempt, step) == alarm_at:
                log.write("alarm", attempt, step, alarm())
    return folder


def payload_of(page, name="payload"):
    text = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)[1]
    return json.loads(text)


def deep_probe(step, side, num_layers=12, num_heads=12):
    """All that a probe of twelve layers records, with maps."""
    quantities = calm(step, num_layers, num_heads, sigma_qk=1 + step / 5000)
    layers = list(quantities["mode"])
    for i, name in enumerate(names_of()):
        if name not in quantities:
            per_head = name in ("entropy_bound", "sigma_ov", "stable_rank")
            value = 1.0 + math.sin(step * (i + 1))
            quantities[name] = {layer: [value] * num_heads if per_head else value
                                for layer in layers}  # fmt: skip
    rows = [[round(abs(math.sin(i * j + step)), 4) for j in range(side)] for i in range(side)]
    return quantities | {"maps": dict.fromkeys(layers, [rows] * num_heads)}
