"""Pictures to PNG, in both themes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compact_fast.atomic import atomic_file
from compact_fast.report import style
from compact_fast.report.page import Shown


def show(
    key: str, heading: str, caption: str, draw: Callable[[style.Theme], Figure | str], folder: Path
) -> Shown:
    """Draws a picture in both themes and writes FOLDER/KEY.png, the light one.

    A picture that cannot be made leaves no file, not even an older one.
    """
    made: list[bytes] = []
    size = (0, 0)
    path = folder / f"{key}.png"
    for theme in (style.LIGHT, style.DARK):
        with style.themed(theme):
            figure = draw(theme)
            if isinstance(figure, str):
                path.unlink(missing_ok=True)
                return Shown(key, heading, caption, absent=figure)
            buffer = io.BytesIO()
            canvas: Any = FigureCanvasAgg(figure)
            canvas.print_png(buffer, metadata={"Software": None})
        made.append(buffer.getvalue())
        width, height = figure.get_size_inches() * figure.dpi
        size = (round(width), round(height))
    with atomic_file(path) as temporary:
        temporary.write_bytes(made[0])
    return Shown(key, heading, caption, made[0], made[1], size=size)
