"""Write recipes/scale.md: what steps cost on many GPUs, and how far the cost model is right here.

hf-stable bench scale --output recipes/scale.json   # measures, on this machine
python recipes/scale.py                             # works out the rest, writes the page
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_stable.commands.bench.planning import Plan, make_plan

HERE = Path(__file__).resolve().parent
MODELS = ("gpt2-xl", "vit-g", "7b")
GPUS = (8, 64, 512)
TOKENS = 1 << 21
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SHARED = ("7b", 64)

INTRODUCTION = f"""\
# Past one machine

What hf_stable adds to a training step of big models, from the shapes of their weights
(`hf-stable bench --plan MODEL --gpus N --tokens N`). {TOKENS:,} tokens a step over all GPUs, FSDP2,
float32 master weights gathered in bfloat16. This page is written by `python recipes/scale.py`.

Counted, and held against real runs by tests: flops (torch's own counter), the optimizer's state,
collectives and their sizes (real processes). Counted by hand: bytes moved, as so many passes over
the weights; the table of times below is their check. Assumed, and measured by nobody here: the rates
of an H100 (40 % of its peak in bfloat16, 80 % of its memory's and its network's bandwidth, 30
microseconds for a collective, 5 for a kernel). Nothing of ours is taken to overlap with anything.

| model | GPUs | model, TFLOP | gathered and reduced, GB | AdamW2: moved, GB | its all-reduces | sigmaReparam: moved, GB | its all-reduces | step with AdamW, ms | AdamW2 | sigmaReparam |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501 - a row of a table cannot be broken

READING = """\

Flops, bytes moved and TFLOP are of one GPU; a collective's size is that of the whole tensor.

- Under FSDP2 a power iteration costs one all-reduce for all matrices together, whatever their
  number: rows stay where they are, only vectors travel. Under DDP nothing is exchanged at all, and
  every GPU does the whole of the optimizer's work.
- What does not shrink with more GPUs is the number of kernels: two per matrix and iteration. On
  512 GPUs that, not bandwidth, is what AdamW2 costs. A CUDA graph or torch.compile around the
  optimizer's step would take most of it away; neither is tried here.
- Memory: AdamW2 holds two vectors per matrix beside AdamW's moments and, while it steps, one copy
  of the shard.

## The same under each strategy

What a step of {model} exchanges on {gpus} GPUs. The counts of ZeRO are those of DeepSpeed 0.19.8 at
its default sizes, and tests compare them with real engines of two processes. An all-reduce sends
what it has twice.

{strategies}

- ZeRO 1 and 2 cut few matrices, so that AdamW2 exchanges little. The refresh of sigma is the
  work of every GPU there.
- Under ZeRO 3 each gamma comes in an all-gather of its own after the step, like every small
  parameter. Their latency is what sigmaReparam costs there.
- At a step that is probed the monitor exchanges {probe}.

## How far the model is right

The rates of one machine are fitted at the sizes marked so, all parts together, and predict the
others by the sum that the plans above use: one process, forward and backward, then each part alone;
what two processes exchange over gloo; medians of alternated rounds (`hf-stable bench scale`).

"""


def row(plan: Plan) -> str:
    """Return a plan as a row of the table."""

    def exchanged(part: str) -> str:
        return ", ".join(
            f"{c.count} of {c.bytes / 1e6:.1f} MB" for c in plan.costs[part].collectives
        )

    moved = sum(each.bytes for each in plan.costs["model"].collectives)
    cells = (
        plan.model,
        plan.num_processes,
        f"{plan.costs['model'].flops / 1e12:.3g}",
        f"{moved / 1e9:.3g}",
        f"{plan.costs['AdamW2'].moved / 1e9:.3g}",
        exchanged("AdamW2"),
        f"{plan.costs['sigmaReparam'].moved / 1e9:.3g}",
        exchanged("sigmaReparam"),
        f"{1e3 * plan.plain:.0f}",
        f"{plan.adamw2 / plan.plain:.3f} x",
        f"{plan.sigma_reparam / plan.plain:.3f} x",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def strategy_table() -> str:
    """Return a table of what a step exchanges, with a row for each strategy."""
    head = (
        "| strategy | the step itself | AdamW2 more | sigmaReparam more | AdamW2 | sigmaReparam |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for strategy in STRATEGIES:
        plan = make_plan(SHARED[0], num_processes=SHARED[1], tokens=TOKENS, strategy=strategy)
        cells = (
            strategy,
            *(exchanges(plan, part) for part in ("model", "AdamW2", "sigmaReparam")),
            f"{plan.adamw2 / plan.plain:.3f} x",
            f"{plan.sigma_reparam / plan.plain:.3f} x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exchanges(plan: Plan, part: str) -> str:
    """Return the number and size of the collectives of a part, by their kind."""
    found: dict[str, tuple[int, float]] = {}
    for each in plan.costs[part].collectives:
        count, size = found.get(each.kind, (0, 0.0))
        found[each.kind] = count + each.count, size + each.bytes
    words = [
        f"{n} {kind} of {size / 1e6:,.1f} MB" if size >= 1e5 else f"{n} {kind} of less than 0.1 MB"
        for kind, (n, size) in found.items()
    ]
    return ", ".join(words) or "nothing"


def page() -> str:
    """Return the page, from plans and from recipes/scale.json."""
    plans = [
        make_plan(model, num_processes=gpus, tokens=TOKENS) for model in MODELS for gpus in GPUS
    ]
    measured = json.loads((HERE / "scale.json").read_text())
    machine, results = measured["machine"], measured["results"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{measured['rounds']} rounds:\n\n",
        "| part | size | measured, ms | predicted, ms | error | |\n|---|---|---|---|---|---|\n",
    ]
    for each in results:
        lines.append(
            f"| {each['part']} | {each['size']} | {1e3 * each['measured']:.2f} | "
            f"{1e3 * each['predicted']:.2f} | {each['error']:+.0%} | "
            f"{'fitted' if each['fitted'] else ''} |\n"
        )
    worst = max((r for r in results if not r["fitted"]), key=lambda r: abs(r["error"]))
    lines.append(
        f"\nThe largest error at a size that was not fitted is {worst['error']:+.0%} "
        f"({worst['part']}, {worst['size']}).\n"
    )
    shared = make_plan(SHARED[0], num_processes=SHARED[1], tokens=TOKENS)
    reading = READING.format(
        model=SHARED[0], gpus=SHARED[1], strategies=strategy_table(),
        probe=exchanges(shared, "probe"),
    )  # fmt: skip
    return INTRODUCTION + "".join(map(row, plans)) + reading + "".join(lines)


def main() -> None:
    """Write the page."""
    (HERE / "scale.md").write_text(page())


if __name__ == "__main__":
    main()
