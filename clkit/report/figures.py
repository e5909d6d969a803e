"""Matplotlib figures for a page: one look, as inline SVG that follows the page's colours, and as SVG and PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

INK, MUTED, GRID, PAPER = "#1a1f24", "#57606a", "#d8dee4", "#ffffff"
SERIES = ("#0b62b3", "#c2410c", "#15803d", "#8b2fd6", "#a16207", "#0e7490", "#be185d", "#4d5f73")
_DASHES = ("-", "--", ":")
_LEGEND = 62  # letters in a line of a legend
_ROW = 14  # points of height for each line of a legend beyond the third
# The page's style sheet gives each of these variables a value for light and one for dark mode.
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--s{i}" for i, colour in enumerate(SERIES, start=1)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clkit",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn.

    Attributes:
        name: of its files.
        title: stands above it.
        caption: what it shows, for who reads and for who can't see it.
        draw: draws on an Axes.
        size: width and height in points.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Any], None] = field(repr=False)
    size: tuple[float, float] = (340, 230)

    def figure(self) -> Any:
        """A Matplotlib Figure of its own, outside pyplot."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context(_STYLE):
            made = Figure(figsize=(self.size[0] / 72, self.size[1] / 72), layout="constrained")
            axes = made.subplots()
            self.draw(axes)
            if (legend := axes.get_legend()) is not None:  # most have three columns
                rows = -(-len(legend.get_texts()) // 3)
                made.set_figheight((self.size[1] + _ROW * max(0, rows - 3)) / 72)
            # Above the whole figure: a title above the axes has no room to the right of long labels.
            made.suptitle(plain(self.title), x=0.01, ha="left")
        return made

    def svg(self, prefix: str) -> str:
        """Inline SVG without colours of its own; ``prefix`` keeps its ids apart from those of other figures."""
        return inline(self.figure(), f"{self.title}. {self.caption}", prefix)

    def save(self, directory: Path) -> None:
        """``name.svg`` and ``name.png``, for papers and slides."""
        import matplotlib as mpl

        made = self.figure()
        with mpl.rc_context(_STYLE):
            for suffix in ("svg", "png"):
                made.savefig(directory / f"{self.name}.{suffix}", dpi=200, facecolor=PAPER, metadata=_metadata(suffix))


def _metadata(kind: str) -> dict[str, None]:
    """Nothing that changes from one time to the next."""
    return {"Date": None} if kind == "svg" else {"Software": None}


def inline(figure: Any, label: str, prefix: str) -> str:
    """A figure as SVG to stand in a page: small, scalable, with the page's colours and font."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_metadata("svg"))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\bfont: (?:(bold|\d+) )?([\d.]+)px [^;\"]+", _font, text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    text = re.sub(r" transform=\"rotate\(-?0 [^\"]*\"", "", text)
    # Coordinates need no more digits; what is written in the figure keeps its own.
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(href=\"|url\()#([\w-]+)", rf"\1#{prefix}-\2", text)
    text = _ungrouped(text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :].strip()


def classed(page: str) -> str:
    """The page with each style of its inline figures written once, in the head, for all elements that have it."""
    found: dict[str, str] = {}

    def named(style: re.Match[str]) -> str:
        return f' class="{found.setdefault(style[1], f"k{len(found)}")}"'

    text = re.sub(r"<svg .*?</svg>", lambda svg: re.sub(r' style="([^"]*)"', named, svg[0]), page, flags=re.DOTALL)
    rules = "".join(f".{name}{{{style}}}" for style, name in found.items())
    return text.replace("</style>", f"{rules}</style>", 1)


def _ungrouped(text: str) -> str:
    """Without the ``<g>`` that say nothing: half of all elements that Matplotlib writes."""
    kept: list[bool] = []

    def tag(match: re.Match[str]) -> str:
        if match[0] != "</g>":
            kept.append(match[0] != "<g>")
        else:
            return match[0] if kept.pop() else ""
        return match[0] if kept[-1] else ""

    return re.sub(r"<g(?: [^>]*)?>|</g>", tag, text)


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}px" + ("; font-weight: 600" if match[1] in ("bold", "700") else "")


def styles(count: int) -> list[dict[str, str]]:
    """Colour and dashes for ``count`` lines, all different for up to 24."""
    pairs = [{"color": colour, "linestyle": dash} for dash in _DASHES for colour in SERIES]
    return list(islice(cycle(pairs), count))


def legend_below(axes: Any, count: int, most: int = 4) -> None:
    """A legend that takes no room from what is drawn, read line by line; at most ``most`` names in a line.

    Long names are shortened, and fewer of them stand in a line.
    """
    if count > 1:
        handles, labels = axes.get_legend_handles_labels()
        names = [plain(name) for name in shortened(labels, 22 if len(labels) <= 8 else 11)]
        most = max(1, min(most, _LEGEND // (max(map(len, names), default=0) + 7)))
        columns = min(most, -(-count // -(-count // most)))
        # Matplotlib fills column after column.
        order = [k for column in range(columns) for k in range(column, len(handles), columns)]
        axes.legend(
            [handles[k] for k in order], [names[k] for k in order],
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, handlelength=1.6,
        )  # fmt: skip


def axis(axes: Any, x: str, y: str) -> None:
    """Name both axes; what is counted along x has whole numbers."""
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    if x in ("optimiser steps", "edits"):
        axes.xaxis.get_major_locator().set_params(integer=True)


def plain(text: str) -> str:
    r"""A text that Matplotlib writes as it is: to it, what stands between two dollar signs is a formula.

    >>> plain("$10-$20")
    '\\$10-\\$20'
    """
    return text.replace("$", r"\$")


def in_legend(name: str) -> str:
    """A name that a legend shows: Matplotlib leaves out those that begin with an underscore.

    >>> in_legend("_b"), in_legend("b")
    (' _b', 'b')
    """
    return f" {name}" if name.startswith("_") else name


def shortened(names: Sequence[str], length: int = 14) -> list[str]:
    """Names short enough for a tick, still different from each other: what is cut is their end, else their middle.

    >>> shortened(["naive learning_rate=0.002", "naive learning_rate=0.003", "replay with herding"], 14)
    ['naive …e=0.002', 'naive …e=0.003', 'replay with h…']
    """
    half = (length - 1) // 2
    cut = [name if len(name) <= length else name[: length - 1] + "…" for name in names]
    middle = [name if len(name) <= length else f"{name[:half]}…{name[half + 1 - length :]}" for name in names]
    found = [c if cut.count(c) == 1 else m for c, m in zip(cut, middle, strict=True)]
    return [c if found.count(c) == 1 else f"{i + 1} {c}"[:length] for i, c in enumerate(found)]
