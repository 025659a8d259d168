"""The pictures of one run. Each function gives a figure, or in words why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compact_fast.report import style
from compact_fast.report.read import Run
from compact_fast.report.style import HEAD, WIDTH, Theme


@dataclass(frozen=True)
class Picture:
    """A picture of the report: its file stem, heading, explanation and how it is drawn."""

    key: str
    heading: str
    caption: str
    draw: Callable[[Run, Theme], Figure | str]


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: dict[str, Any]
    points: bool = False  # draw as single measurements, not as a smoothed log


def loss(run: Run, theme: Theme) -> Figure | str:
    total, sft, cons, held = (
        run.series("loss"),
        run.series("loss_sft"),
        run.series("loss_consistency"),
        run.series("eval_nll", run.evaluations),
    )
    if not total[0]:
        return "No loss was logged."
    lines = [Line("total", *total, style.line_style(theme, 2))]
    if sft[0]:
        lines.append(Line("weighted NLL", *sft, style.line_style(theme, 0)))
    if held[0]:
        lines.append(Line("held-out NLL", *held, style.line_style(theme, 1), points=True))
    panels = [("loss (nats a token)", lines)]
    if cons[0]:
        panels.append(
            ("consistency (nats)", [Line("consistency", *cons, style.line_style(theme, 3))])
        )
    return over_time("Loss and its parts", panels, theme)


def learning(run: Run, theme: Theme) -> Figure | str:
    rate, norm = run.series("learning_rate"), run.series("grad_norm")
    panels = []
    if rate[0]:
        panels.append(("learning rate", [Line("learning rate", *rate, style.line_style(theme, 0))]))
    if norm[0]:
        panels.append(("gradient norm", [Line("gradient norm", *norm, style.line_style(theme, 1))]))
    if not panels:
        return "Neither learning rate nor gradient norm was logged."
    return over_time("Learning rate and gradient norm", panels, theme)


def throughput(run: Run, theme: Theme) -> Figure | str:
    panels = []
    for key, label, color in (
        ("tokens_per_second", "tokens a second", 0),
        ("questions_per_second", "questions a second", 3),
    ):
        series = run.series(key)
        if series[0]:
            panels.append((label, [Line(label, *series, style.line_style(theme, color))]))
    if not panels:
        return "No throughput was logged."
    return over_time("Throughput", panels, theme, zero=True)


def trust(run: Run, theme: Theme) -> Figure | str:
    panels = []
    entropy, filtered = run.series("weight_entropy"), run.series("filtered_share")
    if entropy[0]:
        line = Line("entropy", *entropy, style.line_style(theme, 0))
        panels.append(("entropy (nats)", [line]))
    if filtered[0]:
        line = Line("filtered", filtered[0], [100 * v for v in filtered[1]], _style(theme, 1))
        panels.append(("filtered (%)", [line]))
    if not panels:
        return "Neither the weights' entropy nor the share of filtered rationales was logged."
    return over_time("Trust: how sharply teachers are told apart", panels, theme, zero=True)


def right_wrong(run: Run, theme: Theme) -> Figure | str:
    right, wrong = run.series("weight/right"), run.series("weight/wrong")
    if not run.train:
        return "No weights were logged."
    if not right[0] and not wrong[0]:
        return (
            "Not known for these data: the rationales carry no final answers that could be "
            "compared with the gold ones."
        )
    lines = []
    if right[0]:
        lines.append(Line("right", *right, {"color": theme.good, "linestyle": "-"}))
    if wrong[0]:
        lines.append(Line("wrong", *wrong, {"color": theme.bad, "linestyle": (0, (5, 1.6))}))
    return over_time(
        "Trust: right and wrong rationales", [("mean weight", lines)], theme, zero=True
    )


def teacher_picture(measure: str, title: str, unit: str, zero: bool = False) -> Any:
    """A drawing function: one line a teacher of `teacher/<name>/<measure>`."""

    what = {"nll": "NLL", "mi": "MI", "consensus": "consensus score"}.get(measure, measure)

    def draw(run: Run, theme: Theme) -> Figure | str:
        lines = _teacher_lines(run, f"teacher/{{}}/{measure}", theme)
        if not lines:
            return f"No teacher's {what} was logged."
        uniform = None
        if measure == "weight" and len(lines) > 1:
            uniform = (1 / len(lines), "equal share")
        label = mi_unit(run) if measure == "mi" else unit
        return over_time(title, [(label, lines)], theme, zero=zero, reference=uniform)

    return draw


def conflict(run: Run, theme: Theme) -> Figure | str:
    norms = _teacher_lines(run, "teacher/{}/grad_norm", theme)
    cosines = _teacher_lines(run, "teacher/{}/grad_cosine", theme)
    if not norms:
        return "Gradients of teachers were not made apart in this run; fusion: per_teacher does."
    panels: list[tuple[str, Sequence[Line]]] = [("gradient norm", norms)]
    if cosines:
        panels.insert(0, ("mean cosine with the others", cosines))
    return over_time("Conflict: gradients by teacher", panels, theme)


def held_out(run: Run, theme: Theme) -> Figure | str:
    lines = []
    for i, (name, short) in enumerate(
        zip(run.teachers, style.short_names(run.teachers), strict=True)
    ):
        series = run.series(f"eval/teacher/{name}/nll", run.evaluations)
        if series[0]:
            lines.append(Line(short, *series, _style(theme, i), points=True))
    if not lines:
        return "No held-out rationales were evaluated during training."
    return over_time("Held-out NLL by teacher", [("NLL (nats a token)", lines)], theme)


def mi_unit(run: Run) -> str:
    """The unit of the adaptability score of this run."""
    kind = run.config.get("mi", "logit")
    norm = ", a position" if run.config.get("mi_length_norm") else ""
    return {"logit": f"MI gain (logits{norm})", "pvi": "MI gain (nats)"}.get(
        str(kind), f"MI gain (nats{norm})"
    )


def agreement(run: Run, theme: Theme) -> Figure | str:
    found = run.agreement
    if not found or not isinstance(found.get("matrix"), list) or not found.get("teachers"):
        return "No agreement between teachers was computed in this run."
    names = [str(t) for t in found["teachers"]]
    matrix, K = found["matrix"], len(found["teachers"])
    if len(matrix) != K or any(len(row) != K for row in matrix):
        return f"agreement.json is damaged: {K} teachers, but its matrix is not {K} by {K}."
    shares = found.get("share_right") or {}
    labels = []
    for i, (name, short) in enumerate(zip(names, style.short_names(names), strict=True)):
        prefix = "" if short.startswith(f"{i + 1}. ") else f"{i + 1}. "
        share = shares.get(name)
        right = f" ({100 * share:.0f} % right)" if share is not None else ""
        labels.append(f"{prefix}{short}{right}")
    left = style.text_width(labels) + 0.3
    side = min(WIDTH - left - 0.85, 0.62 * K)
    height = HEAD + side + 0.55
    numbers = side / K > 0.21
    sub = "mean over questions; 1: the same steps and results, 0: nothing in common"
    if not numbers:
        sub = "mean over questions; too many teachers for numbers here: see agreement.json"
    figure = style.new_figure("Agreement between teachers", sub, height, theme)
    ax = figure.add_axes((left / WIDTH, 0.45 / height, side / WIDTH, side / height))
    values = [[_off_diagonal(matrix, i, j) for j in range(K)] for i in range(K)]
    image = ax.imshow(values, cmap=theme.heat, vmin=0, vmax=1)
    for i in range(K):
        for j in range(K):
            value = values[i][j]
            if i == j:
                text, color = "–", theme.muted
            elif math.isnan(value):
                text, color = "none", theme.muted
            else:
                text, color = f"{value:.2f}", "#111111" if value > 0.55 else "#FFFFFF"
            if numbers:
                size = style.SMALL if side / K > 0.42 else 6.5
                ax.text(j, i, text, ha="center", va="center", fontsize=size, color=color)
    ax.set_yticks(range(K), labels, fontsize=style.SMALL, color=theme.text)
    size = style.SMALL if numbers else 6
    ax.set_xticks(range(K), [str(i + 1) for i in range(K)], fontsize=size, color=theme.text)
    ax.tick_params(length=0)
    ax.set_xlabel("teacher", labelpad=3)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.add_axes(
        ((left + side + 0.15) / WIDTH, 0.45 / height, 0.12 / WIDTH, side / height)
    )
    figure.colorbar(image, cax=bar).outline.set_visible(False)
    bar.set_ylabel("agreement", fontsize=style.SMALL)
    return figure


def _off_diagonal(matrix: Any, i: int, j: int) -> float:
    value = matrix[i][j]
    return math.nan if i == j or value is None else float(value)


def _style(theme: Theme, index: int) -> dict[str, Any]:
    return style.line_style(theme, index)


def _teacher_lines(run: Run, key: str, theme: Theme) -> list[Line]:
    lines = []
    for i, (name, short) in enumerate(
        zip(run.teachers, style.short_names(run.teachers), strict=True)
    ):
        steps, values = run.series(key.format(name))
        if steps:
            lines.append(Line(short, steps, values, _style(theme, i)))
    return lines


def over_time(
    title: str,
    panels: Sequence[tuple[str, Sequence[Line]]],
    theme: Theme,
    *,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Panels one under another on one step axis; every curve is named at its right end."""
    count = max(len(lines) for _, lines in panels)
    # Bands of many curves hide each other.
    band = count <= 4
    panel_height = max(2.1 if len(panels) == 1 else 1.5, 0.155 * count + 0.2)
    height = HEAD + len(panels) * panel_height + (len(panels) - 1) * 0.16 + 0.5
    windows = [
        style.stretch(len(line.steps)) for _, lines in panels for line in lines if not line.points
    ]
    figure = style.new_figure(title, style.smoothing_words(windows, band), height, theme)
    names = [line.label for _, lines in panels if len(lines) > 1 for line in lines]
    if reference is not None:
        names.append(reference[1])
    right = style.text_width(names) + 0.35 if names else 0.2
    left = 0.8
    made: list[tuple[Axes, list[tuple[float, float, str, dict[str, Any]]]]] = []
    for p, (label, lines) in enumerate(panels):
        bottom = 0.5 + (len(panels) - 1 - p) * (panel_height + 0.16)
        ax = figure.add_axes(
            (
                left / WIDTH,
                bottom / height,
                (WIDTH - left - right) / WIDTH,
                panel_height / height,
            )
        )
        ends = []
        for line in lines:
            if line.points:
                ax.plot(line.steps, line.values, marker="o", markersize=4.5, zorder=4, **line.style)
                end = (line.steps[-1], line.values[-1])
            else:
                curve = style.draw_curve(ax, line.steps, line.values, line.style, band=band)
                end = (float(curve.x[-1]), float(curve.mid[-1]))
            ends.append((*end, line.label, line.style))
        if reference is not None:
            ax.axhline(reference[0], color=theme.muted, linewidth=0.9, linestyle=(0, (2, 2)))
            edge = max(x for x, _, _, _ in ends)
            ends.append((edge, reference[0], reference[1], {"color": theme.muted}))
        ax.set_ylabel(label)
        ax.yaxis.set_major_locator(style.round_ticks(5))
        if zero:
            ax.set_ylim(0, 1.04 * max(ax.get_ylim()[1], 1e-9))
        style.step_axis(ax, label=p == len(panels) - 1)
        made.append((ax, ends if len(lines) > 1 or reference is not None else []))
    figure.align_ylabels([ax for ax, _ in made])
    low = min(ax.get_xlim()[0] for ax, _ in made)
    high = max(ax.get_xlim()[1] for ax, _ in made)
    for ax, ends in made:
        ax.set_xlim(low, high)
        style.label_ends(ax, ends, theme)
    return figure


PICTURES: tuple[Picture, ...] = (
    Picture(
        "loss",
        "Loss",
        "The training loss is the teachers' NLL weighted by trust, plus the consistency term.",
        loss,
    ),
    Picture(
        "weights",
        "Trust: each teacher's weight",
        "Mean weight of a teacher's rationales; the weights of one question add up to 1.",
        teacher_picture("weight", "Trust: weight by teacher", "mean weight", zero=True),
    ),
    Picture(
        "right_wrong",
        "Trust: right against wrong",
        "Mean weight of rationales whose final answer equals the gold one, and of the others.",
        right_wrong,
    ),
    Picture(
        "trust",
        "Trust: how sharp",
        "Entropy of a question's weights (0: all on one teacher), and the share of rationales that "
        "the consensus filter gave no weight.",
        trust,
    ),
    Picture(
        "nll",
        "Difficulty: each teacher's NLL",
        "How hard a teacher's rationales are for the student, a mean over their tokens.",
        teacher_picture("nll", "Difficulty: NLL by teacher", "NLL (nats a token)"),
    ),
    Picture(
        "mi",
        "Adaptability: each teacher's MI",
        "How much a teacher's steps raise the student's belief in the gold answer.",
        teacher_picture("mi", "Adaptability: MI by teacher", "MI"),
    ),
    Picture(
        "consensus",
        "Consensus: each teacher's agreement with the others",
        "Mean consensus score of a teacher's rationales.",
        teacher_picture("consensus", "Consensus by teacher", "consensus score"),
    ),
    Picture(
        "conflict",
        "Conflict: do teachers pull the same way?",
        "Cosine of a rationale's own gradient with those of the question's other rationales (below "
        "0: they pull against each other), and its norm; before weights are applied.",
        conflict,
    ),
    Picture(
        "agreement",
        "Agreement between teachers",
        "Rows and columns are teachers; in brackets the share of right final answers where known.",
        agreement,
    ),
    Picture(
        "held_out",
        "Held-out NLL",
        "NLL of rationales that the student is not trained on.",
        held_out,
    ),
    Picture(
        "throughput",
        "Throughput",
        "As the trainer measured it, over each logging window.",
        throughput,
    ),
    Picture(
        "learning",
        "Optimizer",
        "Learning rate, and the gradient's norm before clipping.",
        learning,
    ),
)
