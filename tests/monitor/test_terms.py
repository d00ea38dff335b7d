"""One place describes what is monitored: all else follows from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

import hf_stable
from hf_stable.monitor import recorder, terms
from hf_stable.monitor.combining import combine_records
from hf_stable.monitor.log_keys import aggregate
from hf_stable.monitor.terms import TERMS, Term, names_of
from hf_stable.report.run_records import Probe, RunRecords, worst_head
from hf_stable.report.sections import build_sections

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- table: terms -->\n", "<!-- end of table -->"

BLOCKS = ("transformer.h.0", "transformer.h.1")

SLACK = Term(
    "slack", "by how much a head could grow", "head", ("weights",), "sum", low_is_bad=True,
    default=True, title="Slack of a head", unit="slack", sections=("spectra",),
)  # fmt: skip


@pytest.fixture
def slack(monkeypatch):
    """Describe one more term, and measure it where the weights of a block are."""
    monkeypatch.setitem(TERMS, SLACK.name, SLACK)
    measure = recorder.weight_terms

    def with_slack(block, wanted, bearing):
        own = {SLACK.name: torch.tensor([3.0, 5.0])} if SLACK.name in wanted else {}
        return {name: found | own for name, found in measure(block, wanted, bearing).items()}

    monkeypatch.setattr(recorder, "weight_terms", with_slack)


def charts_of(values):
    probe = Probe(attempt=0, step=1, quantities={SLACK.name: values})
    sections = {s.key: s for s in build_sections([RunRecords("run", "run", probes=(probe,))])}
    return {chart.title: chart for chart in sections["spectra"].charts}


def test_a_term_that_is_described_once_is_known_everywhere(slack):
    model = tiny_model("gpt2")
    for wanted in ("default", "all", [SLACK.name]):
        with hf_stable.probe(model, terms=wanted) as records:
            model(**tiny_batch(model))
        assert records.to_dict()[SLACK.name] == dict.fromkeys(BLOCKS, [3.0, 5.0])
    hf_stable.StabilityCallback(terms=[SLACK.name])

    values = records.to_dict()[SLACK.name]
    logs = aggregate({SLACK.name: values}, layers=True)
    assert logs["stability/slack/min"] == 3.0  # low is bad
    assert logs["stability/slack/mean"] == 4.0
    assert {"stability/slack/worst_layer", "stability/slack/0"} <= logs.keys()
    assert worst_head(SLACK.name, [5.0, 3.0]) == (3.0, 1)

    parts = [{SLACK.name: {"h.0": 3.0}}, {SLACK.name: {"h.0": 5.0}}]
    assert combine_records(parts, [{}, {}]) == {SLACK.name: {"h.0": 8.0}}

    chart = charts_of(values)["Slack of a head: worst head of each layer"]
    assert chart.curves[0].points == [(1, 3.0)]
    assert "| `slack` | by how much a head could grow | head | `slack/min`" in terms.table()


def test_without_its_description_it_is_known_nowhere():
    with pytest.raises(ValueError, match="unknown term 'slack'"):
        hf_stable.StabilityCallback(terms=[SLACK.name])
    with pytest.raises(AttributeError, match="records no 'slack'"):
        _ = recorder.Records().slack
    assert "slack" not in terms.table()
    assert not any("Slack" in title for title in charts_of({"h.0": [3.0]}))


def test_the_documentation_has_the_table_of_all_terms():
    pages = [ROOT / "README.md", *ROOT.glob("hf_stable/**/*.md"), *ROOT.glob("docs/**/*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    tables = [text.split(BEGIN)[1].split(END)[0] for text in texts if BEGIN in text]
    assert tables == [terms.table()]


def test_groups_of_terms_are_what_they_need():
    assert names_of(seen=("attention",)) == ("entropy", "entropy_normalised", "rank", "mode")
    assert "entropy_bound" in names_of(seen=("attention", "weights"))
    assert not {"gamma", "maps", "alarms"} & set(names_of())
    assert len(names_of(section="terms")) == 15  # Qi et al. 2025, Eq. 1
    assert set(names_of(default=True)) < set(names_of())


def test_the_file_of_terms_imports_no_torch():
    path = ROOT / "hf_stable/monitor/terms.py"
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
