import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import EIGHT

from compact_fast.report import style

ONE = st.floats(0, 1, allow_nan=False)


@given(st.lists(ONE, max_size=20), st.floats(0.001, 0.2))
def test_spread_keeps_order_and_distance(wanted, gap):
    places = style.spread(wanted, gap, 0.0, 1.0)
    least = min(gap, 1 / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    ordered = [places[i] for i in order]
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in places)
    assert all(b - a >= least - 1e-9 for a, b in itertools.pairwise(ordered))


@given(st.lists(ONE, min_size=1, max_size=10, unique=True))
def test_spread_leaves_what_is_far_apart(wanted):
    gap = min((abs(a - b) for a in wanted for b in wanted if a != b), default=0.5)
    assert style.spread(wanted, gap * 0.99, 0.0, 1.0) == pytest.approx(wanted)


def test_few_rows_are_shown_as_logged():
    curve = style.smooth(range(80), range(80))
    assert curve.window == 1
    assert curve.low is None
    assert curve.mid.tolist() == list(range(80))


def test_many_rows_are_means_with_a_band():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000)
    curve = style.smooth(range(10_000), values)
    assert curve.window == 200
    assert curve.mid[3] == pytest.approx(values[600:800].mean())
    assert curve.low[3] == pytest.approx(np.percentile(values[600:800], 10))
    assert curve.high[3] == pytest.approx(np.percentile(values[600:800], 90))
    assert style.smoothing_words([200]) == (
        "line: mean of 200 log rows; band: 10th to 90th percentile"
    )
    assert style.smoothing_words([200, 1], band=False) == "line: mean of up to 200 log rows"
    assert style.smoothing_words([1]) == "as logged"


@given(st.integers(81, 700))
def test_stretches_cover_every_row_in_order(rows):
    values = np.random.default_rng(rows).normal(size=rows)
    curve = style.smooth(range(rows), values)
    parts = [values[i : i + curve.window] for i in range(0, rows, curve.window)]
    assert curve.mid == pytest.approx([p.mean() for p in parts])
    assert curve.low == pytest.approx([np.percentile(p, 10) for p in parts])
    assert curve.high == pytest.approx([np.percentile(p, 90) for p in parts])
    assert curve.x[-1] == pytest.approx((rows - len(parts[-1]) + rows - 1) / 2)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12, unique=True))
def test_short_names_fit_and_differ(names):
    flat = [" ".join(n.split()) for n in names]
    short = style.short_names(names)
    assert all(0 < len(s) <= style.MAX_NAME for s in short)
    if len(set(flat)) == len(flat) and all(flat):
        assert len(set(short)) == len(short)


def test_names_without_letters_in_the_font_get_a_number():
    assert style.short_names(EIGHT)[6] == "teacher 7"


def test_lines_differ_beyond_their_colour():
    looks = [str(sorted(style.line_style(style.LIGHT, i).items(), key=str)) for i in range(16)]
    assert len(set(looks)) == 16


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK])
def test_colours_stand_out_from_the_page(theme):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for color in theme.series:
        assert contrast(color, theme.face) >= 3, color
    assert contrast(theme.text, theme.face) >= 7
    assert contrast(theme.muted, theme.face) >= 4.5


def test_fit_cuts_to_the_width():
    text = "a name that is far too long for the room that there is"
    shown = style.fit(text, 1.0)
    assert style.text_width([shown]) <= 1.0
    assert style.fit("short", 1.0) == "short"
