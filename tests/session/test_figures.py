"""Figures for notebooks: what is drawn is what the plans say."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes

from hawqfx.errors import HawqfxError
from tests.nets import Residual
from tests.tools import quick

plt.switch_backend("agg")


def test_the_curve_is_that_of_the_plans() -> None:
    frontier = quick(Residual, "weight_bits=4").session.frontier(6, "weight_bits", evaluate=2)
    axes = frontier.plot()
    (line,) = axes.lines
    uses = [point.account.limits["weight_bits"] for point in frontier.points]
    assert np.asarray(line.get_xdata()).tolist() == [use.amount for use in uses]
    assert np.asarray(line.get_ydata()).tolist() == [point.account.loss for point in frontier.points]
    (beside,) = [other for other in axes.figure.axes if other is not axes]
    assert isinstance(beside, Axes)
    (run,) = beside.lines
    assert np.asarray(run.get_ydata()).tolist() == [point.loss for point in frontier.points if point.measured]
    assert axes.get_xlabel().startswith("weight_bits")
    plt.close("all")


def test_the_strip_has_a_bar_for_every_weight() -> None:
    compiled = quick(Residual, "weight_bits=4")
    figure, own = plt.subplots()
    axes = compiled.plot(own)
    assert axes is own
    sites = compiled.planned.weights
    whole = sum(site.numel for site in sites)
    assert [bar.get_height() for bar in axes.patches] == [compiled.plan.bits[site.key] for site in sites]  # type: ignore[attr-defined]
    widths = [bar.get_width() * whole for bar in axes.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([site.numel for site in sites])
    plt.close(figure)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = quick(Residual, "weight_bits=4")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HawqfxError, match=r"pip install 'hawqfx\[notebook\]'"):
        compiled.plot()
