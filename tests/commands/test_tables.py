"""Tables on narrow terminals tell their rows apart, and nothing printed is obeyed by a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from hf_stable.commands import terminal
from hf_stable.commands.main import app, main
from hf_stable.commands.tables import shorten_names
from hf_stable.commands.terminal import make_console, make_table, print_lines

LAYERS = [
    f"vit.encoder.layer.{layer}.{part}"
    for layer in range(12)
    for part in (
        "attention.attention.query", "attention.attention.key", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def draw(monkeypatch):
    """What a table of layers looks like on a terminal of a width, line by line."""

    def draw(columns, *, wide=False, names=LAYERS):
        shown = Terminal()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        headings = ("layer", "shape", "dtype", "sigma", "stable rank", "gamma", "raw sigma")
        table = make_table(*headings, least=("dtype", "raw sigma", "shape"))
        for index, name in enumerate(names):
            table.add_row(name, "768x768", "float32", f"{index}.5", "12.34", "1.234", "5.678")
        make_console(wide=wide).print(table)
        return re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()).splitlines()  # bold headings

    return draw


@pytest.mark.parametrize("columns", [40, 80])
def test_rows_stay_apart_on_a_narrow_terminal(draw, columns):
    lines = draw(columns)
    assert max(map(len, lines)) <= columns
    rows = [line for line in lines if ".5" in line]
    names = [row.split("\N{BOX DRAWINGS LIGHT VERTICAL}")[1].strip() for row in rows]
    assert len(rows) == len(set(names)) == len(LAYERS)
    said = " ".join(" ".join(lines).split())
    assert ("left out: dtype, raw sigma, shape, gamma" in said) == (columns == 40)
    assert "--wide shows all" in said and "sigma" in said


@pytest.mark.parametrize(
    "command",
    ["demo", "preflight", "watch", "report", "inspect", "doctor", "bench", "bench sigma",
     "bench scale"],
)  # fmt: skip
def test_every_command_that_draws_tables_has_wide(command, capsys):
    main([*command.split(), "--help"])
    assert "--wide" in capsys.readouterr().out


def test_a_wide_terminal_and_wide_show_all(draw):
    for lines in (draw(200), draw(40, wide=True)):
        assert all(name in "\n".join(lines) for name in LAYERS)
        assert "raw sigma" in lines[1] and "left out" not in lines[-1]


@pytest.mark.parametrize("width", [20, 24, 30])
def test_names_are_cut_in_the_middle_and_stay_different(width):
    shown = shorten_names(LAYERS, width)
    assert max(map(len, shown)) <= width and len(set(shown)) == len(LAYERS)
    assert shown != LAYERS
    runs = [f"runs/a-sweep-over-rates-and-seeds/lr-{rate}-seed-0" for rate in range(9)]
    assert len(set(shorten_names(runs, width))) == 9
    assert max(map(len, shorten_names(runs, width))) <= width


def test_names_that_cannot_be_told_apart_so_short_stay_whole():
    names = [f"{a}{'x' * 30}{b}{'y' * 30}{c}" for a in "ab" for b in "ab" for c in "ab"]
    assert shorten_names(names, 10) == names
    assert shorten_names(["short"], 10) == ["short"]


@pytest.mark.parametrize("attack", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\x08"])
def test_what_a_terminal_would_obey_is_spelled_out(draw, capsys, attack):
    lines = draw(200, names=[f"a{attack}b"])
    assert attack not in "\n".join(lines) and attack.encode("unicode_escape").decode() in lines[3]
    shown = Terminal()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", shown)
        console = make_console()
        console.print(f"{attack} in a line", *terminal.indented([f"{attack} in a sentence"]))
        print_lines(f"{attack} in a path")
    assert attack not in shown.getvalue() and shown.getvalue().count("in a") == 3
    assert main(["inspect", f"no-such-{attack}"]) == 2
    assert attack not in capsys.readouterr().err


def test_words_are_completed(monkeypatch, capsys):
    for words, completed in (("hf-stable do", "doctor"), ("hf-stable inspect --wi", "--wide")):
        monkeypatch.setenv("_HF_STABLE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit) as end:
            app([], prog_name="hf-stable", standalone_mode=False)
        assert end.value.code == 0 and completed in capsys.readouterr().out.split()
