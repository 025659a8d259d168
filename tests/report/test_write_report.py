"""The page itself, parsed: its numbers are those of the files, and it loads nothing."""

import base64
import json
import math
from html.parser import HTMLParser

import pytest
from synthetic_run import EIGHT, FOUR, SHORT, make_run

from compact_fast.report import write_comparison, write_report
from compact_fast.report.read import read_run
from compact_fast.report.single import ALL_PICTURES
from compact_fast.report.summary import edges, leaders, summary


class Page(HTMLParser):
    """Collects what the tests ask for."""

    def __init__(self, path):
        super().__init__()
        self.values, self.tags, self.sources, self.words = {}, [], [], []
        self.alt, self.key = [], None
        self.shown = {}
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.key = attrs.get("data-key")
        if "data-value" in attrs:
            assert attrs["data-key"] not in self.values
            self.values[attrs["data-key"]] = json.loads(attrs["data-value"])
        self.sources += [attrs[a] for a in ("src", "srcset", "href") if a in attrs]
        if tag == "img":
            self.alt.append(attrs["alt"])

    def handle_data(self, data):
        if "style" not in self.tags[-1:]:
            self.words.append(data)
        if self.key:
            self.shown[self.key] = data
            self.key = None


@pytest.fixture
def quick(monkeypatch):
    """Pages with blank pictures: drawing is tested elsewhere, and takes a second or two."""
    from compact_fast.report import render

    class Blank:
        def __init__(self, figure):
            pass

        def print_png(self, buffer, metadata):
            buffer.write(b"\x89PNG\r\n")

    monkeypatch.setattr(render, "FigureCanvasAgg", Blank)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "four", FOUR, 40)
    return path, Page(write_report(path))


def test_every_picture_is_inlined_in_both_themes_and_lies_beside_the_page(four):
    path, page = four
    assert len(page.sources) == 2 * len(ALL_PICTURES)
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG\r\n")
    for picture, light in zip(ALL_PICTURES, page.sources[1::2], strict=True):
        file = path / "report" / f"{picture.key}.png"
        assert base64.b64decode(light.partition(",")[2]) == file.read_bytes()
    assert len(page.alt) == len(ALL_PICTURES)
    assert all(len(alt) > 20 for alt in page.alt)


def test_the_page_loads_nothing_and_runs_nothing(four):
    _, page = four
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http://" not in page.html
    assert "https://" not in page.html
    assert "default-src 'none'" in page.html
    assert 'name="viewport"' in page.html
    assert "prefers-color-scheme:dark" in page.html


def test_teacher_numbers_are_those_of_the_log(four):
    path, page = four
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    for teacher in FOUR:
        for measure in ("weight", "nll", "mi", "consensus"):
            key = f"teacher/{teacher}/{measure}"
            first = sum(row[key] for row in rows[:4]) / 4
            last = sum(row[key] for row in rows[-4:]) / 4
            assert page.values[f"{key}/start"] == pytest.approx(first)
            assert page.values[f"{key}/end"] == pytest.approx(last)
            assert page.shown[f"{key}/end"] == f"{last:.3f}"
        share = sum(row[f"teacher/{teacher}/filtered"] for row in rows) / len(rows)
        assert page.values[f"teacher/{teacher}/filtered"] == pytest.approx(share)
        assert page.values[f"teacher/{teacher}/nonfinite"] == 0
    assert page.values["share_right/gpt-4o"] == 0.95
    assert "share_right/gemini-1.5-flash" not in page.values


def test_evaluation_numbers_are_those_of_the_file(four):
    path, page = four
    found = json.loads((path / "evaluation.json").read_text())
    for when in ("before", "after"):
        part = found[when]
        values = {k: v for k, v in page.values.items() if k.startswith(f"{when}/")}
        assert values[f"{when}/exact_match"] == part["exact_match"]["accuracy"]
        assert values[f"{when}/rationale_nll"] == part["rationale_nll"]["nll"]
        for teacher in FOUR:
            nll = part["rationale_nll"]["teachers"][teacher]["nll"]
            assert values[f"{when}/rationale_nll/{teacher}"] == nll
        for key in ("bits_per_token", "bits_per_byte"):
            assert values[f"{when}/perplexity/{key}"] == part["perplexity"][key]
        assert len(values) == 1 + 1 + len(FOUR) + 3
    assert page.shown["after/exact_match"] == "83.0 % (78.7 to 87.3 %), 300 questions"


def test_summary_says_who_was_trusted_and_what_changed(four):
    path, page = four
    run = read_run(path)
    ends = {t: edges(run.series(f"teacher/{t}/weight")[1])[1] for t in FOUR}
    best = max(ends, key=ends.get)
    assert f"at the end: {best} ({ends[best]:.3f})" in page.text
    assert "The run finished: 40 of 40 optimizer steps" in page.text
    assert "Exact match, greedy: 55.0 % before training, 83.0 % after (300 questions)" in page.text
    assert "do not overlap" in page.text
    assert "No question was skipped. All scores were finite." in page.text
    assert "backend “torch” (triton: no CUDA device is visible), on cpu, 2 threads" in page.text
    assert "wall-clock time 6 min 5 s" in page.text


def test_configuration_and_versions_are_shown(four):
    _, page = four
    for words in ("weighting compact", "lora false", "python 3.11.9", "why this one triton:"):
        assert words in page.text


def test_names_are_escaped_everywhere(tmp_path, quick):
    page = Page(write_report(make_run(tmp_path / "<b>run", EIGHT, 3)))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert EIGHT[5] in page.text
    assert EIGHT[6] in page.text
    assert f"teacher/{EIGHT[5]}/weight/end" in page.values


def test_a_run_that_died_is_reported_as_such(tmp_path, quick):
    path = make_run(tmp_path / "r", FOUR, 12, status="running")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    (path / "evaluation.json").unlink()
    page = Page(write_report(path))
    assert "The run has not ended, or died without a word" in page.text
    assert "half written" in page.text
    assert "The student was not evaluated before and after training." in page.text


def test_a_stopped_run_gives_its_reason(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 4, status="stopped: step 5: NaN in teacher b")
    assert "did not finish (“stopped: step 5: NaN in teacher b”)" in Page(write_report(path)).text


def test_steps_are_those_made_not_those_logged(tmp_path, quick):
    folder = make_run(tmp_path / "run", FOUR, 4)
    (folder / "metrics.jsonl").write_text("")
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "last_step": 4}))
    assert summary(read_run(folder))[0] == "The run finished: 4 of 4 optimizer steps."
    info["status"] = "stopped: a full disk"
    (folder / "run.json").write_text(json.dumps({**info, "last_step": 3}))
    assert "(“stopped: a full disk”): 3 of 4 optimizer steps." in summary(read_run(folder))[0]


def test_missing_parts_are_said_in_words(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 4, known=False)
    write_report(path)
    assert (path / "report" / "agreement.png").exists()
    for name in ("agreement.json", "evaluation.json"):
        (path / name).unlink()
    page = Page(write_report(path))
    assert "Not known for these data" in page.text
    assert "No agreement between teachers was computed in this run." in page.text
    assert not (path / "report" / "agreement.png").exists()
    assert "unknown" in page.text


def test_an_empty_log_still_makes_a_page(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 2)
    (path / "metrics.jsonl").write_text("")
    (path / "run.json").write_text("{}")
    (path / "agreement.json").write_text("[]")
    page = Page(write_report(path))
    assert "No loss was logged." in page.text
    assert "agreement.json holds no JSON object and was left out." in page.text
    assert "Versions, device and backend of this run are unknown." in page.text


def test_counts_of_skipped_and_non_finite_are_summed(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 3)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if "loss" in row:
            row["skipped_questions"] = 2.0
            row["teacher/strong/nonfinite"] = 5.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = Page(write_report(path))
    assert "6 questions were skipped" in page.text
    assert "given no weight: strong 15." in page.text
    assert page.values["teacher/strong/nonfinite"] == 15


def test_leaders_merge_neighbours(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 40)
    rows = [
        {"step": s, "loss": 1.0, "teacher/strong/weight": w, "teacher/misleading/weight": 1 - w}
        for s in range(1, 41)
        for w in [0.9 if s <= 20 else 0.1]
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = read_run(path)
    assert leaders(run) == [("strong", 1, 20), ("misleading", 21, 40)]
    assert any("strong in steps 1 to 20; misleading in steps 21 to 40" in s for s in summary(run))


def test_edges_are_tenths():
    assert edges([1.0]) == (1.0, 1.0)
    assert edges([float(i) for i in range(30)]) == (1.0, 28.0)


def test_no_run_no_report(tmp_path, quick):
    with pytest.raises(ValueError, match=r"neither run\.json"):
        write_report(tmp_path)


def test_comparison_overlays_runs(tmp_path):
    paths = [make_run(tmp_path / p, SHORT, n, seed=n) for p, n in (("a", 20), ("b", 30))]
    other = make_run(tmp_path / "x" / "a", SHORT, 5)
    (other / "evaluation.json").unlink()
    out = write_comparison([*paths, other], tmp_path / "out")
    assert out == tmp_path / "out" / "index.html"
    page = Page(out)
    for name in (f"{tmp_path.name}/a", "b", "x/a"):
        assert name in page.text
    values = read_run(paths[1]).series("loss_sft")[1]
    assert page.values["b/loss_sft"] == pytest.approx(math.fsum(values[-3:]) / 3)
    assert page.values["b/exact_match"] == 0.83
    assert "x/a/exact_match" not in page.values
    assert (tmp_path / "out" / "loss_sft.png").exists()
    assert "https://" not in page.html


def test_comparison_by_given_names(tmp_path, quick):
    path = make_run(tmp_path / "a", SHORT, 3)
    page = Page(write_comparison([path, path], tmp_path / "out", names=["one", "<two>"]))
    assert page.values["<two>/exact_match"] == 0.83
    with pytest.raises(ValueError, match="1 names for 2 runs"):
        write_comparison([path, path], tmp_path / "out", names=["one"])
    with pytest.raises(ValueError, match="no runs to compare"):
        write_comparison([], tmp_path / "out")


def test_what_was_left_out_of_gradients_is_told(tmp_path, quick):
    path = make_run(tmp_path / "r", SHORT, 3)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            row |= {"kept_share": 0.0625, "gradient_error/hidden": 0.0031}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = Page(write_report(path)).text
    assert "skip_below multiplied 6.2 % of the logit gradients" in text
    assert "has a norm of 0.0031 at most" in text
