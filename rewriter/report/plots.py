"""The plots of a report page: matplotlib drawings as inline SVG, coloured by the page's CSS.

Colours in the SVG are CSS variables and text stays text, so that a plot follows the page from light
to dark and needs no font. Each is drawn narrow enough to be read on a phone.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rewriter.cost import Cost, Device
from rewriter.modules.quiet import quietly
from rewriter.report import format as fmt
from rewriter.report.content import Layer

__all__ = ["Timed", "bars", "predictions", "roofline", "timeline"]

# Stand-ins that matplotlib accepts as colours; `_inline` puts the page's variables in their place.
_TEXT, _MUTED, _LINE, _BEFORE, _AFTER, _WARN = (f"#fe00f{i}" for i in range(6))
_VARIABLES = {
    _TEXT: "var(--text)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _BEFORE: "var(--before)",
    _AFTER: "var(--accent)",
    _WARN: "var(--warn)",
}
_WIDTH, _NARROW = 4.0, 3.1  # inches
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rewriter",
    "text.parse_math": False,  # names may hold dollars
    "axes.unicode_minus": False,
    "font.size": 8.5,
    "font.family": "sans-serif",
    "text.color": _TEXT,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Timed:
    """A state of the model with its predicted and measured seconds."""

    name: str
    predicted: float
    measured: float


def bars(
    title: str, names: Sequence[str], values: Sequence[float], show: Callable[[float], str]
) -> str:
    """One bar per state of the model; the first is the original, the last stands out."""
    with _figure(0.1 + 0.38 * len(names), _NARROW) as (figure, ax):
        figure.subplots_adjust(left=0.01, right=0.99, top=1.0, bottom=0.0)
        top = max([*values, 1e-30])
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            colour = _BEFORE if i == 0 else _AFTER
            ax.barh(
                i, value, height=0.36, color=colour, alpha=1.0 if i in (0, len(names) - 1) else 0.6
            )
            ax.text(0, i - 0.28, _short(name, 42), va="bottom", ha="left", color=_MUTED)
            ax.text(top * 1.02, i, show(value), va="center", ha="left")
        ax.set_xlim(0, top * 1.3)
        ax.set_ylim(len(names) - 0.6, -0.8)
        ax.axis("off")
    said = "; ".join(f"{n}: {show(v)}" for n, v in zip(names, values, strict=True))
    return _inline(figure, f"{title}. {said}")


def timeline(
    before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]], title: str
) -> str:
    """Bytes alive over the run, each run stretched to the same length."""
    with _figure(2.4) as (figure, ax):
        figure.subplots_adjust(left=0.14, right=0.97, top=0.97, bottom=0.2)
        for points, colour, name in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
            if not points:
                continue
            last = max(len(points) - 1, 1)
            xs = [100 * i / last for i in range(len(points))]
            ys = [float(size) for _, size in points]
            ax.fill_between(xs, ys, step="post", color=colour, alpha=0.16, linewidth=0)
            ax.step(xs, ys, where="post", color=colour, linewidth=1.3, label=name)
            top = max(range(len(ys)), key=lambda i: ys[i])
            ax.plot([xs[top]], [ys[top]], "o", color=colour, markersize=3.5)
        start = next((i for i, (name, _) in enumerate(after) if name.startswith("backward")), None)
        if start is not None:
            x = 100 * start / max(len(after) - 1, 1)
            ax.axvline(x, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            ax.text(x, 0.02, " backward", color=_MUTED, transform=ax.get_xaxis_transform())
        ax.set_xlim(0, 100)
        ax.set_ylim(0, max((s for _, s in [*before, *after]), default=1) * 1.12 or 1)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: fmt.size(round(v))))
        ax.set_xlabel("share of the operations, %")
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        figure.legend(loc="lower right", ncols=2, bbox_to_anchor=(0.98, 0.0), borderpad=0)
        ax.xaxis.set_label_coords(0.0, -0.16)
        ax.xaxis.label.set_horizontalalignment("left")
    return _inline(figure, title)


def roofline(device: Device, layers: Sequence[Layer], whole: tuple[Cost, Cost]) -> str:
    """FLOP/byte against FLOP/s on logarithmic axes, with the device's roofs.

    Args:
        device: whose roofs are drawn and whose predictions the points are.
        layers: circles, hollow before and full after; equal ones are one larger circle.
        whole: cost of the model before and after, as diamonds.

    Returns:
        "" where no layer has a time and arithmetic.
    """
    old = _points([x.before for x in layers])
    new = _points([x.after for x in layers])
    model = [_points([cost]) for cost in whole]
    everything = [p for points in (old, new, *model) for p in points]
    if not everything:
        return ""
    peaks = _peaks(
        device, [x for layer in layers for x in (layer.before, layer.after)] + list(whole)
    )
    fastest, slowest = max(peaks.values()), device.levels[-1].bandwidth
    left = min(p[0] for p in everything) / 2
    right = max([*(p[0] for p in everything), fastest / slowest]) * 3
    low, high = min(p[1] for p in everything) / 3, max(fastest, *(p[1] for p in everything)) * 3
    quickest = max(level.bandwidth for level in device.levels)
    with _figure(3.3) as (figure, ax):
        figure.subplots_adjust(left=0.18, right=0.97, top=0.98, bottom=0.2)
        for i, level in enumerate(reversed(device.levels)):
            knee = fastest / level.bandwidth
            style: Any = "solid" if i == 0 else (0, (4, 2 + i))
            ends = (left, knee)
            ax.plot(ends, [x * level.bandwidth for x in ends], color=_MUTED, lw=1.1, ls=style)
        for rate in sorted(set(peaks.values())):
            kinds = " · ".join(_SHORT.get(d, d) for d, r in peaks.items() if r == rate)
            ax.plot((rate / quickest, right), (rate, rate), color=_MUTED, lw=1.1)
            label = f"{kinds}: {fmt.rate(rate)}"
            ax.text(right, rate * 1.08, label, ha="right", va="bottom", color=_MUTED, fontsize=7.5)
        _scatter(ax, old, _BEFORE, "before", hollow=True)
        _scatter(ax, new, _AFTER, "after")
        for points, colour, name in zip(
            model, (_BEFORE, _AFTER), ("whole model, before", "whole model, after"), strict=True
        ):
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            ax.plot(xs, ys, "D", color=colour, ms=6.5, mec=_TEXT, mew=0.8, label=name, ls="none")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(left, right)
        ax.set_ylim(low, high)
        ax.set_xlabel("FLOP per byte")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: fmt.rate(v, "")))
        ax.yaxis.set_major_locator(LogLocator(10, numticks=8))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        ax.set_ylabel("FLOP/s")
        ax.grid()
        ax.set_axisbelow(True)
        figure.legend(
            loc="lower center", ncols=4, bbox_to_anchor=(0.53, 0.0), borderpad=0,
            handletextpad=0.1, columnspacing=0.9, fontsize=7.5,
        )  # fmt: skip
        ax.xaxis.set_label_coords(0.5, -0.09)
    memory = "; ".join(f"{v.name} {fmt.rate(v.bandwidth, 'B/s')}" for v in device.levels)
    return _inline(figure, f"Roofline of {device.name}: {memory}; {len(layers)} layers")


def predictions(times: Sequence[Timed]) -> str:
    """Predicted against measured seconds; on the diagonal they agree."""
    values = [v for t in times for v in (t.predicted, t.measured)]
    with _figure(2.6) as (figure, ax):
        figure.subplots_adjust(left=0.2, right=0.96, top=0.97, bottom=0.2)
        low, high = 0.0, max(values) * 1.15
        ax.plot((low, high), (low, high), color=_MUTED, lw=1.0, ls=(0, (4, 3)))
        for i, t in enumerate(times):
            colour = _BEFORE if i == 0 else _AFTER
            ax.plot([t.measured], [t.predicted], "o", color=colour, ms=6)
            right = t.measured > high / 2
            ax.annotate(
                _short(t.name, 24), (t.measured, t.predicted), (-7 if right else 7, 0),
                textcoords="offset points", va="center", ha="right" if right else "left",
            )  # fmt: skip
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: fmt.seconds(v) if v else "0"))
        ax.locator_params(nbins=4)
        ax.set_xlabel("measured")
        ax.set_ylabel("predicted")
        ax.grid()
        ax.set_axisbelow(True)
    said = "; ".join(
        f"{t.name}: predicted {fmt.seconds(t.predicted)}, measured {fmt.seconds(t.measured)}"
        for t in times
    )
    return _inline(figure, f"Predicted against measured time. {said}")


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def _points(costs: Sequence[Cost | None]) -> list[tuple[float, float, int]]:
    """(FLOP per byte, FLOP/s, how many) of those that compute and have a time; equal ones once."""
    found: dict[tuple[float, float], int] = {}
    for cost in costs:
        if cost is None or not cost.latency_s or not cost.flops or not cost.bytes_moved:
            continue
        point = float(f"{cost.intensity:.3g}"), float(f"{cost.flops / cost.latency_s:.3g}")
        found[point] = found.get(point, 0) + 1
    return [(x, y, n) for (x, y), n in found.items()]


def _peaks(device: Device, costs: Sequence[Cost | None]) -> Mapping[str, float]:
    """Peak FLOP/s of the matrix units, of the types that the costs compute in."""
    used = {w.dtype for cost in costs if cost is not None for w in cost.work if w.flops}
    return {d: device.peak(d) for d in sorted(used or {"float32"}) if d}


def _scatter(
    ax: Axes,
    points: Sequence[tuple[float, float, int]],
    colour: str,
    name: str,
    hollow: bool = False,
) -> None:
    sizes = [14 + 6 * math.log2(n) for *_, n in points]
    ax.scatter(
        [p[0] for p in points],
        [p[1] for p in points],
        s=sizes,
        label=name,
        facecolors="none" if hollow else colour,
        edgecolors=colour,
        linewidths=1.1,
        alpha=0.9,
    )


def _short(name: str, length: int) -> str:
    name = "".join(c if c.isprintable() else " " for c in name)  # XML has no control characters
    return name if len(name) <= length else name[: length - 1] + "…"


@contextmanager
def _figure(height: float, width: float = _WIDTH) -> Iterator[tuple[Figure, Axes]]:
    """A figure of our style, without pyplot: the user's own plots and settings stay untouched."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=100)
        yield figure, figure.add_subplot()


_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def _inline(figure: Figure, label: str) -> str:
    """The figure as an SVG element that can stand beside others in a page."""
    out = io.StringIO()
    # the browser's fonts have the characters that matplotlib's lack
    with matplotlib.rc_context(_STYLE), quietly(about="missing from"):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(out.getvalue())
    drawn = (label + out.getvalue()).encode(errors="backslashreplace")
    mark = f"p{zlib.crc32(drawn):08x}-"
    for element in root.iter():
        for child in [c for c in element if c.tag == f"{_SVG}style"]:
            element.remove(child)  # it would style the whole page
        _own(element, mark)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)  # in HTML an svg needs no namespace
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode").replace("\n", " ")


def _own(element: ElementTree.Element, mark: str) -> None:
    """Ids that no other plot of the page has, the page's colours and font, short numbers."""
    target = element.attrib.pop(_HREF, None)
    if target is not None:
        element.set("href", f"#{mark}{target[1:]}")
    for name, value in list(element.attrib.items()):
        if name == "id":
            if element.tag == f"{_SVG}g":  # nothing refers to groups
                del element.attrib["id"]
                continue
            value = mark + value
        value = value.replace("url(#", f"url(#{mark}")
        if name == "style":
            value = re.sub(r" *font-family:[^;]*;?", "", value)
            value = re.sub(r"font-size: ([\d.]+px)", r"font-size: calc(\1*var(--plot-text))", value)
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, variable)
        element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", value))
