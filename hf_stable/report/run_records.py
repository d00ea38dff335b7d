"""A training run as plain data: what the Trainer and the monitor recorded."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hf_stable._wording import short_names
from hf_stable.monitor.terms import find_term
from hf_stable.report.events import Event, KeptFiles
from hf_stable.report.values import evenly, to_number, worst_head

__all__ = ["MOST_LAYERS", "AttentionMap", "Probe", "RunRecords"]

MOST_LAYERS = 128
"""Layers that charts show: as many as the deepest models have, and as a screen can tell apart."""


class AttentionMap(NamedTuple):
    """An attention map in 256 levels.

    Attributes:
        size: number of rows, and of columns.
        levels: row by row, 0 for none to 255 for the map's largest entry.
        largest: that entry.
    """

    size: int
    levels: bytes
    largest: float


@dataclass(frozen=True)
class Probe:
    """One `probe` line of `stability.jsonl`.

    Attributes:
        attempt: how many rollbacks came before.
        step: optimizer step.
        loss: of this step alone; NaN where it is not finite, None where it was not written.
        quantities: quantity -> layer -> number, list of numbers per head, or None; without maps.
        rates: parameter -> rate that AdamW2 used, or list of rates of a fused one.
        maps_at: where the line begins in the log if it holds attention maps, which are not read;
            else None.
        numbers: what else the line holds, such as sharpness.
    """

    attempt: int
    step: int
    loss: float | None = None
    quantities: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    maps_at: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecords:
    """A run, as far as it can be read.

    Attributes:
        name: label in tables and plots.
        path: what was asked for.
        history: the Trainer's records, in order; the newest attempt's alone.
        probes: in the order of the file, all attempts.
        events: likewise.
        batches: what was kept at alarms, likewise.
        num_steps: optimizer steps done, as far as known.
        max_steps: optimizer steps planned, or None.
        has_ended: whether training came to its end; one that was interrupted or goes on did not.
        seconds: of training, over all legs that came to their end under a monitor, or None.
        guessing: cross-entropy of guessing among all labels, in nats, or None if it is not known.
        monitor: options of the StabilityCallback, empty if there is no trace of one.
        log: the file with the probes, for what is not kept of them.
        notes: what is missing or damaged, in sentences.
    """

    name: str
    path: str
    history: tuple[dict[str, Any], ...] = ()
    probes: tuple[Probe, ...] = ()
    events: tuple[Event, ...] = ()
    batches: tuple[KeptFiles, ...] = ()
    num_steps: int = 0
    max_steps: int | None = None
    has_ended: bool = True
    seconds: float | None = None
    guessing: float | None = None
    monitor: dict[str, Any] = field(default_factory=dict)
    log: Path = Path()
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> list[str]:
        """Return the layers that any probe has seen, in order."""
        seen: dict[str, None] = {}
        for probe in self.probes:
            for name, by_layer in probe.quantities.items():
                if find_term(name).per != "weight":  # whose names are of modules within layers
                    seen |= dict.fromkeys(by_layer)
        return list(seen)

    @cached_property
    def short_names(self) -> dict[str, str]:
        """Return for each layer what tells it from the others."""
        return short_names(self.layers)

    @cached_property
    def drawn_layers(self) -> dict[str, int]:
        """Return the layers that charts show and the position of each: all, if that is possible.

        Of more than `MOST_LAYERS` those are taken in which alarms were raised, those whose entropy
        fell lowest and whose sigma_1(Wq^T Wk) rose highest, and others evenly through the depth.
        """
        positions = {layer: position for position, layer in enumerate(self.layers)}
        if len(positions) <= MOST_LAYERS:
            return positions
        alarmed = [alarm.layer for alarm in self.events if alarm.layer in positions]
        chosen = dict.fromkeys(alarmed[: MOST_LAYERS // 4])
        for quantity in ("entropy_normalised", "sigma_qk"):
            chosen |= dict.fromkeys(self._worst_layers(quantity, MOST_LAYERS // 4))
        chosen |= dict.fromkeys(evenly(self.layers, MOST_LAYERS - len(chosen)))
        return {layer: positions[layer] for layer in sorted(chosen, key=positions.__getitem__)}

    def _worst_layers(self, quantity: str, count: int) -> list[str]:
        """Return so many layers with the worst values of a quantity at any probe."""
        worst: dict[str, float] = {}
        sign = 1 if find_term(quantity).low_is_bad else -1
        for probe in self.probes:
            for layer, heads in probe.quantities.get(quantity, {}).items():
                value = sign * worst_head(quantity, heads)[0]
                if value < worst.get(layer, math.inf):
                    worst[layer] = value
        return sorted(worst, key=worst.__getitem__)[:count]

    @property
    def is_unfinished(self) -> bool:
        """Return whether the run was interrupted, goes on, or is a checkpoint on the way."""
        if self.has_ended:
            return False
        # Without a state nothing says how many steps there are to be, nor that it came to an end.
        return not self.history if self.max_steps is None else self.num_steps < self.max_steps

    @cached_property
    def attempt(self) -> int:
        """Return the number of the last attempt: how often training went back."""
        went = [event.attempt + 1 for event in self.events if event.name == "rollback"]
        return max([0, *went, *(probe.attempt for probe in self.probes)])

    @cached_property
    def alarms(self) -> list[Event]:
        """Return the alarms on the way to the end: not those that a rollback has answered."""

        def was_left(event: Event) -> bool:
            return any(
                back.to_step is not None
                and back.attempt >= event.attempt
                and back.to_step < event.step
                for back in self.events
                if back.name == "rollback"
            )

        return [event for event in self.events if event.name == "alarm" and not was_left(event)]

    @cached_property
    def last_way(self) -> list[Probe]:
        """Return the probes on the way to the end: of each attempt those before it went back."""
        kept: list[Probe] = []
        limit = math.inf
        for attempt in sorted({probe.attempt for probe in self.probes}, reverse=True):
            own = [p for p in self.probes if p.attempt == attempt and p.step <= limit]
            kept = own + kept
            targets = [
                event.to_step
                for event in self.events
                if event.name == "rollback"
                and event.attempt == attempt - 1
                and event.to_step is not None
            ]
            limit = min([limit, *targets, *(probe.step - 1 for probe in own)])
        return kept

    def logged(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of each Trainer record that has a key; NaN for what is no number."""
        return [(r["step"], to_number(r[key])) for r in self.history if key in r]

    def probed(self, quantity: str, layer: str) -> list[tuple[int, int, float]]:
        """Return (attempt, step, value of the worst head) of each probe; NaN if not defined."""
        return [
            (probe.attempt, probe.step, worst_head(quantity, by_layer[layer])[0])
            for probe in self.probes
            if layer in (by_layer := probe.quantities.get(quantity, {}))
        ]

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Return (step, training loss), from records or probes, whichever are more.

        Of probes that were made twice, before and after a rollback, those that led to the end
        count. The Trainer's records hide a loss that is not finite: it logs a mean without it, and
        zero where there is none other (`logging_nan_inf_filter`). What the monitor saw at a
        record's step makes it NaN here, and so does, beside a zero, what it saw last before, or a
        gradient norm that is not finite.
        """
        probes = {probe.step: probe.loss for probe in self.last_way if probe.loss is not None}
        norms = dict(self.logged("grad_norm"))
        lost, probed = self._nonfinite_steps, [probe.step for probe in self.last_way]

        def is_hidden(step: int, loss: float) -> bool:
            before = bisect.bisect_right(probed, step)
            was_lost = before > 0 and probed[before - 1] in lost
            shows_nothing = was_lost or not math.isfinite(norms.get(step, 0.0))
            return step in lost or (loss == 0 and shows_nothing)

        records = [
            (step, math.nan if is_hidden(step, loss) else loss)
            for step, loss in self.logged("loss")
        ]
        return records if len(records) >= len(probes) else sorted(probes.items())

    @cached_property
    def _nonfinite_steps(self) -> set[int]:
        """Return the steps whose loss or gradient is known not to have been finite.

        Between two probes all steps are, if the count of such steps rose by as many; or all from
        the alarm on, if it rose by as many as there are from there.
        """
        alarms = [
            event.step
            for event in self.events
            if event.name == "alarm" and event.kind == "nonfinite"
        ]
        found: list[range] = []
        before, count = 0, 0.0
        for probe in self.last_way:
            now = probe.numbers.get("nonfinite_steps", math.nan)
            begins = [before + 1, *(step for step in alarms if before < step <= probe.step)]
            found += [
                range(first, probe.step + 1)
                for first in begins
                if first <= probe.step and now - count >= probe.step + 1 - first
            ]
            before, count = probe.step, now
        found += [range(p.step, p.step + 1) for p in self.last_way if p.loss is not None
                  and not math.isfinite(p.loss)]  # fmt: skip
        return {step for stretch in found for step in stretch}
