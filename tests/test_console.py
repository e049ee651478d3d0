import io
import re
import time

import pytest
from rich.console import Console

from speccert.experiments.cell import Progress
from speccert.experiments.config import config_id
from speccert.experiments.console import LiveRun
from speccert.experiments.spec import RunSpec
from speccert.experiments.work import Finished

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


MANY = RunSpec.from_mapping({**SPEC, "constraints": ["cap"], "thresholds": [1.0], "seeds": list(range(2000))}).cells()


def test_of_many_cells_those_that_run_are_shown_then_the_last_to_end():
    shown = console(terminal=True)
    with LiveRun(shown) as watcher:
        watcher.start(MANY, {})
        for cell in MANY[101:116]:
            watcher.progress(Progress(config_id(cell), "epoch 1/40 loss 0.1", 0.0))
        for cell in MANY[:100]:
            watcher.progress(Progress(config_id(cell), "attacks", 1.0))
            watcher.finish(Finished(config_id(cell), SUMMARY))
        watcher.finish(Finished(config_id(MANY[100]), None, ValueError("no")))
        assert len(watcher._bars.tasks) == 13  # twelve, and that of all cells
        plain = console(terminal=False)
        plain.print(watcher._view())
    lines = (re.sub("[│┃]", " ", line) for line in text(plain).splitlines())
    rows = [line.split() for line in lines if re.match(r" +cap +1 +\d", line)]
    states = {int(row[2]): " ".join(row[6:]) for row in rows if len(row) > 6}
    expected = dict.fromkeys(range(101, 116), "epoch 1/40") | {100: "failed"} | dict.fromkeys(range(86, 100), "done")
    assert states == expected
    assert "1970 more" in text(plain)


def test_two_thousand_cells_are_followed_in_a_moment():
    shown = console(terminal=True)
    start = time.process_time()
    with LiveRun(shown) as watcher:
        watcher.start(MANY, {})
        for cell in MANY:
            for stage in ("training", "epoch 1/40 loss 0.123", "attacks", "writing"):
                watcher.progress(Progress(config_id(cell), stage, 0.5))
            watcher.finish(Finished(config_id(cell), SUMMARY))
        for _ in range(10):
            watcher._view()
    assert time.process_time() - start < 20  # 2 s alone on a core
    assert "2000/2000" in text(shown)


def test_what_happens_to_the_run_is_said():
    shown = console(terminal=False)
    with LiveRun(shown) as watcher:
        watcher.start(CELLS, {})
        watcher.say("submitted 4 Slurm jobs [7_0 to 7_3]")
    assert text(shown) == "submitted 4 Slurm jobs [7_0 to 7_3]\n"
