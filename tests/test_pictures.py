"""Pictures of single samples, checked by what is drawn: positions, colours and words."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from speccert.experiments.pictures import bracket_figure, change_of, closest_figure, tightness
from speccert.experiments.plots import bracket_figure as exported_bracket
from speccert.experiments.plots import closest_figure as exported_closest


def closest(shape, count=2, *, convert=np.asarray):
    """Ramps whose first entry the attack raises by 1/4 and whose second it lowers by 1/8."""
    ramp = np.linspace(0.125, 0.5, count * math.prod(shape), dtype=np.float32).reshape(count, *shape)
    change = np.zeros(shape, np.float32)
    change.flat[0], change.flat[1] = 0.25, -0.125
    arrays = {"x": ramp, "x_adv": ramp + change, "label": np.arange(count), "prediction": np.full(count, 7)}
    arrays |= {"index": 10 * np.arange(count), "distance": np.linspace(0.25, 0.5, count), "radius": np.full(count, 0.2)}
    return {name: convert(array) for name, array in arrays.items()}


def images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def titles(figure):
    return [text.get_text() for text in figure.texts if text.get_text()]


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 5)])
def test_grey_images_lie_beside_their_adversarial_examples_and_the_change(shape, convert):
    arrays = closest(shape, convert=convert)
    figure = closest_figure(arrays)
    assert len(figure.axes) == 6
    for at in range(2):
        original, adversarial, change = images(figure)[3 * at : 3 * at + 3]
        for channel in range(3):
            np.testing.assert_allclose(original[..., channel], np.asarray(arrays["x"][at]).reshape(4, 5))
            np.testing.assert_allclose(adversarial[..., channel], np.asarray(arrays["x_adv"][at]).reshape(4, 5))
        flat = change.reshape(20, 3)
        assert flat[0, 0] > flat[0, 2]  # raised: red
        assert flat[1, 0] < flat[1, 2]  # lowered: blue
        assert (flat[2:] == 1).all()  # white elsewhere
        assert 1 - flat[0].min() == pytest.approx(2 * (1 - flat[1, 0]))  # the change there is half the largest


def test_colours_of_a_change_are_grey_at_zero_and_full_at_the_largest():
    arrays = closest((3, 2, 2), 1)
    original, _, change = images(closest_figure(arrays))
    np.testing.assert_allclose(original.transpose(2, 0, 1), arrays["x"][0])
    flat = change.transpose(2, 0, 1).reshape(-1)
    assert flat[:3].tolist() == pytest.approx([1.0, 0.25, 0.5])  # +1/4, -1/8 and 0 of at most 1/4


def test_values_outside_of_the_unit_interval_are_scaled_into_it():
    x = np.array([[[-1.0, 0.0], [1.0, 3.0]]])
    change = change_of(x, x)
    assert change.original.ravel().tolist() == [0.0, 0.25, 0.5, 1.0]
    assert change.largest == 0
    assert (change.difference == 1).all()


@pytest.mark.parametrize("shape", [(7,), (2, 3, 3), (1, 1, 9), (1, 2, 2, 2)])
def test_inputs_that_are_no_images_are_curves(shape):
    arrays = closest(shape)
    assert change_of(arrays["x"][0], arrays["x_adv"][0]) is None
    figure = closest_figure(arrays)
    both, change = figure.axes[:2]
    np.testing.assert_allclose(both.lines[0].get_ydata(), arrays["x"][0].ravel())
    np.testing.assert_allclose(both.lines[1].get_ydata(), arrays["x_adv"][0].ravel())
    assert [bar.get_height() for bar in change.patches][:3] == pytest.approx([0.25, -0.125, 0.0])
    assert len(figure.axes) == 4


def test_an_image_that_is_not_finite_is_a_curve():
    x = np.zeros((1, 2, 2))
    assert change_of(x, x + np.nan) is None


def test_titles_tell_classes_sample_distance_and_radius():
    figure = closest_figure(closest((1, 2, 2)), name="cap 1")
    assert titles(figure) == [
        "cap 1",
        "0 → 7, sample 0\ndistance 0.25, radius 0.2",
        "1 → 7, sample 10\ndistance 0.5, radius 0.2",
    ]
    labels = {axes.get_xlabel() for axes in figure.axes}
    assert labels == {"original", "adversarial", "change \N{MULTIPLICATION SIGN} 4"}


def test_a_broken_certificate_is_said_in_red():
    arrays = closest((1, 2, 2))
    arrays["radius"] = np.array([0.2, 0.6])
    sound, broken = [text for text in closest_figure(arrays).texts if text.get_text()]
    assert sound.get_color() == "black"
    assert broken.get_color() == "#CC0000"
    assert broken.get_text().endswith("distance 0.5, radius 0.6, broken")


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("shape", [(1, 8, 8), (20,)])
def test_nothing_overlaps_or_leaves_the_figure(shape, count):
    figure = closest_figure(closest(shape, count), name="a name")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    for at, one in enumerate(boxes):
        assert one.x0 >= -1
        assert one.y0 >= -1
        assert one.x1 <= figure.bbox.x1 + 1
        assert one.y1 <= figure.bbox.y1 + 1
        for other in boxes[:at]:
            shared = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(shared) < 1.5  # pixels


def test_no_example_is_said():
    assert titles(closest_figure(closest((1, 2, 2), 0))) == ["No adversarial example was found."]


def test_bad_arrays_are_refused():
    arrays = closest((1, 2, 2))
    with pytest.raises(ValueError, match=r"expected arrays x, x_adv, .*; radius missing"):
        closest_figure({name: array for name, array in arrays.items() if name != "radius"})
    with pytest.raises(ValueError, match=r"expected arrays of equal length, got .*'label': 1"):
        closest_figure(arrays | {"label": np.zeros(1)})
    with pytest.raises(ValueError, match="expected x and x_adv of equal shape"):
        closest_figure(arrays | {"x_adv": np.zeros((2, 1, 2, 3))})


def test_plots_export_both():
    assert (exported_bracket, exported_closest) == (bracket_figure, closest_figure)


# Found at 0.4 and 0.2, none found, misclassified, not attacked, broken at 0.1 below its radius.
SAMPLES = pd.DataFrame(
    {
        "label": 1,
        "prediction": [1, 1, 1, 0, 1, 1],
        "attacked": [True, True, True, True, False, True],
        "distance": [0.4, 0.2, math.inf, 0.0, math.nan, 0.1],
        "radius_linf": [0.3, 0.05, 0.35, 0.0, 0.9, 0.15],
        "radius_l2": 0.0,
    }
)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_brackets_are_sorted_by_distance_with_those_not_found_last():
    figure = bracket_figure(SAMPLES, "linf")
    (axes,) = figure.axes
    found, missed, broken = [
        [[round(float(value), 9) for value in end] for line in part.get_segments() for end in line]
        for part in axes.collections[:3]
    ]
    top = axes.get_ylim()[1]
    assert top == pytest.approx(1.08 * 0.4)
    assert found == [[2, 0.05], [2, 0.2], [3, 0.3], [3, 0.4]]
    assert missed == [[4, 0.35], [4, pytest.approx(top)]]
    assert broken == [[1, 0.15], [1, 0.1]]
    distances, radii, carets, crosses = [part.get_offsets().tolist() for part in axes.collections[3:]]
    assert distances == [[2, 0.2], [3, 0.4]]
    assert radii == [[2, 0.05], [3, 0.3], [4, 0.35]]
    assert [one[0] for one in carets] == [4]
    assert crosses == [[1, 0.1]]
    assert legend(figure) == [
        "smallest distance found", "certified radius", "no point found (1)", "certificate broken (1)",
    ]  # fmt: skip


def test_the_title_has_the_median_of_radius_over_distance():
    sound = SAMPLES.drop(index=5)
    figure = bracket_figure(sound, "linf", name="cap 1")
    assert figure.axes[0].get_title() == "cap 1: 3 samples, median radius / distance 0.500"  # of 3/4 and 1/4
    assert legend(figure) == ["smallest distance found", "certified radius", "no point found (1)"]
    assert "infty" in figure.axes[0].get_ylabel()
    assert (drawn(figure) < 250).any()


def test_a_model_without_certificates_has_brackets_from_zero():
    (axes,) = bracket_figure(SAMPLES.drop(index=[2, 5]), "l2").axes
    assert [line[0, 1] for line in axes.collections[0].get_segments()] == [0, 0]
    assert axes.get_title() == "2 samples, median radius / distance 0.000"


def test_only_failed_attacks_and_infinite_radii_are_borne():
    rows = SAMPLES.assign(distance=math.inf, radius_l2=math.inf)
    (axes,) = bracket_figure(rows, "l2").axes
    assert axes.get_title() == "4 samples"
    assert np.isfinite(axes.get_ylim()).all()


@pytest.mark.parametrize("changes", [{"attacked": False}, {"prediction": 0}, {"distance": math.nan}])
def test_no_sample_is_said(changes):
    assert titles(bracket_figure(SAMPLES.assign(**changes), "linf")) == ["No attacked sample is classified right."]


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="norm = 'l3': expected one of l2, linf, l1"):
        bracket_figure(SAMPLES, "l3")
    with pytest.raises(ValueError, match=r"expected columns .*; distance, radius_l1 missing"):
        bracket_figure(SAMPLES.drop(columns="distance"), "l1")


def test_ratios_are_of_samples_with_both_ends():
    radius = np.array([0.1, 0.2, 0.0, 0.5, math.inf, 0.0])
    distance = np.array([0.2, math.inf, 0.3, math.nan, 0.4, 0.0])
    assert tightness(radius, distance).tolist() == [0.5, 0.0]


def test_a_thousand_brackets_are_legible():
    distance = np.linspace(0.1, 1, 1000)
    rows = pd.DataFrame(
        {"label": 1, "prediction": 1, "attacked": True, "distance": distance, "radius_l2": distance / 2}
    )
    image = drawn(bracket_figure(rows, "l2"))
    height, width, _ = image.shape
    orange = (np.abs(image - [0xD5, 0x5E, 0x00]).max(-1) < 60)[: int(0.7 * height)].any(0)
    assert orange.sum() > 0.7 * width
