"""Every picture: drawn for many shapes of runs, with no text over text or outside the figure."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from synthetic_run import EIGHT, FOUR, SHORT, make_run

from compact_fast.report import style
from compact_fast.report.plots import mi_unit, teacher_picture
from compact_fast.report.read import Run, read_run
from compact_fast.report.single import ALL_PICTURES

CASES = {
    "2 teachers, 3 steps": (SHORT, 3),
    "4 teachers, 1 step": (FOUR, 1),
    "4 teachers, 300 steps": (FOUR, 300),
    "8 teachers, 2000 steps": (EIGHT, 2000),
    "17 teachers, 5 steps": ([f"teacher number {i} of a very long name" for i in range(17)], 5),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    return read_run(make_run(tmp_path_factory.mktemp("run"), *CASES[request.param]))


def texts_of(figure):
    """(text, box in pixels) of all that is written in a figure, once drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {id(t) for ax in figure.axes for t in ticks_out_of_sight(ax)}
    found = []
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden:
            found.append((text.get_text(), text.get_window_extent(canvas.get_renderer())))
    return found


def ticks_out_of_sight(ax):
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        low, high = sorted((low, high))
        slack = 1e-6 * (high - low)
        for tick in axis.get_major_ticks():
            if not low - slack <= tick.get_loc() <= high + slack:
                yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("picture", ALL_PICTURES, ids=lambda p: p.key)
def test_no_text_overlaps_or_leaves_the_figure(run, picture):
    with style.themed(style.LIGHT):
        figure = picture.draw(run, style.LIGHT)
        assert not isinstance(figure, str), figure
        texts = texts_of(figure)
        width, height = figure.get_size_inches() * figure.dpi
    assert len(texts) > 5
    for text, box in texts:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (a, box_a), (b, box_b) in itertools.combinations(texts, 2):
        across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        down = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        # Boxes hold the font's full height; a hair of them may touch.
        assert across <= 2 or down <= 0.25 * min(box_a.height, box_b.height), (a, b)


def test_axes_name_units_and_lines_name_teachers(tmp_path):
    run = read_run(make_run(tmp_path, FOUR, 30))
    with style.themed(style.DARK):
        figure = teacher_picture("nll", "NLL", "NLL (nats a token)")(run, style.DARK)
        written = {text for text, _ in texts_of(figure)}
    assert {"NLL (nats a token)", "optimizer step", *FOUR} <= written


def test_curves_hold_the_logged_values(tmp_path):
    run = read_run(make_run(tmp_path, FOUR, 30))
    with style.themed(style.LIGHT):
        figure = teacher_picture("weight", "W", "mean weight")(run, style.LIGHT)
        drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    for teacher in FOUR:
        assert run.series(f"teacher/{teacher}/weight")[1] in drawn


@pytest.mark.parametrize("picture", ALL_PICTURES, ids=lambda p: p.key)
def test_what_is_missing_is_said_in_words(tmp_path, picture):
    empty = Run(tmp_path, {}, [], [], None, None, [])
    words = picture.draw(empty, style.LIGHT)
    assert isinstance(words, str)
    assert words.endswith(".")


def test_a_damaged_agreement_is_said(tmp_path):
    broken = {"teachers": ["a", "b"], "matrix": [[1.0, 0.5]]}
    run = Run(tmp_path, {}, [], [], broken, None, [])
    (picture,) = [p for p in ALL_PICTURES if p.key == "agreement"]
    assert "damaged" in picture.draw(run, style.LIGHT)


@pytest.mark.parametrize(
    ("config", "unit"),
    [
        ({}, "MI gain (logits)"),
        ({"mi": "logit", "mi_length_norm": True}, "MI gain (logits, a position)"),
        ({"mi": "logprob"}, "MI gain (nats)"),
        ({"mi": "pvi", "mi_length_norm": True}, "MI gain (nats)"),
    ],
)
def test_mi_is_labelled_with_its_unit(tmp_path, config, unit):
    assert mi_unit(Run(tmp_path, {"config": config}, [], [], None, None, [])) == unit


def test_agreement_of_eight_teachers_shows_its_numbers(tmp_path):
    run = read_run(make_run(tmp_path, EIGHT, 1))
    (picture,) = [p for p in ALL_PICTURES if p.key == "agreement"]
    with style.themed(style.LIGHT):
        written = [text for text, _ in texts_of(picture.draw(run, style.LIGHT))]
    assert written.count("0.83") == 14
    assert written.count("none") == 2
