"""The report in headless Chromium: skipped where playwright or Chromium is missing."""

import json
import math
import os
import re
import shutil

import pytest
from report_runs import DISTANCE, RADIUS, fail, finish, record, share

from speccert.experiments.config import ADDED, CellConfig
from speccert.experiments.report import write_report
from speccert.experiments.report_html import MISSING
from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = os.environ.get("SPECCERT_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path, nor named by SPECCERT_CHROMIUM")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
HOSTILE = "<img src=x onerror=document.title='pwned'>"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Cap and two baselines with two seeds, cells that failed, wait or diverged, and another data set."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    shared = {"eps": [0.1, 0.3], "thresholds": [0.5, 1, math.inf]}
    spec = {"constraints": ["cap", "none", "gradient-clip"], "seeds": [0, 1], **shared}
    for at, cell in enumerate(RunSpec.from_mapping(spec).cells()):
        record(finish(runs, cell, radius=[value * (1 - at / 20) for value in RADIUS], clean_accuracy=0.5 + at / 100))
    fail(runs, CellConfig(threshold=4.0, eps=(0.1, 0.3)), f"out of memory {HOSTILE}", f"deep </pre>{HOSTILE}")
    waiting = CellConfig(threshold=8.0, eps=(0.1, 0.3))
    RunFolder.of(runs, waiting).create(waiting)
    finish(
        runs,
        CellConfig(threshold=2.0, eps=(0.1, 0.3)),
        radius=[0.0] * 8,
        diverged=True,
        history={"gradient_norm": [9.0, math.nan]},
    )
    other = CellConfig(dataset=f"{HOSTILE}.npz", constraint="orthogonal", eps=(0.2,))
    record(finish(runs, other), shape=(3, 4, 4))
    return write_report(runs, runs / "report.html")


@pytest.fixture
def opened(browser, report):
    """Opens the report, and fails on any message, error or request of it."""
    contexts, troubles = [], []

    def visit(path=report, setting=None, **options):
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))

        def answer(route):
            if route.request.url == path.as_uri():
                route.continue_()
            else:
                troubles.append(f"request of {route.request.url}")
                route.abort()

        page.route("**/*", answer)
        page.goto(path.as_uri())
        if setting:
            page.locator("#setting").select_option(setting)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def column(page, name, table="#robustness"):
    """Texts of a column in the rows shown, by the text of its header."""
    heads = [re.sub(r"\s+", " ", text) for text in page.locator(f"{table} thead th").all_text_contents()]
    at = next(at for at, head in enumerate(heads) if head.strip() == name)
    return page.locator(f"{table} tbody tr:not([hidden]) > :nth-child({at + 1})").all_text_contents()


def numbers(texts):
    return [float(text.split()[0]) for text in texts if text != MISSING]


def test_headers_sort_by_mouse_and_keyboard_with_missing_last(opened):
    page = opened()
    head = page.locator("#robustness thead th", has_text="clean")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    values = column(page, "clean")
    assert numbers(values) == sorted(numbers(values), reverse=True)
    assert values[-2:] == [MISSING, MISSING]
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    values = column(page, "clean")
    assert numbers(values) == sorted(numbers(values))
    assert values[-2:] == [MISSING, MISSING]
    threshold = page.locator("#robustness thead th", has_text="threshold")
    threshold.get_by_role("button").press("Space")
    assert threshold.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") == "none"
    assert column(page, "threshold") == ["0.5", "1", "1", "2", "4", "8", "∞", "∞", "∞"]


def test_text_and_choices_filter_the_rows(opened):
    page = opened()
    count = page.locator("#table-controls output")
    assert count.text_content() == "9 of 9 rows"
    page.get_by_role("searchbox").fill("OUT of memory")
    assert count.text_content() == "1 of 9 rows"
    assert column(page, "threshold") == ["4"]
    page.get_by_role("searchbox").fill("")
    page.locator("#table-controls").get_by_label("constraint").select_option("cap")
    assert set(column(page, "constraint")) == {"cap"}
    page.locator("#table-controls").get_by_label("state").select_option("interrupted")
    assert column(page, "threshold") == ["8"]
    assert count.text_content() == "1 of 9 rows"


def test_views_choose_the_columns(opened):
    page = opened()
    bound = page.locator("#robustness thead th", has_text="lower estimate")
    assert not bound.is_visible()
    page.get_by_label("bounds and costs").check(force=True)
    assert bound.is_visible()
    assert not page.locator("#robustness thead th", has_text="certified").first.is_visible()


def test_hovering_a_curve_tells_all_values_at_that_eps(opened):
    page = opened(setting="1")
    panel = page.locator("#curves .panel").first
    svg = panel.locator("> svg")
    svg.scroll_into_view_if_needed()
    area = svg.bounding_box()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + 50)
    tip = panel.locator(".tip")
    assert tip.is_visible()
    eps = float(tip.locator("strong").text_content().removeprefix("ε = "))
    assert tip.locator("tr").count() == 1 + 3  # a head, and three thresholds: the fourth has diverged
    last = tip.locator("tr").last.locator("td").all_text_contents()
    assert last[1] == "threshold ∞"
    scaled = [[value * (1 - at / 20) for value in RADIUS] for at in (4, 5)]
    assert float(last[2]) == pytest.approx(100 * sum(share(radius, eps) for radius in scaled) / 2, abs=0.051)
    assert float(last[3]) == pytest.approx(100 * share(DISTANCE, eps), abs=0.051)
    page.mouse.move(5, 5)
    assert not tip.is_visible()


@pytest.mark.parametrize("section", ["curves", "sandwich", "scatter", "bounds", "training"])
def test_arrow_keys_walk_through_every_chart(opened, section):
    page = opened(setting="1")
    panel = page.locator(f"#{section} .panel").first
    panel.locator("> svg").focus()
    page.keyboard.press("End")
    last = panel.locator(".tip").inner_text()
    page.keyboard.press("Home")
    first = panel.locator(".tip").inner_text()
    assert last != first
    assert panel.locator(".tip").get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowRight")
    assert panel.locator(".tip").inner_text() != first
    page.keyboard.press("Escape")
    assert not panel.locator(".tip").is_visible()


def test_the_legend_hides_and_shows_a_series_everywhere(opened):
    page = opened(setting="1")
    lines = page.locator("#curves path[data-series='threshold 0.5']")
    assert lines.count() == 1
    button = page.locator("#curves .legend button", has_text="threshold 0.5")
    button.press("Enter")
    assert lines.count() == 0
    for section in ("curves", "scatter", "training"):
        assert (
            page.locator(f"#{section} .legend button[data-label='threshold 0.5']").get_attribute("aria-pressed")
            == "false"
        )
    page.keyboard.press("Enter")  # the button has kept the focus
    assert lines.count() == 1


def test_a_diverged_series_is_named_in_the_legend(opened):
    assert "(cap: 1 of 1 diverged)" in opened(setting="1").locator("#curves .legend").inner_text()


def test_the_sandwich_is_drawn_at_the_chosen_eps(opened):
    page = opened(setting="1")
    label = "#sandwich .panel .axis .title"
    assert any("ε = 0.3" in text for text in page.locator(label).all_text_contents())
    page.locator("#sandwich .switch").get_by_label("0.1").check(force=True)
    assert any("ε = 0.1" in text for text in page.locator(label).all_text_contents())


def test_cells_are_chosen_for_layers_and_images(opened):
    page = opened(setting="1")
    choice = page.locator("#bounds .cell-body select")
    choice.select_option(label="none, seed 1")
    rows = page.locator("#bounds .cell-body tbody tr")
    assert rows.count() == 2
    assert "0.75" in rows.first.inner_text()
    assert page.locator("#images img").count() == 9
    assert page.locator("#images article").first.inner_text().startswith("original")
    assert all(page.locator("#images img").evaluate_all("all => all.map(one => one.naturalWidth === 2)"))
    choice = page.locator("#bounds .cell-body select")
    choice.select_option(label="cap 2, seed 0 (diverged)")
    assert "not recorded" in page.locator("#bounds .cell-body").inner_text()
    assert "not recorded" in page.locator("#images .cell-body").inner_text()


def test_another_setting_redraws_the_charts(opened):
    page = opened()
    assert page.locator("#curves .panel figcaption").all_text_contents() == ["orthogonal"]
    page.locator("#setting").select_option("1")
    assert page.locator("#curves .panel figcaption").all_text_contents() == ["cap", "baselines"]


def test_the_config_of_any_cell_is_shown(opened, report):
    page = opened()
    page.locator("#config summary").click()
    box = page.locator("#config-cell")
    for at in (0, 3):
        box.select_option(str(at))
        name = box.locator("option:checked").text_content().split()[0]
        shown = json.loads(page.locator("#config-json").text_content())
        stored = json.loads((report.parent / name / "config.json").read_text())
        assert {"format": 2, **shown} == {**ADDED, **stored}  # not stored where they mean what they meant before


def test_texts_of_the_study_are_inert(opened):
    page = opened()
    page.locator("#failed summary").click()
    assert HOSTILE in page.locator("#failed pre").text_content()
    assert page.title() != "pwned"
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(opened, scheme):
    page = opened(color_scheme=scheme)

    def lightness():
        return sum(map(float, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    before = lightness()
    assert (before > 600) == (scheme == "light")
    page.locator("#theme").press("Enter")
    assert (lightness() > 600) != (scheme == "light")
    page.locator("#theme").press("Enter")
    assert lightness() == before


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_no_width_scrolls_sideways(opened, width):
    page = opened(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """all => all.filter(one => one.getBoundingClientRect().right > innerWidth + 1).length"""
    assert page.locator(".panel, .panel > svg, .controls > *, h1, h2, p").evaluate_all(beyond) == 0


def test_no_label_of_a_chart_is_cut_or_overlaps(opened):
    page = opened(setting="1", viewport=PHONE)
    found = page.locator(".panel > svg").evaluate_all(
        """all => all.flatMap(svg => {
          const frame = svg.getBoundingClientRect();
          const boxes = [...svg.querySelectorAll("text:not([transform])")].map(text => text.getBoundingClientRect());
          const cut = boxes.filter(box =>
            box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1);
          const over = boxes.filter((a, i) => boxes.some((b, j) => j > i && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 3 && b.top < a.bottom - 3));
          return [cut.length, over.length];
        })"""
    )
    assert set(found) == {0}


def test_everything_is_printed_on_white(opened, tmp_path):
    page = opened(color_scheme="dark")
    page.locator("#theme").click()
    page.locator("#theme").click()
    path = tmp_path / "report.pdf"
    page.pdf(path=path, prefer_css_page_size=True)
    assert path.stat().st_size > 20_000
    assert path.read_bytes().startswith(b"%PDF")
    assert page.locator("#failed details").get_attribute("open") is None
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#failed pre").is_visible()
    assert not page.locator("#theme").is_visible()
    assert not page.locator("#table-controls").is_visible()
    titles = page.locator("#sandwich figcaption").all_text_contents()
    assert titles == ["orthogonal, ε = 0.2", "cap, ε = 0.1", "cap, ε = 0.3"]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("#failed details").get_attribute("open") is None


def test_without_scripts_summary_and_table_are_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".banner").is_visible()
    assert page.locator("#robustness tbody tr").count() == 9
    assert page.locator("#robustness thead th", has_text="lower estimate").is_visible()
    assert not page.locator("#curves").is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator("noscript").count() == 1


def test_a_study_without_a_finished_cell_opens(opened, tmp_path):
    fail(tmp_path / "runs", CellConfig(), "no data")
    page = opened(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert "No cell is finished yet" in page.locator("#summary").inner_text()
    assert not page.locator("#curves").is_visible()
    assert page.locator("#robustness tbody tr").count() == 1


@pytest.fixture(scope="module")
def doubted(tmp_path_factory):
    """Three cells of which two have flags, with all that attacks record of themselves."""
    runs = tmp_path_factory.mktemp("doubted") / "runs"
    names = ["black-box-wins", "flat-loss", "single-step-wins", "unbounded-fails", "vanishing-gradients"]
    costs = {"attack_forwards": 1600, "attack_gradients": 800, "attack_s": 90.0, "tightness_median": 0.5}
    spared = {"certified_skipped_eps_0.1": 4, "certified_skipped_eps_0.3": 2, "accuracy_pgd_eps_0.3": 0.5}
    for threshold, flags, complete in ((0.5, [], True), (1.0, names, False), (2.0, [], False)):
        cell = CellConfig(threshold=threshold, eps=(0.1, 0.3))
        record(finish(runs, cell, masking_flags=flags, attack_complete=complete, **costs, **spared))
    return write_report(runs, runs / "report.html")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (820, "dark"), (1280, "light")])
def test_flags_are_seen_at_every_width(opened, doubted, width, scheme):
    page = opened(doubted, viewport={"width": width, "height": 844}, color_scheme=scheme)
    banner = page.locator(".banner.doubted")
    assert banner.is_visible()
    assert banner.locator("li").all_text_contents()[1] == "cap 2: attacks incomplete"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = banner.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    colours = banner.locator("strong").evaluate(
        "one => [getComputedStyle(one).color, getComputedStyle(one.parentNode).backgroundColor]"
    )
    levels = [[int(part) / 255 for part in re.findall(r"\d+", colour)[:3]] for colour in colours]
    linear = [[part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in one] for one in levels]
    light, dark = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, success criterion 1.4.3


def test_rows_are_filtered_by_their_flags(opened, doubted):
    page = opened(doubted)
    assert column(page, "flags")[0] == MISSING
    choice = page.locator("#table-controls").get_by_label("flags")
    assert choice.locator("option:checked").text_content() == "all"
    choice.select_option("attacks incomplete")
    assert column(page, "threshold") == ["2"]


def test_costs_are_in_the_view_of_the_attacks(opened, doubted):
    page = opened(doubted)
    costs = page.locator("#robustness thead th", has_text="gradients a sample")
    assert not costs.is_visible()
    assert page.locator("#robustness thead th", has_text="median").is_visible()
    page.get_by_label("attacks", exact=True).check(force=True)
    assert costs.is_visible()
    assert page.locator("#robustness thead th", has_text="after pgd").first.is_visible()


def test_the_median_of_radius_over_distance_is_told_of_a_cell(opened, doubted):
    facts = opened(doubted).locator("#bounds .cell-body .facts")
    assert facts.locator("div", has_text="median radius / distance").locator("dd").text_content() == "0.5"


def test_violations_are_red_crosses(opened, tmp_path):
    finish(tmp_path / "runs", CellConfig(eps=(0.3,)), distance=[0.05, *DISTANCE[1:]])
    page = opened(write_report(tmp_path / "runs", tmp_path / "report.html"))
    assert page.locator("#scatter .broken-point").count() == 1
    assert page.get_by_role("alert").is_visible()
