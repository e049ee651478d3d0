import base64
import hashlib
import html.parser
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import BOUNDS, DISTANCE, NO_ATTACK, RADIUS, fail, finish, record, share
from scipy import stats

from speccert.experiments.config import CellConfig
from speccert.experiments.report import write_report
from speccert.experiments.report_charts import POINTS_SHOWN, eps_grid
from speccert.experiments.report_html import MISSING
from speccert.experiments.report_page import to_json
from speccert.experiments.report_series import best_of_each
from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder, StoreError

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(html.parser.HTMLParser):
    """The text, elements and tables of a page, and the data embedded in it."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.tables, self.texts, self._open = [], {}, [], []
        self.feed(self.source)
        (data,) = [text for tag, text in self.texts if tag.get("id") == "report-data"]
        self.data = json.loads(data)
        words = " ".join(
            text.replace("\N{NO-BREAK SPACE}", " ") for tag, text in self.texts if tag["tag"] not in ("script", "style")
        ).split()
        self.text = " ".join(words).replace(" :", ":")

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, **dict(attrs)}
        self.elements.append(element)
        self._open.append(element)
        if tag == "table":
            self.tables[element.get("id")] = self._table = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        if tag in ("meta", "br", "input"):
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else {"tag": ""}, data))
        if any(element["tag"] in ("td", "th") for element in self._open):
            self._table[-1][-1] += data

    def table(self, name="robustness"):
        """Rows as mappings by header, "ε = 0.3 certified" and the like."""
        head, *rows = self.tables[name]
        names = [re.sub(r"(ε = [\d.]+)(\S)", r"\1 \2", text) for text in head]
        return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def report(runs, tmp_path):
    return lambda: Page(write_report(runs, tmp_path / "out" / "report.html"))


def study(runs, **settings):
    spec = {"constraints": ["cap", "none"], "thresholds": [0.5, 2], "seeds": [0, 1], "eps": [0.1, 0.3], **settings}
    return [finish(runs, cell) for cell in RunSpec.from_mapping(spec).cells()]


def test_curves_are_the_shares_of_radii_and_distances_above_each_eps(runs, report):
    finish(runs, CellConfig(eps=(0.1, 0.3)))
    data = report().data
    (setting,), (one,) = data["settings"], data["series"]
    assert {0.0, 0.1, 0.3} <= set(setting["grid"])
    assert setting["grid"][-1] >= 0.5
    assert one["certified"] == [pytest.approx(share(RADIUS, eps), abs=1e-5) for eps in setting["grid"]]
    assert one["observed"] == [pytest.approx(share(DISTANCE, eps), abs=1e-5) for eps in setting["grid"]]
    assert all(low <= high for low, high in zip(one["certified"], one["observed"], strict=True))


def test_the_sandwich_has_means_and_student_intervals_over_the_seeds(runs, report):
    radii = [RADIUS, [0.4] * 6 + [0.0] * 2, [0.2] * 6 + [0.0] * 2]
    for seed, radius in enumerate(radii):
        finish(runs, CellConfig(seed=seed, eps=(0.3,)), radius=radius, distance=[1.0] * 8)
    (one,) = report().data["series"]
    values = [share(radius, 0.3) for radius in radii]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    ((mean, half),) = one["sandwich"]["certified"]
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx((high - low) / 2)
    assert one["sandwich"]["observed"] == [[1.0, 0.0]]
    assert one["sandwich"]["clean"] == [[0.75, 0.0]]


def test_one_seed_has_no_interval(runs, report):
    finish(runs, CellConfig(eps=(0.3,)))
    assert report().data["series"][0]["sandwich"]["certified"] == [[0.25, None]]


@pytest.mark.parametrize("end", [1e-3, 0.37, 1.0, 1.2, 250.0])
def test_the_grid_of_eps_is_even_round_and_long_enough(end):
    grid = eps_grid(end, [])
    assert grid[0] == 0
    assert end <= grid[-1] <= 1.03 * end
    assert 40 <= len(grid) <= 130
    assert np.ptp(np.diff(grid)) < 1e-9 * end
    assert (np.diff(eps_grid(end, [end / 3, end / 7])) > 0).all()


def test_diverged_cells_are_noted_and_left_out_of_the_curves(runs, report):
    finish(runs, CellConfig(seed=0, eps=(0.3,)))
    finish(runs, CellConfig(seed=1, eps=(0.3,)), radius=[0.0] * 8, diverged=True)
    finish(
        runs, CellConfig(seed=0, eps=(0.3,), threshold=2.0), diverged=True, history={"gradient_norm": [5.0, math.nan]}
    )
    page = report()
    some, none = page.data["series"]
    assert some["note"] == "1 of 2 diverged"
    assert some["certified"][0] == share(RADIUS, 0)
    assert none["note"] == "1 of 1 diverged"
    assert none["certified"] is None
    assert none["history"]["gradient_norm"] == [5.0, None]
    assert "3 done (2 of them diverged)" in page.text
    assert [row["cells"] for row in page.table()] == ["2 done 1 diverged", "done diverged"]


def test_points_are_the_attacked_samples_that_are_classified_right(runs, report):
    folder = finish(runs, CellConfig(eps=(0.3,)))
    data = report().data
    assert data["point_cells"] == [folder.id]
    assert [point[2] for point in data["points"]] == [0, 1, 2, 3, 4, 5]
    assert [point[4:] for point in data["points"]][3:] == [[0.4, 0.8], [0.5, None], [0.0, 0.3]]
    assert data["points_broken"] == 0


def test_points_are_capped_by_a_fixed_draw_that_keeps_every_broken_one(runs, report):
    count, broken = 5000, [17, 4711]
    radius, distance = np.full(count, 0.1), np.linspace(0.2, 0.9, count)
    radius[broken] = 1.0
    finish(runs, CellConfig(eps=(0.3,)), radius=radius, distance=distance, right=[True] * count)
    page = report()
    points = page.data["points"]
    assert len(points) == POINTS_SHOWN
    assert [point[2] for point in points[:2]] == broken
    assert page.data["points_broken"] == 2
    assert len({point[2] for point in points}) == POINTS_SHOWN
    assert "4,000 of 5,000 samples, drawn by a fixed seed" in page.text
    assert f"{page.data['point_cells'][0]} 2 adversarial examples inside a certified radius" in page.text


def test_no_certificate_broken_is_said_with_the_number_of_attacks(runs, report):
    study(runs)
    page = report()
    assert "No certificate was broken: 48 samples attacked" in page.text
    assert not [element for element in page.elements if element.get("role") == "alert"]


def test_a_cell_that_ended_with_a_broken_certificate_is_a_banner(runs, report):
    finish(runs, CellConfig())
    fail(runs, CellConfig(seed=1), "certificate broken: sample 3 has certified l2 radius 0.5")
    silent = RunFolder.of(runs, CellConfig(seed=2))
    silent.create(CellConfig(seed=2))
    (silent.path / "counterexample.safetensors").write_bytes(b"")
    page = report()
    assert [element["class"] for element in page.elements if element.get("role") == "alert"] == ["banner broken"]
    assert "A certificate was broken. No certified number on this page can be trusted" in page.text
    assert "sample 3 has certified l2 radius 0.5" in page.text
    assert page.text.count(silent.id) >= 2


def test_the_headline_names_the_best_cells_and_the_widest_gap(runs, report):
    finish(runs, CellConfig(threshold=0.5, eps=(0.3,)), radius=[0.4] * 4 + [0.0] * 4)
    finish(runs, CellConfig(threshold=2.0, eps=(0.3,)))
    text = report().text
    assert "certified at ℓ₂ ε = 0.3 50.0 % cap at threshold 0.5; observed 50.0 %" in text
    assert "widest gap, certified to observed 25.0 points cap at threshold 2, ε = 0.3" in text


def test_the_product_stands_beside_a_tighter_bound(runs, report):
    results = {"certified_accuracy_product_eps_0.3": 0.125, "lipschitz_product_upper": 9.0, "bounds_s": 1.0}
    finish(runs, CellConfig(eps=(0.3,), bound="auto"), **results)
    finish(runs, CellConfig(eps=(0.3,)))
    first, second = report().table()
    assert [first[key] for key in ("bound", "ε = 0.3 certified", "ε = 0.3 certified by the product")] == [
        *("auto", "25.0", "12.5")
    ]
    assert (second["bound"], second["ε = 0.3 certified by the product"]) == ("product", MISSING)


COSTS = {"attack_forwards": 1600, "attack_gradients": 800, "attack_s": 90.0, "certified_skipped_eps_0.3": 2}


def test_flagged_series_are_a_banner_and_a_column(runs, report):
    finish(runs, CellConfig(threshold=0.5, eps=(0.3,)), masking_flags=["flat-loss"], **COSTS)
    finish(runs, CellConfig(threshold=0.5, seed=1, eps=(0.3,)), masking_flags=[], attack_complete=True, **COSTS)
    finish(runs, CellConfig(threshold=2.0, eps=(0.3,)), masking_flags=[], attack_complete=False, **COSTS)
    finish(runs, CellConfig(constraint="none", threshold=math.inf, eps=(0.3,)))
    page = report()
    banners = [element["class"] for element in page.elements if "banner" in element.get("class", "")]
    assert banners == ["banner sound", "banner doubted"]
    assert "The attacks on 2 of 3 series may have been too weak." in page.text
    assert "cap 0.5: 1 of 2 flat-loss cap 2: attacks incomplete" in page.text
    assert "flat-loss: a tiny step does not change the loss as the gradient says;" in page.text
    assert "attacks incomplete: a budget ended them" in page.text
    assert [row["flags"] for row in page.table()] == ["1 of 2 flat-loss", "attacks incomplete", MISSING]
    assert [one["note"] for one in page.data["series"]] == ["1 of 2 flat-loss", "attacks incomplete", ""]


def test_runs_that_recorded_nothing_of_their_attacks_raise_no_doubt(runs, report):
    study(runs, attack_schedule="each")
    page = report()
    assert not [element for element in page.elements if "doubted" in element.get("class", "")]
    assert not {"flags", "median radius / distance", "gradients a sample"} & set(page.table()[0])
    for words in ("too weak", "spared", "Spared", "After X", "cascade:", "cost of attacks", "tightest"):
        assert words not in page.text


def test_what_flagged_attacks_left_standing_is_never_marked_the_best(runs, report):
    finish(runs, CellConfig(threshold=0.5, eps=(0.3,)), masking_flags=["flat-loss"], distance=[1.0] * 8)
    finish(runs, CellConfig(threshold=1.0, eps=(0.3,)), distance=[0.4] * 4 + [0.2] * 4)
    finish(runs, CellConfig(threshold=2.0, eps=(0.3,)), distance=[0.4] * 3 + [0.2] * 5, radius=[0.1] * 8)
    page = report()
    best = [element["data-v"] for element in page.elements if "best" in element.get("class", "")]
    assert [row["ε = 0.3 observed"] for row in page.table()] == ["100.0", "50.0", "37.5"]
    assert "0.5" in best
    assert "1" not in best


def test_many_flagged_series_are_cut_and_the_table_names_all(runs, report):
    for at in range(23):
        finish(runs, CellConfig(threshold=1.0 + at, eps=(0.3,)), attack_complete=False)
    page = report()
    assert "The attacks on 23 of 23 series" in page.text
    assert "cap 20: attacks incomplete 3 more; the table names all" in page.text
    assert [row["flags"] for row in page.table()] == ["attacks incomplete"] * 23


def test_the_cost_of_attacks_is_told_a_sample(runs, report):
    finish(runs, CellConfig(eps=(0.3,)), **COSTS)
    finish(runs, CellConfig(eps=(0.3,), seed=1), **COSTS | {"attack_gradients": 1600})
    page = report()
    assert "cost of attacks 150 gradients and 200 forwards a sample, 3 min 0 s" in page.text  # 2,400 / 16; 3,200 / 16
    (row,) = page.table()
    assert row["gradients a sample"] == "150"
    assert row["forwards a sample"] == "200"
    assert row["seconds of attacks"] == "90"
    assert row["ε = 0.3 spared"] == "2"


def test_certified_samples_that_attacks_spared_are_told(runs, report):
    skipped = {"certified_skipped_eps_0.1": 4, "certified_skipped_eps_0.3": 2}
    finish(runs, CellConfig(eps=(0.1, 0.3)), **skipped)
    finish(runs, CellConfig(eps=(0.1, 0.3), seed=1), **skipped)
    text = report().text
    assert "Attacks at a fixed ε spared 8 samples certified there; an audit attacks these too." in text
    assert "Spared: samples that attacks at this ε left out" in text


def test_the_tightest_certificates_are_a_headline(runs, report):
    for threshold, seed, median in ((0.5, 0, 0.5), (0.5, 1, 0.7), (2.0, 0, 0.4), (2.0, 1, 0.4)):
        finish(runs, CellConfig(threshold=threshold, seed=seed, eps=(0.3,)), tightness_median=median)
    finish(runs, CellConfig(threshold=4.0, eps=(0.3,)), tightness_median=0.9, diverged=True)
    page = report()
    assert "tightest: median radius / distance 0.60 cap at threshold 0.5; 0.40 to 0.60 over all" in page.text
    medians = [row["medianradius / distance"] for row in page.table()]
    assert [text.split()[0] for text in medians] == ["0.6", "0.4", "0.9"]
    assert [one["tightness_median"] for one in page.data["series"]] == [pytest.approx(0.6), 0.4, None]


def test_attacks_of_a_cascade_are_headed_and_told_as_such(runs, report):
    results = {"accuracy_pgd_eps_0.3": 0.5}
    finish(runs, CellConfig(eps=(0.3,)), **results)
    page = report()
    assert page.table()[0]["ε = 0.3 after pgd"] == "50.0"
    assert "After X: the accuracy that the attack X and the cheaper ones before it left." in page.text
    finish(runs, CellConfig(eps=(0.3,), threshold=2.0, attack_schedule="each"), **results)
    page = report()
    assert [row["ε = 0.3 pgd"] for row in page.table()] == ["50.0", "50.0"]
    assert {row["attack_schedule"] for row in page.table()} == {"cascade", "each"}
    assert "In a cascade the accuracy of an attack is what it and the cheaper ones before it left." in page.text


def test_observed_values_stand_beside_what_is_certified_on_the_same_samples(runs, report):
    results = {"certified_accuracy_eps_0.3": 0.625, "certified_accuracy_attacked_eps_0.3": 0.25, "attacked_count": 4}
    finish(runs, CellConfig(eps=(0.3,)), **results, **{"worst_case_accuracy_eps_0.3": 0.5})
    page = report()
    assert "on the attacked 4: 25.0 % certified, 50.0 % observed" in page.text
    assert "ε = 0.3, all certified ε = 0.3, attacked certified ε = 0.3, attacked observed" in page.text
    heads = [element for element in page.elements if element.get("aria-sort")]
    assert [head["class"] for head in heads].count("v-main v-attacks num") == 3


def test_environment_and_axes_of_the_study_are_told(runs, report):
    study(runs)
    text = report().text
    for fact in ("speccert 9.8.7", "torch 7.6.5", "Python 3.99", "machine abacus", "compute time 6 min 0 s"):
        assert fact in text
    for fact in ("cells 6 done", "constraints cap, none", "thresholds 0.5, 2, ∞", "seeds 0, 1", "ℓ₂ of size 0.1, 0.3"):
        assert fact in text


def test_the_first_line_is_the_sandwich(runs, report):
    study(runs)
    assert report().text.partition("≤")[0].endswith("certified accuracy ")
    assert "certified accuracy ≤ true robust accuracy ≤ observed accuracy under attack" in report().text


def test_missing_cells_are_rows_with_their_state_and_error(runs, report):
    finish(runs, CellConfig(threshold=0.5, eps=(0.3,)))
    fail(runs, CellConfig(threshold=0.5, seed=1, eps=(0.3,)), "out of memory: tried 3 GiB")
    fail(runs, CellConfig(threshold=1.0, eps=(0.3,)), "loss of the wrong shape", "Traceback: line 7 in forward")
    RunFolder.of(runs, CellConfig(threshold=2.0, eps=(0.3,))).create(CellConfig(threshold=2.0, eps=(0.3,)))
    page = report()
    first, second, third = page.table()
    assert first["cells"] == "1 done 1 failed out of memory: tried 3 GiB"
    assert first["ε = 0.3 certified"] == "25.0"
    assert second["cells"] == "failed loss of the wrong shape"
    assert third["cells"] == "interrupted"
    assert {row[name] for row in (second, third) for name in ("clean", "ε = 0.3 certified", "tightness")} == {MISSING}
    assert "Traceback: line 7 in forward" in page.text
    assert "2026-01-02T03:04:05" in page.text


def test_the_table_shows_means_intervals_and_marks_the_best(runs, report):
    finish(runs, CellConfig(threshold=0.5, seed=0, eps=(0.3,)), clean_accuracy=0.5)
    finish(runs, CellConfig(threshold=0.5, seed=1, eps=(0.3,)), clean_accuracy=0.52)
    finish(runs, CellConfig(threshold=2.0, eps=(0.3,)), clean_accuracy=0.25)
    page = report()
    half = stats.t.ppf(0.975, 1) * 0.01 * 100
    assert [row["clean"] for row in page.table()] == [f"51.0 ± {half:.1f}", "25.0"]
    assert [row["threshold"] for row in page.table()] == ["0.5", "2"]
    marked = [element for element in page.elements if "best" in (element.get("class") or "") and "data-v" in element]
    assert "0.51" in {element["data-v"] for element in marked}
    assert "0.25" not in {element["data-v"] for element in marked if element["class"] == "v-main num best"}


def test_a_study_without_a_finished_cell_says_so(runs, report):
    fail(runs, CellConfig(), "no such file")
    page = report()
    assert "No cell is finished yet" in page.text
    assert page.data["series"] == page.data["cells"] == page.data["points"] == []
    assert len(page.table()) == 1


def test_a_study_without_attacks_has_no_observed_values(runs, report):
    finish(runs, CellConfig(attacks=(), eps=(0.3,)), distance=NO_ATTACK)
    page = report()
    (one,) = page.data["series"]
    assert "Nothing was attacked" in page.text
    assert one["observed"] is None
    assert one["sandwich"]["observed"] == [[None, None]]
    assert one["certified"][0] == share(RADIUS, 0)
    assert page.data["points"] == []


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_other_norms_use_their_own_radii(runs, report, norm):
    finish(runs, CellConfig(norm=norm, attacks=("deepfool",), eps=(0.3,)))
    page = report()
    assert page.data["settings"][0]["norm"] == norm
    assert page.data["series"][0]["certified"][0] == share(RADIUS, 0)


def test_settings_that_differ_are_kept_apart(runs, report):
    study(runs, model="liresnet")
    study(runs, dataset="mnist", eps=[0.3])
    page = report()
    data = page.data
    assert [setting["name"] for setting in data["settings"]] == ["digits, liresnet", "mnist, mlp"]
    assert [len([one for one in data["series"] if one["setting"] == at]) for at in (0, 1)] == [3, 3]
    assert {cell["setting"] for cell in data["cells"]} == {0, 1}
    assert list(page.table()[0])[:5] == ["dataset", "model", "constraint", "threshold", "cells"]


def test_a_setting_that_differs_within_a_data_set_names_its_cells(runs, report):
    for width in (8, 16):
        finish(runs, CellConfig(width=width))
    page = report()
    assert [setting["name"] for setting in page.data["settings"]] == ["width 8", "width 16"]
    assert [row["width"] for row in page.table()] == ["8", "16"]


def test_what_a_run_recorded_of_its_bounds_is_embedded(runs, report):
    old, new = finish(runs, CellConfig(seed=0)), finish(runs, CellConfig(seed=1))
    record(new)
    cells = {cell["id"]: cell for cell in report().data["cells"]}
    assert cells[new.id]["bounds"] == BOUNDS
    assert cells[old.id]["bounds"] is cells[old.id]["closest"] is None


@pytest.mark.parametrize("name", ["bounds.json", "closest.safetensors"])
def test_a_damaged_file_is_named(runs, report, name):
    (finish(runs, CellConfig()).path / name).write_bytes(b"{")
    with pytest.raises(StoreError, match=f"{name}: damaged"):
        report()


def pixels(uri):
    kind, content = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 2), (5, 3)])
def test_pictures_are_the_images_to_8_bits(runs, report, shape):
    folder = finish(runs, CellConfig())
    arrays = record(folder, shape=shape, count=2)
    for at, one in enumerate(report().data["cells"][0]["closest"]):
        assert (one["label"], one["prediction"], one["index"]) == (1, 7, at)
        assert (one["distance"], one["radius"]) == (arrays["distance"][at], 0.25)
        assert one["largest"] == pytest.approx(0.25, abs=1e-6)
        for name, uri in zip(("x", "x_adv"), one["pictures"], strict=False):
            image = np.clip(arrays[name][at], 0, 1)
            shown = pixels(uri) if len(shape) == 2 or shape[0] == 1 else pixels(uri).transpose(2, 0, 1)
            assert np.abs(shown.reshape(shape) / 255 - image).max() <= 0.51 / 255


def test_the_picture_of_a_change_is_white_where_there_is_none(runs, report):
    record(finish(runs, CellConfig()), shape=(1, 2, 2))
    change = pixels(report().data["cells"][0]["closest"][0]["pictures"][2])
    up, down, *none = change.reshape(4, 3).astype(int)
    assert (np.array(none) == 255).all()
    assert up[0] > up[2]
    assert down[0] < down[2]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 3)])
def test_flat_inputs_have_no_pictures(runs, report, shape):
    record(finish(runs, CellConfig()), shape=shape)
    assert all("pictures" not in one for one in report().data["cells"][0]["closest"])


def test_large_pictures_are_averaged_down_and_leave_room(runs, report):
    generator = np.random.default_rng(0)
    for seed in range(12):
        folder = finish(runs, CellConfig(seed=seed))
        arrays = record(folder, shape=(3, 80, 80), count=12)
        from safetensors.numpy import save_file

        noise = generator.random(arrays["x"].shape).astype(np.float32)
        save_file(arrays | {"x": noise, "x_adv": noise[::-1].copy()}, folder.closest_path)
    page = report()
    left_out = [cell for cell in page.data["cells"] if cell.get("pictures_left_out")]
    assert 0 < len(left_out) < 12
    shown = next(cell for cell in page.data["cells"] if not cell.get("pictures_left_out"))
    assert pixels(shown["closest"][0]["pictures"][0]).shape == (64, 64, 3)
    assert "Images fill 1 MB at most" in page.text
    assert len(page.source) < 1_500_000


def test_every_text_of_a_study_is_inert(runs, report):
    finish(runs, CellConfig(dataset=f"{HOSTILE}.npz"))
    fail(runs, CellConfig(dataset=f"{HOSTILE}.npz", seed=1), f"bad </script>{HOSTILE}", f"</pre>{HOSTILE}")
    finish(runs, CellConfig(dataset=f"{HOSTILE}.npz", seed=2), machine=f'"{HOSTILE}')
    page = report()
    assert not [element for element in page.elements if element["tag"] == "img" or "onerror" in element]
    assert [element["tag"] for element in page.elements].count("script") == 2
    assert HOSTILE in page.text
    assert page.data["config"]["shared"]["dataset"] == f"{HOSTILE}.npz"
    assert "<img" not in page.source


def test_equal_folders_give_equal_bytes(runs, tmp_path):
    for folder in study(runs):
        record(folder)
    first, second = (write_report(runs, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_the_page_needs_nothing_from_outside_and_runs_its_own_script_only(runs, report):
    for folder in study(runs):
        record(folder)
    page = report()
    assert not re.search(r"https?:|//[\w.]+/|@import|url\(", page.source)
    assert {element["tag"] for element in page.elements} & {"link", "iframe", "object", "embed", "base"} == set()
    (policy,) = [element["content"] for element in page.elements if element.get("http-equiv")]
    assert policy.startswith("default-src 'none';")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not [element for element in page.elements if "style" in element]


def test_embedded_configs_are_those_of_the_cells(runs, report):
    finish(runs, CellConfig(width=16, threshold=math.inf))
    fail(runs, CellConfig(width=None, eps=(0.5,), attacks=()), "no")
    config = report().data["config"]
    for name, *values in config["rows"]:
        built = config["shared"] | dict(zip(config["differing"], values, strict=True))
        assert CellConfig.from_json(json.dumps({"format": 2, **built})) == RunFolder(runs / name).read_config()
        assert isinstance(built["batch_size"], int)


def test_json_has_null_for_what_is_not_finite_and_no_markup():
    text = to_json({"a": math.nan, "b": [math.inf, np.float64(-math.inf)], "c": (np.int64(3), "</script>&")})
    assert json.loads(text) == {"a": None, "b": [None, None], "c": [3, "</script>&"]}
    assert not set("<>&") & set(text)


def test_the_best_of_each_bucket_come_first_and_keep_their_order():
    items = [("a", 1), ("a", 3), ("b", 0), ("a", 2), ("b", 5)]
    chosen = best_of_each(items, lambda item: item[0], lambda item: item[1], 3)
    assert chosen == [("a", 3), ("a", 2), ("b", 5)]  # b has its turn before the second of a
    assert best_of_each(items, lambda item: item[0], lambda item: item[1], 5) == items


def test_many_series_are_cut_to_the_best_and_the_table_keeps_all(runs, report):
    for at in range(65):
        radius = [0.2 + at / 100] * 8
        finish(runs, CellConfig(threshold=1.0 + at, eps=(0.5,)), radius=radius, distance=[2.0] * 8)
    finish(runs, CellConfig(constraint="none", threshold=math.inf, eps=(0.5,)), radius=[0.0] * 8)
    page = report()
    assert len(page.data["series"]) == len(page.data["cells"]) == 60
    assert page.data["series"][-1]["name"] == "none"
    assert page.data["series"][-2]["threshold"] == 65.0
    assert len(page.table()) == 66
    assert "Charts show 60 of 66 combinations" in page.text


def test_no_run_is_refused(runs, tmp_path):
    runs.mkdir()
    with pytest.raises(ValueError, match="expected at least one run"):
        write_report(runs, tmp_path / "report.html")


def test_the_report_needs_no_torch():
    code = "import sys, speccert.experiments.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "False"


def test_the_path_comes_back_and_its_folder_is_made(runs, tmp_path):
    finish(runs, CellConfig())
    path = tmp_path / "deep" / "page.html"
    assert write_report(str(runs), str(path)) == path
