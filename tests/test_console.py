import io

import pytest
from rich.console import Console

from speccert.experiments.cell import Progress
from speccert.experiments.config import RunSpec, config_id
from speccert.experiments.console import LiveRun
from speccert.experiments.executors import Finished

SUMMARY = {
    "clean_accuracy": 0.931,
    "certified_accuracy_attacked_eps_0.3": 0.5,
    "worst_case_accuracy_eps_0.3": 0.625,
    "train_s": 3.0,
    "evaluate_s": 1.4,
}
SPEC = {"constraints": ["cap", "orthogonal-bjorck"], "thresholds": [0.5, float("inf")], "attacks": ["fgsm"]}
CELLS = RunSpec.from_mapping(SPEC).cells()


def console(*, terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=40, color_system=None)


def text(shown):
    return shown.file.getvalue()


def play(shown):
    with LiveRun(shown) as watcher:
        watcher.start(CELLS, {config_id(CELLS[3]): SUMMARY})
        for cell in CELLS[:3]:
            watcher.progress(Progress(config_id(cell), "epoch 12/40 loss 0.123 certified 45.6 %", 0.3))
        watcher.progress(Progress(config_id(CELLS[0]), "autoattack eps 0.123456", 1.0))
        plain = console(terminal=False, width=shown.width)
        plain.print(watcher._view())
        watcher.finish(Finished(config_id(CELLS[0]), SUMMARY))
        watcher.finish(Finished(config_id(CELLS[1]), None, ValueError("no [/folder] and no [l2] rule")))
    return watcher, text(plain)


def test_a_pipe_gets_one_plain_line_a_cell():
    shown = console(terminal=False, width=40)
    play(shown)
    assert text(shown).splitlines() == [
        "1 of 4 cells were finished before and are kept",
        "cap 0.5 seed 0: clean 93.1 %, at eps 0.3 certified 50.0 %, observed 62.5 %, 4 s",
        "cap inf seed 0: failed (no [/folder] and no [l2] rule)",
    ]
    assert "\x1b" not in text(shown)


@pytest.mark.parametrize("width", [100, 140])
def test_a_terminal_shows_every_cell_uncut(width):
    shown = console(terminal=True, width=width)
    _, view = play(shown)
    lines = view.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in view
    for cell in CELLS:
        assert any(line.split()[1:4:2] == [cell.constraint, f"{cell.threshold:g}"] for line in lines), cell
    for piece in ("93.1", "50.0", "62.5", "done", "epoch 12/40", "certified 45.6 %", "1/4"):
        assert piece in view


def test_a_failure_shows_in_a_terminal_and_its_bar_goes():
    shown = console(terminal=True)
    watcher, _ = play(shown)
    assert "cap inf seed 0: failed (no [/folder] and no [l2] rule)" in text(shown)
    after = console(terminal=False)
    after.print(watcher._view())
    assert "failed" in text(after)
    assert "cap inf seed 0" not in text(after)
    assert "3/4" in text(after)


def test_results_that_are_missing_are_dashes():
    shown = console(terminal=False)
    with LiveRun(shown) as watcher:
        watcher.start(CELLS[:1], {})
        watcher.finish(Finished(config_id(CELLS[0]), {"clean_accuracy": 0.5, "train_s": 1.0, "evaluate_s": 0.0}))
    assert "clean 50.0 %, at eps 0.3 certified - %, observed - %" in text(shown).replace("\N{EN DASH}", "-")
