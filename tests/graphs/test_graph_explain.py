"""One question explained: figures of the consensus, steps side by side, a readable picture."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from compact_fast.graphs import GraphOptions, consensus, explain, match, parse_rationales
from compact_fast.graphs.explain import examine
from compact_fast.graphs.fallback_parse import step_texts
from compact_fast.graphs.picture import _agreed, draw, save

TEXTS = ["2 + 3 = 5\n5 * 4 = 20\n#### 20", "So 3 + 2 = 5, then 4 * 5 = 20.", "2 * 3 = 6"]
NAMES = ["anna", "ben", "cleo"]


def test_text_names_steps_matches_and_scores() -> None:
    shown = explain(TEXTS, NAMES)
    lines = shown.splitlines()
    assert "1. (+) 2, 3 = 5" in shown
    beside = next(line for line in lines if "2. (*) 4, 5 = 20   from step 1" in line)
    assert "2. =2 (*) 4, 5 = 20   from step 1" in beside.split("|")[1]
    assert "then 4 * 5 = 20" in shown
    assert "anna and ben: steps 1.000, matched 1=1 2=2" in shown
    assert "answer 6" in shown
    assert f"score {consensus(TEXTS, [0, 3]).scores[0]:.3f}" in shown


def test_matched_steps_with_other_results_are_not_called_equal() -> None:
    right = "There are 8 + 270 = 278 pens.\n278 - 8 = 270\nAll in all we are glad."
    wrong = "There are 8 + 30 = 38 pens.\n278 - 8 = 270\nAll in all we are glad."
    found = examine([right, wrong], ["anna", "ben"])
    assert found.matches[0, 1] == [(0, 0), (1, 1), (2, 2)]
    shown = found.text(120)
    assert "1. ~1 (+) 8, 30 = 38" in shown
    assert "2. =2 (-) 8, 278 = 270" in shown
    assert "matched 1~1 2=2 3~3" in shown  # the last states no result
    assert "matched steps: = with equal results, ~ with others or none" in shown
    words = [text.get_text() for text in draw(found).axes[0].texts]
    assert [w for w in words if w.startswith(("= ", "~ "))] == ["~ anna 1", "= anna 2", "~ anna 3"]
    assert _agreed(found, [0, 0]) == set()
    assert _agreed(found, [1, 1]) == {0, 1}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_fits_the_terminal(width: int, backend: str) -> None:
    names = [f"teacher {k}" for k in range(7)]
    shown = explain([TEXTS[k % 3] + f"\n{k} + 7 = {k + 7}" for k in range(7)], names,
                    width=width, backend=backend)  # type: ignore[arg-type]  # fmt: skip
    steps = shown.split("agreement\n")[0]
    assert max(map(len, steps.splitlines())) <= width
    assert all(name in steps for name in names)


def test_rows_hold_every_step_once_and_matched_ones_together(real) -> None:
    rows, *_ = real("math_train_eit")
    for row in random.Random(0).sample(rows, 20):
        texts = [r["text"] for r in row["rationales"]]
        found = examine(texts)
        graphs = parse_rationales(texts)
        table = found.rows()
        for t, size in enumerate(np.diff(graphs.cu_nodes)):
            assert sorted(line[t] for line in table if line[t] is not None) == list(range(size))
        best = found.reference
        for t in range(len(texts)):
            if t == best:
                continue
            pair = match(graphs, [(min(t, best), max(t, best))])
            linked = {(i, j) for i, j in enumerate(pair.assigned.tolist()) if j >= 0}
            linked = linked if t < best else {(j, i) for i, j in linked}
            beside = {
                (line[t], line[best])
                for line in table
                if line[t] is not None and line[best] is not None
            }
            assert beside == linked


def test_flags_are_said() -> None:
    assert "no evidence" in explain(TEXTS[:1])
    assert "undecidable" in explain(TEXTS[1:])
    assert "near-copy of anna" in explain(
        ["She has 4 boxes of 6 pens, so 4 * 6 = 24 pens, and gives 5 pens away, 24 - 5 = 19."] * 3,
        NAMES,
    )  # fmt: skip
    assert "agreement" in explain([])


def test_words_of_the_steps() -> None:
    text = "Mr. Fox has ½ of 8.\n1. 5 + 3 = 8, then 8 * 2 = 16. 日本 is far\nThe answer is 16."
    assert [words.strip(", ") for words in step_texts(text, 99)] == [
        "Mr. Fox has 1/2 of 8", "5 + 3 = 8", "then 8 * 2 = 16", "日本 is far",
    ]  # fmt: skip


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="3 texts, but 2 teachers"):
        explain(TEXTS, ["a", "b"])
    with pytest.raises(ValueError, match="3 texts, but 1 final answers"):
        explain(TEXTS, NAMES, final_answers=["1"])


@pytest.mark.parametrize("teachers", [0, 1, 2, 8])
def test_picture(teachers: int, tmp_path: Path) -> None:
    long = "and so on with many more words $5 and $6 " * 12
    texts = [f"{TEXTS[k % 3]}\n{long}\n{k} + 7 = {k + 7}" for k in range(teachers)]
    found = examine(texts, [f"teacher {k} with a very long name indeed" for k in range(teachers)])
    save(found, tmp_path / "p.png")
    image = imread(tmp_path / "p.png")
    assert image.shape[1] >= 300 * max(teachers, 2)
    assert image[..., :3].std() > 0.01 or teachers == 0
    figure = draw(found)
    figure.canvas.draw()
    edge = figure.bbox.width
    for text in figure.axes[0].texts:  # nothing leaves the picture
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= edge, text.get_text()
        assert box.y0 >= 0, text.get_text()


@pytest.mark.filterwarnings("error:Glyph")
def test_names_that_the_font_lacks_are_numbered_as_in_the_report(tmp_path: Path) -> None:
    found = examine(TEXTS, ["教師", "bob", "先生"])
    save(found, tmp_path / "p.png")
    shown = "\n".join(text.get_text() for text in draw(found).axes[0].texts)
    assert "teacher 1" in shown
    assert "teacher 3" in shown
    assert "bob" in shown
    assert "教" not in shown
    assert "教師" in found.text(100)  # a terminal may well have the letters


def test_too_many_steps_for_a_picture() -> None:
    found = examine(["b 1\n" * 1500], options=GraphOptions(max_steps=2048))
    with pytest.raises(ValueError, match="1500 rows of steps do not fit one picture"):
        draw(found)
