"""What is monitored, term by term: the one place that describes a quantity, and nothing else does.

A new quantity is described here and measured in one function of the recorder or of `block_terms`.
Its log keys, its line in the documentation, how processes combine it, which of its values is the
worst, its charts in a report and whether `terms=` may name it all follow from its `Term`.

The report reads this file and imports no torch, so nothing here may.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "MODES",
    "SEC_VALUES",
    "TERMS",
    "UNUSED_SHARE",
    "Need",
    "Term",
    "find_term",
    "names_of",
    "table",
]

SEC_VALUES = 4
"""How many singular values of Wq^T Wk count as dominant: the paper's SEC(d_q, 4)."""

UNUSED_SHARE = 0.99
"""A head whose entropy is at least this share of log T looks everywhere alike: it is not used."""

Need = Literal["attention", "weights", "tokens"]
"""What has to be seen: calls of transformers' attention interface; the weights of a registered
architecture's blocks; what enters these blocks."""

Combine = Literal["mean", "norm", "gradient norm", "sum", "worst mode", "first"]
"""How the values of several processes, each of its part of the batch, become one value.

mean: weighted by how many rows of attention, or sequences, each is a mean of. norm: the root of the
sum of squares. gradient norm: the same over the number of processes, since the loss is their mean.
sum: the sum. worst mode: the worst by `MODES`. first: any, for it is the same everywhere.
"""

MODES = ("normal", "undefined", "benign", "malignant")
"""Shapes of an attention map, from the best to the worst."""


@dataclass(frozen=True)
class Term:
    """One quantity that the monitor records or logs.

    Attributes:
        name: in `terms=`, in `stability.jsonl` and after `stability/` in log keys.
        meaning: what it is, in a few words, with its unit or range.
        per: what one value is of. Of a "run" there is one number; of a "curve" and of a "map" there
            is no single number to log.
        needs: what has to be seen to measure it. Empty for what `terms=` does not choose, since the
            run tells it anyway or another option asks for it.
        combine: how the values of several processes become one.
        low_is_bad: whether the lowest value is the worst; otherwise the highest is.
        counts: whether the values of all layers are summed up for the log, as counts are.
        default: whether `terms="default"` has it.
        title: of its chart in a report.
        unit: of that chart's axis.
        sections: of the report, in which it has a chart of its own.
        log_scale: whether that axis is logarithmic.
    """

    name: str
    meaning: str
    per: Literal["head", "layer", "weight", "mode", "curve", "map", "run"]
    needs: tuple[Need, ...] = ()
    combine: Combine = "first"
    low_is_bad: bool = False
    counts: bool = False
    default: bool = False
    title: str = ""
    unit: str = ""
    sections: tuple[str, ...] = ()
    log_scale: bool = False

    @property
    def is_recorded(self) -> bool:
        """Whether a probe's `Records` hold it."""
        return self.per not in ("weight", "run")

    @property
    def extreme(self) -> Literal["min", "max"]:
        """Which of several values is the worst."""
        return "min" if self.low_is_bad else "max"

    @property
    def log_keys(self) -> tuple[str, ...]:
        """The keys that it has in a record of the Trainer, without those per layer."""
        key = f"stability/{self.name}"
        if self.per == "run" or self.counts:
            return (key,)
        if self.per in ("mode", "curve", "map"):
            return ()
        return (f"{key}/{self.extreme}", f"{key}/mean", f"{key}/worst_layer")


def _sigma(
    name: str,
    matrix: str,
    per: Literal["head", "layer"] = "layer",
    *,
    default: bool = False,
    sections: tuple[str, ...] = ("terms",),
) -> Term:
    """Describe the largest singular value of a weight or product, a term of Eq. 1."""
    title = f"\u03c3\u2081({matrix.replace('^T ', chr(0x1D40))})"
    return Term(
        name, f"largest singular value of {matrix}", per, ("weights",), default=default,
        title=title, unit="singular value", sections=sections, log_scale=True,
    )  # fmt: skip


def _norm(name: str, what: str, title: str) -> Term:
    """Describe the l2 norm of a norm's parameter, a term of Eq. 1."""
    return Term(
        name, f"l2 norm of the {what}", "layer", ("weights",), title=title, unit="l2 norm",
        sections=("terms",), log_scale=True,
    )  # fmt: skip


_ATTENTION: tuple[Term, ...] = (
    Term(
        "entropy", "attention entropy in nats, mean over rows that see a key", "head",
        ("attention",), "mean", low_is_bad=True, default=True, title="Attention entropy",
        unit="entropy (nats)",
    ),
    Term(
        "entropy_normalised", "the same over log(visible keys), 0 to 1", "head",
        ("attention",), "mean", low_is_bad=True, default=True,
        title="Attention entropy over its largest", unit="share (0 to 1)",
    ),
    Term(
        "rank", "rank of the attention map, 0 (one direction) to 1", "head", ("attention",), "mean",
        low_is_bad=True, default=True, title="Rank of the attention map", unit="share (0 to 1)",
    ),
    Term(
        "mode", "shape of the attention map: normal, benign, malignant (Qi et al. 2025), undefined",
        "mode", ("attention",), "worst mode", default=True,
    ),
    Term("maps", "attention of the first sequence, subsampled, if `maps` asks for it", "map"),
    Term(
        "entropy_bound", "lower bound of the entropy in nats, Theorem 3.1 (Zhai et al. 2023)",
        "head", ("attention", "weights"), "mean", low_is_bad=True,
        title="Lower bound of the entropy", unit="entropy (nats)",
    ),
)  # fmt: skip

_WEIGHTS: tuple[Term, ...] = (
    _sigma("sigma_wq", "Wq"),
    _sigma("sigma_wk", "Wk"),
    _sigma("sigma_wv", "Wv"),
    _sigma("sigma_wo", "Wo"),
    _sigma("sigma_w1", "W1"),
    _sigma("sigma_w2", "W2"),
    _sigma("sigma_qk", "Wq^T Wk", "head", default=True, sections=("terms", "spectra")),
    _sigma("sigma_ov", "Wo Wv", "head"),
    _sigma("sigma_w2w1", "W2 W1"),
    _norm("norm_gamma1", "first norm's gain", "\u2016\u03b31\u2016, gain of norm 1"),
    _norm("norm_beta1", "first norm's bias", "\u2016\u03b21\u2016, bias of norm 1"),
    _norm("norm_gamma2", "second norm's gain", "\u2016\u03b32\u2016, gain of norm 2"),
    _norm("norm_beta2", "second norm's bias", "\u2016\u03b22\u2016, bias of norm 2"),
    Term(
        "sec", f"spectral energy concentration SEC(d_q, {SEC_VALUES}) of Wq^T Wk, 0 to 1", "head",
        ("weights",), default=True, title=f"Spectral energy concentration SEC(d_q, {SEC_VALUES})",
        unit="share of energy (0 to 1)", sections=("spectra",),
    ),
    Term(
        "sec_curve", "SEC(d_q, s) at s = 1, 2, 4, ... of the most concentrated head", "curve",
        ("weights",), default=True,
    ),
    Term(
        "stable_rank", "stable rank of Wq^T Wk", "head", ("weights",), low_is_bad=True,
        title="Stable rank of Wq\u1d40Wk", unit="directions", sections=("spectra",),
    ),
)  # fmt: skip

_TOKENS: tuple[Term, ...] = (
    Term(
        "norm_x", "l2 norm of the block's input, over batch, tokens and features", "layer",
        ("tokens",), "norm", default=True, title="\u2016x\u2016, input of the block",
        unit="l2 norm", sections=("terms",), log_scale=True,
    ),
    Term(
        "norm_dx", "l2 norm of the loss's gradient there", "layer", ("tokens",), "gradient norm",
        default=True, title="\u2016\u2202L/\u2202x\u2016, its gradient", unit="l2 norm",
        sections=("terms",), log_scale=True,
    ),
    Term(
        "nonfinite_x", "NaN and infinite entries entering blocks", "layer", ("tokens",), "sum",
        counts=True, default=True,
    ),
    Term(
        "nonfinite_dx", "NaN and infinite entries of the gradients there", "layer", ("tokens",),
        "sum", counts=True, default=True,
    ),
)  # fmt: skip

_RUN: tuple[Term, ...] = (
    Term("malignant_heads", "heads whose queries all look at the same few keys", "run"),
    Term("benign_heads", "sparse heads whose queries look at a key each", "run"),
    Term(
        "unused_heads", f"share of heads at {UNUSED_SHARE:.0%} of their largest entropy: uniform",
        "run",
    ),
    Term("gamma", "gamma of sigma layers", "weight"),
    Term("effective_lr", "rates that AdamW2 really used", "weight", low_is_bad=True),
    Term("clipped_share", "share of matrices whose rate AdamW2 clipped", "run"),
    Term("sharpness", "top eigenvalue of the Hessian, if `sharpness_every` asks for it", "run"),
    Term("sharpness_threshold", "the sharpness above which the loss goes up", "run"),
    Term("sharpness_preconditioned", "1: of Adam's preconditioned Hessian; 0: of the plain", "run"),
    Term("nonfinite_steps", "steps so far with a NaN or infinite loss or gradient", "run"),
    Term("alarms", "alarms so far", "run"),
    Term("rollbacks", "rollbacks so far", "run"),
)  # fmt: skip

TERMS: dict[str, Term] = {term.name: term for term in (*_ATTENTION, *_WEIGHTS, *_TOKENS, *_RUN)}
"""Every term by its name, in the order of documentation and reports."""


def find_term(name: str) -> Term:
    """Return the description of a quantity; of one that is not described, one without any."""
    return TERMS.get(name) or Term(name, "", "layer")


def names_of(
    *,
    default: bool = False,
    seen: tuple[Need, ...] = ("attention", "weights", "tokens"),
    section: str | None = None,
) -> tuple[str, ...]:
    """Return the terms that `terms=` may name, in their order.

    Args:
        default: only those of `terms="default"`.
        seen: only those that need no more than this.
        section: only those with a chart in this section of the report.
    """
    return tuple(
        name
        for name, term in TERMS.items()
        if term.needs
        and set(term.needs) <= set(seen)
        and (term.default or not default)
        and (section is None or section in term.sections)
    )


def table() -> str:
    """Return the documentation's table of all terms, in Markdown, as it stands there."""
    lines = ["| term | what it is | of each | log keys, after `stability/` | default |"]
    return "\n".join([*lines, "|---|---|---|---|---|", *map(_row, TERMS.values())]) + "\n"


def _row(term: Term) -> str:
    keys = ", ".join(_short_keys(term)) or "none"
    default = ("yes" if term.default else "no") if term.needs else ""
    per = {"mode": "head", "curve": "layer", "map": "layer"}.get(term.per, term.per)
    return f"| `{term.name}` | {term.meaning} | {per} | {keys} | {default} |"


def _short_keys(term: Term) -> Iterator[str]:
    first, *others = [key.removeprefix("stability/") for key in term.log_keys] or [""]
    if first:
        yield f"`{first}`"
    yield from (f"`{key.removeprefix(term.name)}`" for key in others)
