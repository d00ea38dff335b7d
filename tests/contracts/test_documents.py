"""README, method cards and guides: their code runs as shown, their names exist, links lead on."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import typer
from documents import CARDS, DOCUMENTS, GUIDES, README, ROOT, CodeBlock, code_blocks

import hf_stable
from hf_stable.commands.main import app, main
from hf_stable.public_modules import PUBLIC

RUN_ELSEWHERE = {"main-job", "tests"}
"""By `.ci/run`."""

HEADINGS = (
    "Use", "Options", "When not", "How it is kept right", "What it costs",
    "Deviations from the paper",
)  # fmt: skip

COMMAND = re.compile(r"(?:hf-stable|-m hf_stable\.run)\b([^\n`|&]*)")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def module_of(path: Path):
    """A module by its path: docs/ is no package."""
    spec = util.spec_from_file_location(path.stem, path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matplotlib_image(path: Path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    return pyplot.imread(path)


tables = module_of(ROOT / "docs" / "tables.py")
lateness = tables.lateness


def is_run_here(block: CodeBlock) -> bool:
    return not block.is_excerpt and block.name not in RUN_ELSEWHERE and block.language != "text"


def runs_in_process(line: str) -> bool:
    return line.startswith("hf-stable ") and not line.startswith("hf-stable run ")


def run_line(line: str, folder: Path, place: str) -> None:
    """Run a line of a shell block in a folder, which is the present one.

    Commands of hf-stable that hold for one process run in this one: importing torch takes seconds.
    """
    if runs_in_process(line):
        assert main(shlex.split(line)[1:]) == 0, place
        return
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{place}\n{done.stdout}\n{done.stderr[-3000:]}"


def run_blocks(document: Path, folder: Path) -> int:
    """Run the blocks of a document one after another in a folder; return how many ran.

    Python blocks share their names, and shell blocks their folder, which is the present one.
    """
    names: dict = {"__name__": "__main__"}
    num_run = 0
    for block in code_blocks(document):
        if not is_run_here(block):
            continue
        num_run += 1
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
        elif block.language == "bash":
            for line in block.text.splitlines():
                run_line(line, folder, block.place)
        else:
            pytest.fail(f"{block.place}: nobody runs {block.language!r}; see tests/support")
    return num_run


def as_case(document: Path):
    """A document as a test's parameter; slow where it starts processes."""
    starts_processes = any(
        not runs_in_process(line)
        for block in code_blocks(document)
        if is_run_here(block) and block.language == "bash"
        for line in block.text.splitlines()
    )
    marks = [pytest.mark.slow] if starts_processes else []
    return pytest.param(document, marks=marks, id=name_of(document))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.filterwarnings("ignore:StabilityCallback", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("document", map(as_case, DOCUMENTS))
def test_the_code_of_a_document_runs_as_it_is_shown(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = [
        b for b in code_blocks(document) if not b.is_excerpt and b.language not in ("text", "")
    ]
    assert run_blocks(document, tmp_path) == len([b for b in shown if b.name not in RUN_ELSEWHERE])


def test_a_block_that_fails_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "page.md"
    document.write_text("```python\nnumber = 1\n```\n\n```python\nassert number == 2\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(document, tmp_path)
    document.write_text("```bash\nfalse | true\n```\n")
    with pytest.raises(AssertionError, match="page.md:2"):
        run_blocks(document, tmp_path)
    document.write_text("```python\n# Excerpt: never.\nraise ValueError\n```\n```text\nno\n```\n")
    assert run_blocks(document, tmp_path) == 0
    document.write_text("```yaml\n# some.yaml\na: 1\n```\n```bash\ngrep -q 1 some.yaml\n```\n")
    assert run_blocks(document, tmp_path) == 2


def excerpts(document: Path) -> list:
    return [block for block in code_blocks(document) if block.is_excerpt]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_excerpts_of_python_parse_and_name_what_exists(document):
    for block in excerpts(document):
        if block.language == "python":
            names = {
                node.attr
                for node in ast.walk(ast.parse(block.text))
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "hf_stable"
            }
            assert names <= set(hf_stable.__all__), block.place


def options_of(words: list[str]) -> tuple[str, set[str], set[str]]:
    """A command, the options that a document gives it, and those that it has."""
    command, name = typer.main.get_command(app), "hf-stable"
    known = {"--help"}
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    for word in words:
        known |= {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        if word in getattr(command, "commands", {}):
            command, name = command.commands[word], word
    known |= {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    given = words[:script] if name in ("run", "preflight") else words
    return name, {word for word in given if word.startswith("--")}, known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_option_of_a_command_exists(document):
    text = document.read_text()
    for found in COMMAND.finditer(text):
        words = found[1].split()
        if "hf_stable.run" in found[0]:
            words = ["run", *words]
        if words and not words[0].startswith("."):
            name, given, known = options_of(words)
            assert given <= known, f"hf-stable {name} has no {sorted(given - known)}"


def test_every_command_is_in_its_card_and_no_other():
    commands = {command.name for command in typer.main.get_command(app).commands.values()}
    card = (ROOT / "hf_stable" / "commands" / "README.md").read_text()
    assert set(re.findall(r"`hf-stable ([a-z]+)", card)) == commands


def test_every_public_name_is_in_readme_a_card_or_a_guide():
    said = "\n".join(document.read_text() for document in DOCUMENTS)
    assert [name for name in hf_stable.__all__ if not re.search(rf"\b{name}\b", said)] == []


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_cards_have_the_fixed_headings_in_their_order(card):
    headings = re.findall(r"^## (.+)$", card.read_text(), flags=re.M)
    assert [heading for heading in headings if heading in HEADINGS] == list(HEADINGS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_to_files_lead_to_files(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_those_that_code_and_results_give(name):
    path, make = tables.TABLES[name]
    text = (ROOT / path).read_text()
    assert len(make()) > 3
    assert tables.with_table(text, name, make()) == text, "run: python docs/tables.py"
    assert tables.with_table(text, name, ["| else |"]) != text


def test_no_document_names_a_table_that_nobody_makes():
    named = {
        (name_of(document), name)
        for document in DOCUMENTS
        for name in re.findall(r"<!-- table: (\S+) -->", document.read_text())
    }
    assert named == {(path, name) for name, (path, _) in tables.TABLES.items()}


def test_readme_fits_two_screens():
    text = README.read_text()
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 8 * 1024


def test_every_card_and_guide_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README.read_text()))
    assert {name_of(page) for page in (*CARDS, *GUIDES)} <= linked


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the package chromium")
def test_the_picture_of_the_report_is_made_by_its_command(tmp_path):
    from report_runs import calm, collapsing, write_run

    losses = [2.0 * 0.98**step + 0.1 for step in range(60)]
    runs = [
        write_run(tmp_path / "good", losses, {s: calm(s) for s in (1, 30, 59)}),
        collapsing(tmp_path / "bad"),
    ]
    pictures = [tmp_path / f"{number}.png" for number in range(2)]
    for chosen, picture in zip((runs, runs[:1]), pictures, strict=True):
        command = [sys.executable, ROOT / "docs" / "report_picture.py", *chosen]
        subprocess.run([*command, "--output", picture], check=True)
    shown = [matplotlib_image(picture) for picture in pictures]
    committed = matplotlib_image(ROOT / "docs" / "images" / "report.png")
    assert shown[0].shape == shown[1].shape == committed.shape
    assert (shown[0] != shown[1]).any()
    assert min(image.std() for image in (*shown, committed)) > 0.05  # no white page


@pytest.mark.slow
def test_every_public_name_has_its_place_in_the_reference(tmp_path):
    mkdocstrings = pytest.importorskip("mkdocstrings", reason="needs the docs extra")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with (site / "objects.inv").open("rb") as file:
        known = mkdocstrings.Inventory.parse_sphinx(file)
    wanted = {
        ".".join(filter(None, ("hf_stable", m, n))) for m, names in PUBLIC.items() for n in names
    }
    assert len(wanted) > 80 and wanted - set(known) == set()
    for page in ("index.html", "methods/adamw2.html", "guides/command-line.html"):
        assert "<h1" in (site / page).read_text()


def test_the_card_says_how_late_sigma_was():
    rows = json.loads(lateness.RESULTS.read_text())["rows"]
    first, last = ([row["ratios"][i] for row in rows] for i in (0, -1))
    card = " ".join((ROOT / "hf_stable/methods/sigma_reparam/README.md").read_text().split())
    worst = max(rows, key=lambda row: max(row["ratios"]))
    assert max(worst["ratios"]) == max(first)
    where = f"within the first ten steps at a rate of {worst['rate']}"
    said = (
        f"The largest ratio was {max(first)}, {where}. From step 31 on it was {max(last)} at most."
    )
    assert said in card
