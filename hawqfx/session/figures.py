"""Figures for notebooks, by matplotlib (the extra `notebook`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hawqfx.errors import HawqfxError
from hawqfx.ir.sites import WeightSite
from hawqfx.maths.formats import Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 0.03  # the least share of the weights of a layer that is named in the figure
_COLOURS = {"static": "tab:blue", "weight-only": "tab:green", "dynamic": "tab:orange", "float": "tab:gray"}


def axes_or_new(axes: "Axes | None", size: tuple[float, float]) -> "Axes":
    """The axes that are given, or those of a new figure of this size in inches.

    Raises:
        HawqfxError: if matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise HawqfxError("figures need matplotlib: pip install 'hawqfx[notebook]'") from error
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def curve(
    axes: "Axes",
    limit: str,
    unit: str,
    amounts: Sequence[float],
    predicted: Sequence[float],
    run: Sequence[float | None],
) -> None:
    """A budget against the predicted loss increase, and the loss of the plans that were run on an axis of its own.

    Args:
        axes: to draw on.
        limit: the limit that grows along the curve.
        unit: of its amounts.
        amounts: of each plan.
        predicted: its predicted loss increase.
        run: its measured loss, if it was run.
    """
    axes.plot(amounts, predicted, marker=".", color="tab:blue", label="predicted")
    axes.set_xlabel(f"{limit} ({unit})" if unit else limit)
    axes.set_ylabel("predicted loss increase")
    if all(loss > 0 for loss in predicted):
        axes.set_yscale("log")
    measured = [(amount, loss) for amount, loss in zip(amounts, run, strict=True) if loss is not None]
    if measured:
        beside = axes.twinx()
        beside.plot(*zip(*measured, strict=True), marker="o", linestyle="none", color="tab:red", label="measured")
        beside.set_ylabel("loss of the plans that were run")
        handles: list[Any] = [*axes.lines, *beside.lines]
        axes.legend(handles=handles)


def strip(axes: "Axes", sites: Sequence[WeightSite], formats: Sequence[Format]) -> None:
    """The bits of every weight in the order of the network, each as wide as its share of the elements."""
    total, start = sum(site.numel for site in sites), 0.0
    seen: set[str] = set()
    for site, width in zip(sites, formats, strict=True):
        share = site.numel / total
        label = None if width.scheme in seen else width.scheme
        seen.add(width.scheme)
        colour = _COLOURS[width.scheme]
        axes.bar(start, width.bits, share, align="edge", color=colour, edgecolor="white", linewidth=0.5, label=label)
        if share >= NAMED:
            middle = start + share / 2
            axes.text(
                middle, width.bits, f"{site.key.removesuffix('.weight')}\n", ha="center", va="bottom", rotation=60
            )
        start += share
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the weights' elements, in the order of the network")
    axes.set_ylabel("bits")
    axes.spines[["top", "right"]].set_visible(False)
    if len(seen) > 1:
        axes.legend()
