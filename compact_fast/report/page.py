"""The HTML page: one file, no request to anywhere, light and dark, desktop and telephone."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--text:#1c2229;--muted:#5a6570;
  --line:#dde2e7;--soft:#f5f7f9;--warn:#8a4b00}
@media(prefers-color-scheme:dark){:root{--bg:#161b21;--text:#e8ecf0;
  --muted:#9ba6b1;--line:#303841;--soft:#1d242c;--warn:#f5b46a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
ul.summary{padding-left:1.2rem;max-width:52rem}
ul.summary li{margin:.3rem 0;overflow-wrap:anywhere}
.notes{border-left:4px solid var(--warn);background:var(--soft);padding:.5rem 1rem;max-width:52rem}
.notes p{margin:.3rem 0;overflow-wrap:anywhere}
.pictures{columns:2 26rem;column-gap:2rem;margin-top:1.5rem}
figure{margin:0 0 1.75rem;break-inside:avoid}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
figure img{width:100%;height:auto;display:block;max-width:40rem}
figure h2{margin:0 0 .25rem}
figcaption{color:var(--muted);font-size:.9rem;max-width:40rem}
.absent{background:var(--soft);border:1px dashed var(--line);padding:1rem;
  margin:.25rem 0;max-width:40rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;
  vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem;overflow-wrap:anywhere}
td.words{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:9rem}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom;white-space:normal}
#config th,#environment th{text-align:left}
.muted{color:var(--muted);font-size:.9rem}
footer{margin:2rem 0 1rem;color:var(--muted);font-size:.85rem}
"""


@dataclass(frozen=True)
class Cell:
    """A number of the page. `key` and `value` stand in the HTML as they are in the files."""

    text: str
    key: str = ""
    value: float | None = None
    words: bool = False


@dataclass(frozen=True)
class Shown:
    """A picture in both themes (PNG bytes), or in words why there is none."""

    key: str
    heading: str
    caption: str
    light: bytes | None = None
    dark: bytes | None = None
    absent: str = ""
    size: tuple[int, int] = (0, 0)


def document(title: str, body: Iterable[str]) -> str:
    """A whole page. The policy in its head forbids it to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body><main>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</main></body>",
            "</html>",
            "",
        ]
    )


def sentences(words: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(w)}</li>" for w in words)
    return f'<ul class="summary">{items}</ul>'


def notes(words: Sequence[str]) -> str:
    if not words:
        return ""
    lines = "".join(f"<p>{escape(w)}</p>" for w in words)
    return f'<div class="notes" role="note">{lines}</div>'


def pictures(shown: Iterable[Shown]) -> str:
    return f'<div class="pictures">{"".join(map(_figure, shown))}</div>'


def _figure(p: Shown) -> str:
    # The picture has its own title; the heading is for screen readers and where there is none.
    heading = '<h2 class="hidden">'
    if p.light is None or p.dark is None:
        heading = "<h2>"
        picture = f'<p class="absent">{escape(p.absent)}</p>'
    else:
        picture = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(p.dark)}">'
            f'<img src="{_data(p.light)}" alt="{escape(p.heading)}. {escape(p.caption)}" '
            f'width="{p.size[0]}" height="{p.size[1]}"></picture>'
        )
    return (
        f'<figure id="{escape(p.key)}">{heading}{escape(p.heading)}</h2>{picture}'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
    )


def table(key: str, head: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> str:
    """`key` is the table's id. Strings are plain text cells."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table id="{escape(key)}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f'<td class="words">{escape(cell)}</td>'
    marks = ' class="words"' if cell.words else ""
    if cell.key:
        marks += f' data-key="{escape(cell.key)}"'
    if cell.value is not None:
        marks += f' data-value="{escape(json.dumps(cell.value))}"'
    return f"<td{marks}>{escape(cell.text)}</td>"


def plain(value: Any) -> str:
    """A configuration value as one reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
