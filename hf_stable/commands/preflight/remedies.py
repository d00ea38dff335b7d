"""What a preflight tries beside the run as it is: remedies, from the text that names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from hf_stable._wording import nearest
from hf_stable.adamw2.planning import AUTO
from hf_stable.methods.config import MethodConfig
from hf_stable.methods.patching import METHODS

__all__ = ["NONE", "Remedy", "parse_remedies", "parse_remedy"]

WARMUP_SHARE = 0.1
"""Share of the run's steps that `warmup` takes if no number is given."""

CLIP_NORM = 1.0
"""Norm to which `clip` clips the gradient if no number is given."""

FORMS = {
    "none": "none",
    "warmup": "warmup, warmup:0.2 (share of the run's steps) or warmup:500 (steps)",
    "clip": "clip or clip:0.5 (largest norm of the gradient)",
    "adamw2": "adamw2 (its tau by the length of the run) or adamw2:tau=0.01",
    "optim": "optim:NAME (a name that TrainingArguments takes), optim:NAME:option=value",
    **{method: f"{method} or {method}:option=value" for method in METHODS},
}


@dataclass(frozen=True)
class Remedy:
    """What is changed about a run.

    Attributes:
        name: as the user spelt it; two remedies of one preflight have different names.
        methods: patch methods to apply, with their options.
        optim: name of the optimizer, or None for the run's own.
        optim_args: options of that optimizer, as `TrainingArguments.optim_args` has them.
        warmup: share of the run's steps below 1, steps from 1 on; None for the run's own.
        clip: largest norm of the gradient; None for the run's own.
    """

    name: str
    methods: tuple[MethodConfig, ...] = ()
    optim: str | None = None
    optim_args: str = ""
    warmup: float | None = None
    clip: float | None = None

    @property
    def needs_the_optimizer(self) -> bool:
        """Say whether the optimizer has to be built after the change."""
        return bool(self.methods) or self.optim is not None

    @property
    def needs_the_schedule(self) -> bool:
        """Say whether the schedule has to be built after the change."""
        return self.warmup is not None or self.needs_the_optimizer

    def command_options(self) -> tuple[list[str], list[str]]:
        """Return what says the same on a command line.

        Returns:
            Options of `hf-stable run`, and arguments of a script that takes the fields of
            TrainingArguments.
        """
        launcher: list[str] = []
        if self.methods:
            launcher = ["--patch", ",".join(method.method for method in self.methods)]
        script: list[str] = []
        if self.optim is not None:
            script += ["--optim", self.optim]
            script += ["--optim_args", self.optim_args] if self.optim_args else []
        if self.warmup is not None:
            script += ["--warmup_steps", f"{self.warmup:g}"]
        if self.clip is not None:
            script += ["--max_grad_norm", f"{self.clip:g}"]
        return launcher, script


NONE = Remedy("none")


def parse_remedies(text: str) -> tuple[Remedy, ...]:
    """Read remedies with commas between them, in order.

    Raises:
        ValueError: as `parse_remedy`, or for one that is named twice.
    """
    remedies = tuple(parse_remedy(part) for part in text.split(","))
    names = [remedy.name for remedy in remedies]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"remedy {name!r} is named more than once")
    return remedies


def parse_remedy(text: str) -> Remedy:
    """Read one remedy: parts joined by `+`, each a name with options behind colons.

    `adamw2:tau=0.01+sigma_reparam:init=one` is AdamW2 with that tau on a patched model, `adamw2`
    alone AdamW2 with `tau=auto`.

    Raises:
        ValueError: for a part that is not known, naming the nearest; for an option or a number
            that does not fit; for two parts that change the same thing.
    """
    draft = _Draft()
    for part in text.strip().split("+"):
        name, *options = (each.strip() for each in part.split(":"))
        if name not in FORMS:
            known = ("optim:NAME" if each == "optim" else each for each in FORMS)
            raise ValueError(
                f"unknown remedy {name!r}{nearest(name, FORMS)}; the remedies are "
                f"{', '.join(known)}, joined with + and parted with commas"
            )
        _READERS.get(name, _read_method)(draft, name, options)
    if "none" in draft.seen and len(draft.seen) > 1:
        raise ValueError(f"{text.strip()!r} joins none with something: none stands alone")
    return Remedy(text.strip(), tuple(draft.methods), **draft.changes)


@dataclass
class _Draft:
    """A remedy while its parts are read."""

    seen: set[str] = field(default_factory=set)
    methods: list[MethodConfig] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    def note(self, what: str, name: str) -> None:
        if what in self.seen:
            raise ValueError(f"remedy part {name!r} changes the {what} a second time")
        self.seen.add(what)


def _read_none(draft: _Draft, name: str, options: list[str]) -> None:
    draft.note("none", name)
    if options:
        raise ValueError(f"none takes no options, got {options[0]!r}")


def _read_number(draft: _Draft, name: str, options: list[str]) -> None:
    draft.note(name, name)
    default = WARMUP_SHARE if name == "warmup" else CLIP_NORM
    try:
        (value,) = map(float, options) if options else (default,)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{':'.join([name, *options])!r} is not a remedy: write {FORMS[name]}")
    draft.changes[name] = value


def _read_optimizer(draft: _Draft, name: str, options: list[str]) -> None:
    draft.note("optimizer", name)
    chosen = name
    if name == "optim":
        if not options or "=" in options[0]:
            raise ValueError(f"optim needs the name of an optimizer: {FORMS['optim']}")
        chosen, *options = options
    for option in options:
        if "=" not in option:
            raise ValueError(f"option {option!r} of {chosen} has no value: {FORMS[name]}")
    if name == "adamw2" and not any(option.partition("=")[0] == "tau" for option in options):
        options = [f"tau={AUTO}", *options]
    draft.changes |= {"optim": chosen, "optim_args": ",".join(options)}


def _read_method(draft: _Draft, name: str, options: list[str]) -> None:
    draft.note(name, name)
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"option {option!r} of {name} has no value: {FORMS[name]}")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"option {option!r} of {name} is not YAML: {error}") from error
    draft.methods.append(METHODS[name][0].from_dict(given))


_READERS = {
    "none": _read_none,
    "warmup": _read_number,
    "clip": _read_number,
    "adamw2": _read_optimizer,
    "optim": _read_optimizer,
}
