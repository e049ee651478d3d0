import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_runs import record

from speccert.experiments.config import CellConfig
from speccert.experiments.plots import (
    plot_accuracy_over_eps,
    plot_gradient_norms,
    plot_radius_against_distance,
    plot_sandwich,
    plot_tightness,
    save_figure,
    write_figures,
)
from speccert.experiments.spec import RunSpec
from speccert.experiments.store import RunFolder
from speccert.experiments.tables import collect_runs

PLOTS = {
    "eps": plot_accuracy_over_eps,
    "sandwich": lambda runs: plot_sandwich(runs, 0.3),
    "scatter": plot_radius_against_distance,
    "gradients": plot_gradient_norms,
    "tightness": plot_tightness,
}
# Ten samples: eight right, one of them certified nowhere; the last two are not attacked.
RADIUS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.0, 0.0, 0.0, 0.9, 0.9]
DISTANCE = [0.2, 0.4, 0.6, 0.8, math.inf, 0.3, 0.0, 0.0, math.nan, math.nan]
RIGHT = [True] * 6 + [False] * 2 + [True] * 2


def finish(output, cell, *, radius=RADIUS, distance=DISTANCE, gradients=(4.0, 1.0), diverged=False, **results):
    folder = RunFolder.of(output, cell)
    folder.create(cell)
    attacked = [not math.isnan(value) for value in distance]
    samples = {
        "index": range(10),
        "label": [1] * 10,
        "prediction": [1 if right else 0 for right in RIGHT],
        "margin": [0.5] * 10,
        f"radius_{cell.norm}": radius,
        "radius_l2": radius,
        "attacked": attacked,
        "distance": distance,
    }
    folder.write_samples(pd.DataFrame(samples))
    epochs = range(1, 1 + len(gradients))
    folder.write_history(pd.DataFrame({"epoch": epochs, "train_loss": 1.0, "gradient_norm": gradients}))
    folder.write_summary({"diverged": diverged, **results})
    return folder


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def close_to(image, colour):
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(image - rgb).max(-1) < 12).sum())


@pytest.fixture
def sweep(tmp_path):
    spec = {"constraints": ["cap", "none"], "thresholds": [0.5, 2, math.inf], "seeds": [0, 1], "eps": [0.3]}
    for cell in RunSpec.from_mapping(spec).cells():
        finish(tmp_path, cell)
    return tmp_path


def test_curves_are_the_shares_of_the_attacked_samples(tmp_path):
    finish(tmp_path, CellConfig())
    (axes,) = plot_accuracy_over_eps(tmp_path, eps_max=0.8).axes
    certified, observed = axes.lines
    for eps, y in zip(*certified.get_data(), strict=True):
        assert y == pytest.approx(100 * sum(r > eps for r in RADIUS[:8]) / 8)
    for eps, y in zip(*observed.get_data(), strict=True):
        assert y == pytest.approx(100 * sum(d > eps for d in DISTANCE[:8]) / 8)
    assert certified.get_linestyle() == "-"
    assert observed.get_linestyle() == "--"


def test_certified_never_passes_observed(sweep):
    for axes in plot_accuracy_over_eps(sweep).axes:
        for certified, observed in zip(axes.lines[::2], axes.lines[1::2], strict=True):
            assert (certified.get_ydata() <= observed.get_ydata()).all()


def test_without_attacks_all_samples_are_certified_and_none_observed(tmp_path):
    finish(tmp_path, CellConfig(), distance=[math.nan] * 10)
    (axes,) = plot_accuracy_over_eps(tmp_path).axes
    certified, observed = axes.lines
    assert certified.get_ydata()[0] == pytest.approx(70)  # seven of ten radii are positive
    assert np.isnan(observed.get_ydata()).all()
    with pytest.raises(ValueError, match="expected attacked samples that are classified right, got none"):
        plot_radius_against_distance(tmp_path)


def test_the_norm_of_the_cell_is_used(tmp_path):
    cell = CellConfig(norm="linf", attacks=("pgd",))
    finish(tmp_path, cell, radius=[0.05] * 8 + [0.0] * 2)
    figure = plot_accuracy_over_eps(tmp_path, eps_max=0.1)
    assert "infty" in figure.axes[0].get_xlabel()


def test_sandwich_points_by_hand(tmp_path):
    finish(tmp_path, CellConfig(threshold=1.0))
    finish(tmp_path, CellConfig(threshold=math.inf))
    finish(tmp_path, CellConfig(constraint="none", threshold=math.inf))
    (axes,) = plot_sandwich(tmp_path, 0.3).axes
    drawn = [np.asarray(container.lines[0].get_ydata()).tolist() for container in axes.containers[:3]]
    # at 0.3, of eight attacked samples: 6 right; distances above 0.3: 0.4, 0.6, 0.8, inf; radii above 0.3: 2
    assert drawn == [[75.0, 75.0], [50.0, 50.0], [25.0, 25.0]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "∞", "none"]


def test_sandwich_error_bars_are_the_interval_over_seeds(tmp_path):
    finish(tmp_path, CellConfig(seed=0))
    finish(tmp_path, CellConfig(seed=1), radius=[0.0] * 8 + [0.9] * 2)
    (axes,) = plot_sandwich(tmp_path, 0.3).axes
    certified = axes.containers[2]
    assert certified.lines[0].get_ydata()[0] == pytest.approx(25 / 2)
    (bar,) = certified.lines[2]
    low, high = bar.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(12.7062 * 25 / 2, rel=1e-5)  # t for two seeds, s / sqrt(2) = 25 / 2


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_sandwich_needs_a_good_eps(sweep, eps):
    with pytest.raises(ValueError, match="eps must be finite and >= 0, got"):
        plot_sandwich(sweep, eps)


def test_scatter_holds_every_right_attacked_sample(tmp_path):
    finish(tmp_path, CellConfig())
    figure = plot_radius_against_distance(tmp_path)
    found, missed, broken = [c.get_offsets() for c in figure.axes[0].collections[-3:]]
    assert found.tolist() == [[0.1, 0.2], [0.2, 0.4], [0.3, 0.6], [0.4, 0.8], [0.0, 0.3]]
    assert missed[:, 0].tolist() == [0.5]
    assert len(broken) == 0
    assert "certificate broken" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_broken_certificate_is_drawn_red(tmp_path):
    finish(tmp_path, CellConfig(seed=0))
    whole = pixels(plot_radius_against_distance(tmp_path))
    finish(tmp_path, CellConfig(seed=1), radius=[0.5, *RADIUS[1:]])
    figure = plot_radius_against_distance(tmp_path)
    assert "certificate broken" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert close_to(whole, "#CC0000") == 0
    assert close_to(pixels(figure), "#CC0000") > 10


def test_tightness_is_the_median_ratio_between_its_quartiles(tmp_path):
    finish(tmp_path, CellConfig(threshold=1.0))  # ratios 1/2 four times, and 0: the broken sample that has no radius
    finish(tmp_path, CellConfig(threshold=2.0), radius=[0.2, 0.32, 0.36, 0.4, 0.5, 0.03, 0, 0, 0.9, 0.9])
    (axes,) = plot_tightness(tmp_path).axes
    median, limit = axes.lines
    # the second: 1, 0.8, 0.6, 0.5, 0.1 in order, of which 0.6 is the middle, 0.5 and 0.8 the quartiles
    assert median.get_ydata().tolist() == [0.5, pytest.approx(0.6)]
    assert limit.get_ydata() == [1, 1]
    band = axes.collections[0].get_paths()[0].vertices
    for at, low, high in ((0, 0.5, 0.5), (1, 0.5, 0.8)):
        assert (band[band[:, 0] == at, 1].min(), band[band[:, 0] == at, 1].max()) == pytest.approx((low, high))
    assert axes.get_ylim() == (0, pytest.approx(1.05))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]


def test_tightness_is_averaged_over_seeds_and_leaves_diverged_runs_out(tmp_path):
    finish(tmp_path, CellConfig(seed=0))
    finish(tmp_path, CellConfig(seed=1), radius=[value / 2 for value in RADIUS])
    finish(tmp_path, CellConfig(seed=2), radius=[0.0] * 10, diverged=True)
    (axes,) = plot_tightness(tmp_path).axes
    assert axes.lines[0].get_ydata().tolist() == [(0.5 + 0.25) / 2]
    assert axes.patches[0].get_height() == 0  # both quartiles lie at the median


def test_baselines_stand_beside_the_thresholds_by_themselves(sweep):
    (axes,) = plot_tightness(sweep).axes
    main, baseline = axes.lines[:2]
    assert (main.get_xdata()[0], main.get_xdata()[-1], list(baseline.get_xdata())) == (0, 2, [3])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.5", "2", "∞", "none"]


def test_a_tightness_above_one_is_inside_the_picture(tmp_path):
    finish(tmp_path, CellConfig(), radius=[0.4, 0.8, *RADIUS[2:]])  # ratios 2, 2, 1/2, 1/2, 0
    (axes,) = plot_tightness(tmp_path).axes
    assert axes.get_ylim()[1] == pytest.approx(1.05 * 2)  # the upper quartile


@pytest.mark.parametrize("distance", [[math.nan] * 10, [math.inf] * 6 + [0.0] * 2 + [math.nan] * 2])
def test_tightness_without_a_distance_is_drawn_empty(tmp_path, distance):
    finish(tmp_path, CellConfig(), distance=distance)
    (axes,) = plot_tightness(tmp_path).axes
    assert np.isnan(axes.lines[0].get_ydata()).all()


@pytest.mark.parametrize("results", [{"masking_flags": ["flat-loss"]}, {"attack_complete": False}])
@pytest.mark.parametrize("kind", ["eps", "sandwich", "scatter", "tightness"])
def test_a_dagger_marks_attacks_that_may_have_been_too_weak(sweep, kind, results):
    def told(figure):
        texts = [*figure.legends[0].get_texts(), *figure.axes[0].get_xticklabels()]
        return [text.get_text() for text in texts if "†" in text.get_text()]

    assert told(PLOTS[kind](sweep)) == []
    finish(sweep, CellConfig(threshold=4.0, eps=(0.3,)), **results)
    marked = told(PLOTS[kind](sweep))
    assert "† masked gradients or attacks cut short" in marked
    assert {text.removeprefix("threshold ") for text in marked} == {"4†", "† masked gradients or attacks cut short"}


def test_a_dagger_at_a_baseline_is_told_too(tmp_path):
    finish(tmp_path, CellConfig(constraint="none", threshold=math.inf), attack_complete=False)
    for plot in (plot_tightness, lambda runs: plot_sandwich(runs, 0.3)):
        texts = [text.get_text() for text in plot(tmp_path).legends[0].get_texts()]
        assert "† masked gradients or attacks cut short" in texts


def test_samples_of_the_best_run_of_each_constraint_are_pictured(tmp_path):
    for seed, value in enumerate((0.2, 0.4, 0.3)):
        best = finish(tmp_path / "runs", CellConfig(seed=seed), **{"certified_accuracy_eps_0.3": value})
        record(best, count=2)
    old = finish(tmp_path / "runs", CellConfig(constraint="clip"))
    paths = write_figures(tmp_path / "runs", tmp_path / "out")
    names = {path.stem for path in paths}
    assert {"bracket_cap", "bracket_clip", "closest_cap"} <= names
    assert "closest_clip" not in names
    assert not old.closest_path.exists()


def test_gradient_norms_are_means_over_seeds(tmp_path):
    finish(tmp_path, CellConfig(seed=0), gradients=(4.0, 1.0))
    finish(tmp_path, CellConfig(seed=1), gradients=(2.0, 3.0))
    (axes,) = plot_gradient_norms(tmp_path).axes
    assert axes.lines[0].get_ydata().tolist() == [3.0, 2.0]
    assert axes.lines[0].get_xdata().tolist() == [1, 2]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize("kind", PLOTS)
def test_both_files_are_written_and_readable(sweep, tmp_path_factory, kind):
    out = tmp_path_factory.mktemp("out")
    pdf, png = save_figure(PLOTS[kind](sweep), out / "a" / "figure.png", dpi=100)
    assert sorted(path.name for path in (out / "a").iterdir()) == ["figure.pdf", "figure.png"]
    assert pdf.read_bytes().startswith(b"%PDF")
    from matplotlib.image import imread

    image = imread(png)
    assert image.shape[1] > 300
    assert 0.01 < (image[..., :3].min(-1) < 0.95).mean() < 0.6


@pytest.mark.parametrize("kind", PLOTS)
def test_the_legend_lies_below_all_axes(sweep, kind):
    figure = PLOTS[kind](sweep)
    pixels(figure)
    (legend,) = figure.legends
    top = legend.get_window_extent().y1
    assert all(top <= axes.get_tightbbox().y0 for axes in figure.axes if axes.get_visible())
    assert legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_global_state_is_left_alone(sweep):
    before, backend = dict(mpl.rcParams), mpl.get_backend()
    save_figure(plot_radius_against_distance(sweep), sweep / "figure", dpi=50)
    assert dict(mpl.rcParams) == before
    assert mpl.get_backend() == backend


def test_every_threshold_has_its_own_colour(sweep):
    axes = plot_accuracy_over_eps(sweep).axes[0]
    assert len({str(line.get_color()) for line in axes.lines}) == 3


@pytest.mark.parametrize("kind", PLOTS)
def test_diverged_runs_are_named_and_unfinished_ones_left_out(sweep, kind):
    finish(sweep, CellConfig(threshold=4.0, eps=(0.3,)), diverged=True)
    RunFolder.of(sweep, CellConfig(threshold=8.0, eps=(0.3,))).create(CellConfig(threshold=8.0, eps=(0.3,)))
    figure = PLOTS[kind](sweep)
    texts = [text.get_text() for text in [*figure.legends[0].get_texts(), *figure.axes[0].get_xticklabels()]]
    assert any("(1 of 1 diverged)" in " ".join(text.split()) for text in texts)
    assert not any("8" in text and "threshold" in text for text in texts)


@pytest.mark.parametrize("kind", PLOTS)
def test_runs_of_two_models_are_refused(sweep, kind):
    finish(sweep, CellConfig(model="liresnet", eps=(0.3,)))
    with pytest.raises(ValueError, match="differ in constraint, threshold and seed only, got model"):
        PLOTS[kind](sweep)


def test_one_seed_has_no_error_bar(tmp_path):
    finish(tmp_path, CellConfig())
    (axes,) = plot_sandwich(tmp_path, 0.3).axes
    (bar,) = axes.containers[2].lines[2]
    low, high = bar.get_segments()[0][:, 1]
    assert low == high == 25


@pytest.mark.parametrize("kind", PLOTS)
def test_states_and_missing_columns_are_borne(sweep, kind):
    frame = collect_runs(sweep)
    before = len(PLOTS[kind](frame).axes)
    planned = frame.iloc[:1].assign(id="0" * 12, folder="none", state="pending", finished=False, threshold=9.0)
    frame = pd.concat([frame, planned]).drop(columns="diverged")
    assert len(PLOTS[kind](frame).axes) == before


def test_figures_of_a_study_of_which_nothing_is_finished_are_refused(tmp_path):
    RunFolder.of(tmp_path, CellConfig()).create(CellConfig())
    with pytest.raises(ValueError, match="expected at least one finished run, got none"):
        write_figures(tmp_path, tmp_path / "figures")


@pytest.mark.parametrize("kind", PLOTS)
def test_no_finished_run_is_refused(tmp_path, kind):
    RunFolder.of(tmp_path, CellConfig()).create(CellConfig())
    with pytest.raises(ValueError, match="expected at least one finished run, got none"):
        PLOTS[kind](tmp_path)


def test_all_figures_are_written(sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    paths = write_figures(sweep, out)
    names = ("accuracy_over_eps", "bracket_cap", "bracket_none", "gradient_norms", "radius_against_distance")
    names += ("sandwich_eps_0.3", "tightness")
    assert sorted(path.name for path in out.iterdir()) == [name + end for name in names for end in (".pdf", ".png")]
    assert sorted(paths) == sorted(out.iterdir())


def test_figures_of_each_setting_lie_apart_and_need_attacks(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    unattacked = [math.nan] * 10
    finish(runs, CellConfig(eps=(0.3,), attacks=(), width=8), distance=unattacked)
    finish(runs, CellConfig(eps=(0.3,), attacks=(), width=16), distance=unattacked)
    write_figures(runs, out)
    assert sorted(path.name for path in out.iterdir()) == ["width=16", "width=8"]
    assert not [path for kind in ("radius", "tightness", "bracket", "closest") for path in out.glob(f"*/{kind}*")]


def test_an_eps_with_six_digits_keeps_its_ending(sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    pdf, png = save_figure(plot_sandwich(sweep, 0.141176), out / "sandwich_eps_0.141176")
    assert (pdf.name, png.name) == ("sandwich_eps_0.141176.pdf", "sandwich_eps_0.141176.png")
