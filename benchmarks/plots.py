"""Pictures of what `fleet` found, drawn by matplotlib: `pip install 'splice[plots]'`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.among import STEPS, Among
from benchmarks.batches import MERGED, WAYS, Batch
from benchmarks.forward import SLOTS
from benchmarks.models import REFERENCE, SPLICE
from benchmarks.replay import Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by those who see few colours, too (Okabe and Ito), and by their markers.
_COLOURS = {REFERENCE: "#d55e00", SPLICE: "#0072b2", SLOTS: "#009e73", MERGED: "#555555"}
_MARKERS = {REFERENCE: "s", SPLICE: "o", SLOTS: "^"}
_LIBRARIES = {REFERENCE: "reference", SPLICE: "splice"}


def among(found: list[Among]) -> Figure:
    """What each step takes with ever more adapters on the model, for both libraries."""
    from matplotlib.ticker import EngFormatter

    figure = _figure(11, 6.4)
    counts = list(dict.fromkeys(one.count for one in found))
    every = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (step, told) in zip(every.flat, STEPS.items()):
        for library, name in _LIBRARIES.items():
            points = [(one.count, one.seconds[step]) for one in found if one.library == library]
            axes.plot(
                *zip(*points), _MARKERS[library], linestyle="-", color=_COLOURS[library], label=name, markersize=5
            )
            if library == REFERENCE and points[-1][0] < counts[-1]:
                axes.annotate("stopped here", points[-1], (6, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xscale="log", yscale="log", title=told)
        axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        _tidy(axes)
    for axes in every[-1]:
        axes.set_xlabel("adapters on the model")
    for axes in every[:, 0]:
        axes.set_ylabel("time")
    _legend(figure, every[0, 0])
    return figure


def batches(found: list[Batch]) -> Figure:
    """How many times as long a mixed batch takes as one through a merged adapter, for each way."""
    figure = _figure(10, 4.2)
    tokens = sorted({batch.tokens for batch in found})
    every = figure.subplots(1, len(tokens), squeeze=False, sharey=True)[0]
    ways = [way for way in WAYS if way != MERGED]
    width = 0.8 / len(ways)
    for axes, count in zip(every, tokens):
        chosen = sorted((batch for batch in found if batch.tokens == count), key=lambda batch: batch.adapters)
        for number, way in enumerate(ways):
            places = [index + (number - (len(ways) - 1) / 2) * width for index in range(len(chosen))]
            heights = [batch.seconds[way] / batch.seconds[MERGED] for batch in chosen]
            bars = axes.bar(places, heights, 0.92 * width, color=_COLOURS[way], label=WAYS[way])
            axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=8, padding=1)
        axes.axhline(1, color=_COLOURS[MERGED], linewidth=1, linestyle="--", label=WAYS[MERGED])
        axes.set_xticks(range(len(chosen)), [str(batch.adapters) for batch in chosen])
        told = "1 token" if count == 1 else f"{count} tokens"
        axes.set(yscale="log", xlabel="different adapters in the batch", title=f"{chosen[0].rows} rows of {told}")
        axes.set_ylim(bottom=0.7, top=2 * max(b.seconds[way] / b.seconds[MERGED] for b in found for way in ways))
        _plain_ticks(axes)
        _tidy(axes, "y")
    every[0].set_ylabel("times as long as one merged adapter")
    _legend(figure, every[0])
    return figure


def replay(found: Replay) -> Figure:
    """How long requests waited for their adapters, and what is left of the tokens a second."""
    figure = _figure(10, 3.8)
    waits, speed = figure.subplots(1, 2, width_ratios=(3, 1))
    share = [100 * index / (len(found.waits) - 1) for index in range(len(found.waits))]
    waits.plot([wait * 1e3 for wait in found.waits], share, color=_COLOURS[SLOTS])
    for marked in (0.5, 0.99):
        at = found.wait(marked) * 1e3
        waits.plot([at], [100 * marked], "o", color=_COLOURS[SLOTS])
        waits.annotate(
            f"p{100 * marked:.0f}: {at:.2g} ms",
            (at, 100 * marked),
            (-6, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    waits.axhline(100 * found.hit_rate, color=_COLOURS[MERGED], linewidth=1, linestyle="--")
    waits.annotate(
        f"{100 * found.hit_rate:.0f} % were on the model", (1, 100 * found.hit_rate), (-4, -4),
        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top", fontsize=8,
    )  # fmt: skip
    waits.set(xscale="log", xlabel="time to adapter (ms)", ylabel="requests (%)", ylim=(0, 103))
    waits.set_title(
        f"{found.registered:,} adapters over {found.slots} slots, {found.requests:,} requests by Zipf's law"
    )
    _plain_ticks(waits, "x")
    _tidy(waits)
    names, heights = ("one\nadapter", f"{found.registered:,}\nadapters"), (found.single, found.tokens_per_second)
    bars = speed.bar(names, heights, 0.6, color=[_COLOURS[MERGED], _COLOURS[SLOTS]])
    speed.bar_label(bars, [f"{height:,.0f}" for height in heights], fontsize=8, padding=1)
    speed.set(ylabel="generated tokens a second", ylim=(0, 1.15 * max(heights)))
    _tidy(speed, "y")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write an SVG, white behind, the same file for the same figures."""
    from matplotlib import rc_context

    # Without the date and with names that are not drawn by lot.
    with rc_context({"svg.hashsalt": "splice"}):
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # Not by `pyplot`, which keeps every figure and looks for a screen.
    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure, axes: Axes) -> None:
    """What the colours mean, above all of the figure, where nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)


def _tidy(axes: Axes, lines: str = "both") -> None:
    axes.grid(True, axis=lines, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def _plain_ticks(axes: Axes, which: str = "y") -> None:
    """Numbers as people write them on a logarithmic axis, and not as powers."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if which == "y" else (1,)))
    axis.minorticks_off()
