r"""Figures, and nothing else: no algorithm is imported here.

:func:`use_style` is called once in a chapter. From then on figures are transparent SVG whose text,
axes and colours are of middle lightness, so that one file reads well on a white and on a dark page,
and whose bytes do not change from one run to the next. The other functions draw on axes that the
caller made, or make a figure of their own if given none, and return the axes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

__all__ = [
    "COLOURS",
    "GREY",
    "LINES",
    "animate",
    "cost_panels",
    "draw_flow",
    "gap_bars",
    "langevin_bias",
    "latent_scan",
    "plot_intervals",
    "plot_trajectory",
    "sample_panels",
    "shade_gap",
    "show_density",
    "show_digits",
    "use_style",
]

GREY = "#757d89"
"""Text, axes and ticks: 4.2 to 1 in contrast on white, 4.3 to 1 on the dark page #14181e."""

COLOURS = {
    "exact": "#529e74",
    "approximation": "#d67320",
    "bound": "#4a85fe",
    "samples": "#d85bbb",
    "highlight": "#7e53bc",
    "other": "#796914",
}
"""A colour for each thing that recurs: the exact answer (posterior, evidence), the approximation q,
a bound, samples, and two for whatever else there is. Each has a contrast of at least 3.2 to 1 on
white and on #14181e; chosen by search so that they stay apart for readers who confuse red and green
(a test simulates protanopia and deuteranopia)."""

LINES = {
    "exact": {"color": COLOURS["exact"], "linestyle": "-", "linewidth": 2.4},
    "approximation": {"color": COLOURS["approximation"], "linestyle": "--"},
    "bound": {"color": COLOURS["bound"], "linestyle": "-"},
    "samples": {"color": COLOURS["samples"], "linestyle": "-."},
    "reference": {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.2},
}
"""Line styles to go with the colours, so that no line is told by its colour alone:
``ax.plot(x, y, **LINES["exact"])``."""

_CYCLE = ["bound", "approximation", "exact", "samples", "highlight", "other"]

_STYLE = {
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "figure.figsize": (6.4, 3.6),
    "figure.constrained_layout.use": True,
    "figure.dpi": 96,
    "savefig.facecolor": "none",
    "savefig.edgecolor": "none",
    "svg.hashsalt": "amortised",
    "svg.fonttype": "path",
    "path.simplify_threshold": 0.5,
    "axes.facecolor": "none",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=[COLOURS[name] for name in _CYCLE]),
    "axes.axisbelow": True,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.8,
    "hatch.color": GREY,
    "font.size": 10,
    "image.interpolation": "none",
}


def use_style() -> None:
    """Set the book's figure style, once in a process.

    In a notebook, figures become SVG with a transparent background, no date and fixed identifiers:
    two runs of a chapter give the same bytes. In a script only the appearance changes.

    >>> use_style()
    >>> plt.rcParams["figure.facecolor"], plt.rcParams["text.color"]
    ('none', '#757d89')
    """
    plt.rcParams.update(_STYLE)
    try:
        from IPython import get_ipython
        from matplotlib_inline.config import InlineBackend
    except ImportError:
        return
    if get_ipython() is not None:
        inline = InlineBackend.instance(parent=get_ipython())
        inline.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None}}
        inline.figure_formats = {"svg"}


# --- images --------------------------------------------------------------------------------------


def show_digits(
    images: Tensor,
    ncols: int | None = None,
    *,
    ax: Axes | None = None,
    colour: str = GREY,
    row_labels: Sequence[str] = (),
    padding: int = 2,
    width: float = 6.4,
) -> Axes:
    """Show images in a grid, filled row by row, as ink on the page.

    Values are opacities: 0 is the bare page, 1 is full ink, so a digit reads well on a light and on
    a dark page.

    :param images: ``[N, 784]``, ``[N, 28, 28]`` or ``[N, H, W]``, values in ``[0, 1]``.
    :param ncols: images in a row; all of them by default, at most 16.
    :param ax: axes to draw on; a new figure by default.
    :param colour: colour of the ink.
    :param row_labels: a label for each row, left of it.
    :param padding: empty pixels between neighbours.
    :param width: width of the new figure, inches.
    :return: the axes.
    :raises ValueError: if ``images`` has another shape, is empty or leaves ``[0, 1]``.

    >>> ax = show_digits(torch.linspace(0, 1, 6 * 784).reshape(6, 784), ncols=3)
    >>> ax.images[0].get_array().shape  # two rows of three images of 28 pixels, and padding
    (58, 88, 4)
    >>> plt.close(ax.figure)
    """
    pixels = _as_images(images)
    ncols = min(len(pixels), 16) if ncols is None else ncols
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, got {ncols}")
    mosaic = _mosaic(pixels, ncols, padding)
    if ax is None:
        _, ax = plt.subplots(figsize=(width, max(width * mosaic.shape[0] / mosaic.shape[1], 0.4)))
    ax.imshow(_ink(mosaic, colour), interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if row_labels:
        stride = pixels.shape[1] + padding
        nrows = math.ceil(len(pixels) / ncols)
        if len(row_labels) != nrows:
            raise ValueError(f"{nrows} rows, but {len(row_labels)} row_labels")
        centres = [row * stride + (pixels.shape[1] - 1) / 2 for row in range(nrows)]
        ax.set_yticks(centres, labels=row_labels)
        ax.tick_params(left=False)
    return ax


def latent_scan(
    decode_fn: Callable[[Tensor], Tensor],
    *,
    extent: float = 2.5,
    num_per_side: int = 15,
    ax: Axes | None = None,
    colour: str = GREY,
) -> Axes:
    """Decoded images over a square of a two-dimensional latent space, at their place in it.

    :param decode_fn: maps latents ``[N, 2]`` to images ``[N, 784]`` or ``[N, H, W]`` in
        ``[0, 1]``.
    :param extent: the square is ``[-extent, extent]`` in both directions.
    :param num_per_side: images along each side.
    :param ax: axes to draw on; a new figure by default.
    :param colour: colour of the ink.
    :return: the axes, whose coordinates are the latents.

    >>> ax = latent_scan(lambda z: z.sigmoid().mean(1, keepdim=True).expand(-1, 784))
    >>> ax.get_xlabel(), len(ax.images)
    ('$z_1$', 1)
    >>> plt.close(ax.figure)
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5.0, 5.0))
    centres = torch.linspace(-extent, extent, num_per_side)
    # Rows from the top down, so that the second coordinate grows upwards on the page.
    z = torch.stack(torch.meshgrid(centres.flip(0), centres, indexing="ij"), dim=-1).flip(-1)
    with torch.no_grad():
        pixels = _as_images(decode_fn(z.reshape(-1, 2)))
    half = extent + extent / max(num_per_side - 1, 1)
    ax.imshow(
        _ink(_mosaic(pixels, num_per_side, padding=0), colour),
        extent=(-half, half, -half, half),
        interpolation="none",
    )
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.spines[:].set_visible(False)
    return ax


def _as_images(images: Tensor) -> np.ndarray:
    pixels = torch.as_tensor(images).detach().cpu().float().numpy()
    if pixels.ndim == 2:
        side = math.isqrt(pixels.shape[1])
        if side * side != pixels.shape[1]:
            raise ValueError(
                f"images have {pixels.shape[1]} pixels, which is no square; pass [N, H, W]"
            )
        pixels = pixels.reshape(-1, side, side)
    if pixels.ndim != 3 or len(pixels) == 0:
        raise ValueError(f"images must be [N, pixels] or [N, H, W], got {list(pixels.shape)}")
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got values from {pixels.min():.3g} to {pixels.max():.3g}; "
            "pass probabilities, not logits"
        )
    return pixels


def _mosaic(pixels: np.ndarray, ncols: int, padding: int) -> np.ndarray:
    n, height, width = pixels.shape
    nrows = math.ceil(n / ncols)
    shape = (nrows * (height + padding) - padding, ncols * (width + padding) - padding)
    mosaic = np.zeros(shape, dtype=np.float32)
    for i, image in enumerate(pixels):
        row, column = divmod(i, ncols)
        top, left = row * (height + padding), column * (width + padding)
        mosaic[top : top + height, left : left + width] = image
    return mosaic


def _ink(opacity: np.ndarray, colour: str) -> np.ndarray:
    rgba = np.empty((*opacity.shape, 4), dtype=np.uint8)
    rgba[..., :3] = np.round(255 * np.array(to_rgb(colour)))
    rgba[..., 3] = np.round(255 * opacity)
    return rgba


# --- densities and chains ------------------------------------------------------------------------


def show_density(
    log_density_fn: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    ax: Axes | None = None,
    colour: str = COLOURS["exact"],
    masses: Sequence[float] = (0.95, 0.8, 0.5),
    fill: bool = True,
    linestyle: str = "-",
    label: str | None = None,
    num_points: int = 121,
) -> Axes:
    """Contours of a two-dimensional density that enclose given shares of its mass.

    Each contour is the boundary of a highest-density region: no region of the same mass is smaller.
    Masses are counted within ``extent``, which should hold nearly all of the density.

    :param log_density_fn: maps points ``[..., 2]`` to log-densities ``[...]``, in nats; the
        normalising constant does not matter. Called once, in float64, on a grid.
    :param extent: ``(left, right, bottom, top)``.
    :param ax: axes to draw on; a new figure by default.
    :param colour: colour of the contours.
    :param masses: share of the mass inside each contour.
    :param fill: shade the regions too.
    :param linestyle: style of the contours.
    :param label: entry in the legend.
    :param num_points: grid points in each direction.
    :return: the axes.
    :raises ValueError: if the density is nan, infinite or zero all over the grid.

    >>> ax = show_density(lambda z: -0.5 * z.square().sum(-1), (-4, 4, -4, 4), masses=(0.5,))
    >>> right, _ = ax.collections[-1].get_paths()[0].vertices.max(axis=0)
    >>> f"{right:.2f}"  # half of a Gaussian lies within sqrt(2 log 2) = 1.177
    '1.18'
    >>> plt.close(ax.figure)
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 4.2))
    left, right, bottom, top = extent
    x = torch.linspace(left, right, num_points, dtype=torch.float64)
    y = torch.linspace(bottom, top, num_points, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    with torch.no_grad():
        log_density = log_density_fn(points)
    if log_density.shape != points.shape[:-1]:
        raise ValueError(
            f"log_density_fn maps {list(points.shape)} to {list(log_density.shape)}, "
            f"not to {list(points.shape[:-1])}"
        )
    if not torch.isfinite(log_density.max()):
        raise ValueError(f"the largest log-density on the grid is {log_density.max().item()}")
    density = (log_density - log_density.max()).exp()
    falling = density.flatten().sort(descending=True).values
    share = falling.cumsum(0) / falling.sum()
    levels = [falling[(share < mass).sum().clamp(max=len(share) - 1)].item() for mass in masses]
    levels = sorted(set(levels))
    if fill:
        for level in levels:
            ax.contourf(x, y, density, levels=[level, 2.0], colors=[colour], alpha=0.14)
    ax.contour(x, y, density, levels=levels, colors=[colour], linestyles=linestyle, linewidths=1.2)
    if label is not None:
        ax.plot([], [], color=colour, linestyle=linestyle, label=label)
    ax.set_aspect("equal")
    return ax


def plot_trajectory(
    positions: Tensor,
    *,
    ax: Axes | None = None,
    colour: str = COLOURS["samples"],
    label: str | None = None,
    line: bool = True,
) -> Axes:
    """The path of one chain in the plane, from a ring at its start.

    Where a chain stays, because a proposal was rejected, a point lies on the one before it and
    looks darker.

    :param positions: ``[T, 2]``, in order.
    :param ax: axes to draw on; a new figure by default.
    :param colour: colour of the path.
    :param label: entry in the legend.
    :param line: join the points.
    :return: the axes.

    >>> ax = plot_trajectory(torch.tensor([[0.0, 0.0], [1.0, 0.5], [1.0, 0.5]]))
    >>> ax.lines[0].get_xydata().shape
    (3, 2)
    >>> plt.close(ax.figure)
    """
    positions = torch.as_tensor(positions).detach().cpu()
    if positions.ndim != 2 or positions.shape[1] != 2 or len(positions) == 0:
        raise ValueError(f"positions must be [T, 2], got {list(positions.shape)}")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 4.2))
    ax.plot(*positions.T, color=colour, linewidth=0.8 if line else 0, alpha=0.7)
    ax.plot(
        *positions.T, ".", color=colour, markersize=5, markeredgewidth=0, alpha=0.7, label=label
    )
    ax.plot(*positions[0], "o", color=colour, markersize=9, fillstyle="none")
    return ax


def sample_panels(
    samples: Mapping[str, Tensor],
    log_density_fn: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    ncols: int = 4,
    num_shown: int = 250,
    panel_size: float = 1.8,
    colour: str = COLOURS["approximation"],
) -> np.ndarray:
    """Several samples in the plane, each on its own panel above one and the same density.

    :param samples: ``{title: [N, 2]}``; the first ``num_shown`` points of each are drawn.
    :param log_density_fn: as in :func:`show_density`; its contours lie under each sample.
    :param extent: ``(left, right, bottom, top)``; points outside are not seen.
    :param ncols: panels in a row.
    :param num_shown: points drawn on a panel.
    :param panel_size: width of a panel, inches.
    :param colour: colour of the points.
    :return: the axes of the panels, ``[len(samples)]``.

    >>> two = {"a": torch.zeros(5, 2), "b": torch.ones(5, 2)}
    >>> panels = sample_panels(two, lambda z: -0.5 * z.square().sum(-1), (-3, 3, -3, 3))
    >>> [panel.get_title() for panel in panels]
    ['a', 'b']
    >>> plt.close(panels[0].figure)
    """
    ncols = min(ncols, len(samples))
    nrows = math.ceil(len(samples) / ncols)
    figsize = (panel_size * ncols, (panel_size + 0.05) * nrows)
    _, grid = plt.subplots(nrows, ncols, sharex=True, sharey=True, squeeze=False, figsize=figsize)
    panels = grid.flatten()
    for panel in panels[len(samples) :]:
        panel.set_visible(False)
    style = {"color": colour, "markersize": 3, "markeredgewidth": 0, "alpha": 0.6}
    for panel, (title, points) in zip(panels, samples.items(), strict=False):
        show_density(log_density_fn, extent, ax=panel, num_points=81)
        panel.plot(*torch.as_tensor(points)[:num_shown].detach().cpu().T, ".", **style)
        panel.set_title(title, fontsize=9)
        panel.set(xlim=extent[:2], ylim=extent[2:])
    return panels[: len(samples)]


def draw_flow(
    figure: Figure,
    target_fn: Callable[[Tensor], Tensor],
    approximation_fn: Callable[[Tensor], Tensor],
    samples: Tensor,
    divergence: float,
    extent: tuple[float, float, float, float],
    *,
    title: str,
    top: float,
    num_shown: int = 250,
) -> None:
    """A frame of :func:`animate`: samples between a target and an approximation, and a bar.

    :param figure: an empty figure.
    :param target_fn: log-density of the target, as in :func:`show_density` but in float32.
    :param approximation_fn: log-density of the approximation.
    :param samples: ``[N, 2]``; the first ``num_shown`` are drawn.
    :param divergence: height of the bar, in nats.
    :param extent: ``(left, right, bottom, top)`` of the plane.
    :param title: of the plane.
    :param top: upper end of the bar's axis.

    >>> figure, round_fn = plt.figure(), lambda z: -0.5 * z.square().sum(-1)
    >>> laws, square = (round_fn, round_fn), (-3, 3, -3, 3)
    >>> draw_flow(figure, *laws, torch.zeros(5, 2), 1.0, square, title="start", top=2.0)
    >>> [ax.get_title() for ax in figure.axes]
    ['start', '']
    >>> plt.close(figure)
    """
    plane, bar = figure.subplots(1, 2, width_ratios=(5, 1))
    show_density(lambda z: target_fn(z.float()), extent, ax=plane, num_points=61)
    orange = {"colour": COLOURS["approximation"], "masses": (0.9,), "fill": False}
    show_density(lambda z: approximation_fn(z.float()), extent, ax=plane, **orange, num_points=61)
    plane.plot(*samples[:num_shown].cpu().T, ".", color=COLOURS["samples"], markersize=3)
    plane.set(xlim=extent[:2], ylim=extent[2:], xlabel="$z_1$", ylabel="$z_2$", title=title)
    bar.bar([0], [divergence], color=COLOURS["bound"], alpha=0.5)
    bar.set(ylim=(0, top), xticks=[], ylabel="nats")


# --- bounds, gaps and tables ---------------------------------------------------------------------


def shade_gap(
    ax: Axes,
    x: Tensor,
    lower: Tensor,
    upper: Tensor | float,
    *,
    label: str = "gap",
    colour: str = COLOURS["bound"],
) -> Axes:
    """Shade what lies between a lower bound and what it bounds, or between two bounds.

    :param ax: axes on which the two are drawn.
    :param x: ``[N]``.
    :param lower: ``[N]``.
    :param upper: ``[N]`` or a number.
    :param label: entry in the legend.
    :param colour: colour of the shade.
    :return: the axes.

    >>> figure, ax = plt.subplots()
    >>> len(shade_gap(ax, torch.arange(3), torch.tensor([-2.0, -1.5, -1.2]), -1.0).collections)
    1
    >>> plt.close(figure)
    """
    x, lower, upper = (torch.as_tensor(t).detach().cpu().double() for t in (x, lower, upper))
    ax.fill_between(
        x, lower, upper.expand_as(lower), color=colour, alpha=0.2, linewidth=0, label=label
    )
    return ax


def gap_bars(
    labels: Sequence[str],
    gaps: Mapping[str, Sequence[float] | Tensor],
    *,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Axes:
    """Horizontal bars that add up a loss from its parts, one bar for each label, from the top.

    :param labels: one for each bar.
    :param gaps: for each part, for instance the approximation and the amortisation gap, its values
        ``[num_labels]``. A part may be negative: it then starts to the left of zero.
    :param ax: axes to draw on; a new figure by default.
    :param unit: unit of the values, for the axis.
    :return: the axes.

    >>> ax = gap_bars(["full", "diagonal"], {"approximation": [0.5, 1.5], "amortisation": [2, 2]})
    >>> [float(bar.get_x()) for bar in ax.patches]  # the second part starts where the first ends
    [0.0, 0.0, 0.5, 1.5]
    >>> plt.close(ax.figure)
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.9 + 0.45 * len(labels)))
    right, left = np.zeros(len(labels)), np.zeros(len(labels))
    hatches = ["", "///", "\\\\\\", "xxx"]
    for i, (name, values) in enumerate(gaps.items()):
        values = torch.as_tensor(values).detach().cpu().double().numpy()
        if values.shape != (len(labels),):
            raise ValueError(f"gaps[{name!r}] must have {len(labels)} values, got {values.shape}")
        colour = COLOURS[("approximation", "bound", "samples", "other")[i % 4]]
        ax.barh(
            np.arange(len(labels)),
            values,
            left=np.where(values >= 0, right, left),
            height=0.62,
            color=(*to_rgb(colour), 0.55),
            edgecolor=colour,
            hatch=hatches[i % 4],
            label=name,
        )
        right, left = right + np.maximum(values, 0), left + np.minimum(values, 0)
    ax.set_yticks(np.arange(len(labels)), labels=labels)
    ax.set_xlabel(unit)
    _rows_from_the_top(ax, len(labels))
    return ax


def plot_intervals(
    labels: Sequence[str],
    groups: Mapping[str, tuple[Sequence[float], Sequence[float] | None]],
    *,
    ax: Axes | None = None,
    num_standard_errors: float = 2.0,
    xlabel: str = "nats",
) -> Axes:
    """Estimates with error bars, one row for each label, for instance published beside measured.

    :param labels: one for each row, from the top.
    :param groups: for each group its estimates and standard errors, ``[num_labels]`` each. ``nan``
        leaves a place empty, ``None`` for the errors draws no bars.
    :param ax: axes to draw on; a new figure by default.
    :param num_standard_errors: half the length of a bar.
    :param xlabel: label of the axis.
    :return: the axes.

    >>> ax = plot_intervals(["VAE", "AMC"], {"published": ([-80.6, -78.2], None),
    ...                                      "measured": ([-82.2, -83.0], [0.7, 0.9])})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['published', 'measured']
    >>> plt.close(ax.figure)
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.9 + 0.4 * len(labels)))
    rows = np.arange(len(labels))
    for i, (name, (estimates, errors)) in enumerate(groups.items()):
        for values in (estimates, errors):
            if values is not None and len(values) != len(labels):
                raise ValueError(
                    f"group {name!r} has {len(values)} values for {len(labels)} labels"
                )
        offset = 0.16 * (i - (len(groups) - 1) / 2)
        ax.errorbar(
            np.asarray(estimates, dtype=float),
            rows + offset,
            xerr=None if errors is None else num_standard_errors * np.asarray(errors, dtype=float),
            fmt="osD^v"[i % 5],
            color=COLOURS[_CYCLE[i % len(_CYCLE)]],
            fillstyle="none" if errors is None else "full",
            markersize=5,
            label=name,
        )
    ax.set_yticks(rows, labels=labels)
    ax.set_xlabel(xlabel)
    ax.grid(axis="x")
    _rows_from_the_top(ax, len(labels))
    return ax


def langevin_bias(
    inflation: Mapping[float, tuple[Tensor, Tensor]], groups: Mapping[str, Mapping[str, float]]
) -> np.ndarray:
    r"""Variance of unadjusted Langevin chains over that of their targets, beside grouped values.

    :param inflation: ``{step size s: (precisions [N], measured ratio [N])}``; the line is
        :math:`1 / (1 - s \lambda / 4)`, and a dotted line stands at the limit of stability.
    :param groups: ``{group: {label: value}}``, in nats: a line for each label, on the right.
    :return: the two axes.

    >>> axes = langevin_bias({0.2: (torch.ones(1), torch.ones(1))}, {"a": {"VAE": -80.6}})
    >>> axes[0].get_xscale(), [text.get_text() for text in axes[1].get_yticklabels()]
    ('log', ['VAE'])
    >>> plt.close(axes[0].figure)
    """
    _, axes = plt.subplots(1, 2, figsize=(7.4, 3.4))
    for (step_size, (precisions, ratio)), marker in zip(inflation.items(), "osD^", strict=False):
        grid = torch.logspace(-0.5, math.log10(3.9 / step_size), 100)
        label = f"$\\eta = {step_size:g}$"
        (line,) = axes[0].plot(grid, 1 / (1 - step_size * grid / 4), label=label)
        axes[0].plot(precisions, ratio, marker, color=line.get_color(), markersize=5)
        axes[0].axvline(4 / step_size, linestyle=":", color=line.get_color())
    axes[0].set(xscale="log", ylim=(0.8, 8), xlabel=r"precision $\lambda$")
    axes[0].set_ylabel("variance / exact variance")
    axes[0].legend(loc="upper left")
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    values = {name: [g.get(label, math.nan) for label in labels] for name, g in groups.items()}
    plot_intervals(labels, {name: (v, None) for name, v in values.items()}, ax=axes[1])
    axes[1].legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return axes


def cost_panels(
    curves: Mapping[str, Tensor], recorded: Sequence[tuple[str, float, float, float, float]]
) -> np.ndarray:
    """Learning curves against decoder evaluations, beside finished runs against two costs.

    :param curves: ``{method: [steps, 2]}``, evaluations for each observation and log-likelihood;
        drawn as distances below the best value of all.
    :param recorded: for each run its label, decoder evaluations for each training image, minutes of
        training, log-likelihood and the standard error of that; may be empty.
    :return: the three axes.

    >>> curve = torch.tensor([[1.0, -5.0], [2.0, -4.0]])
    >>> axes = cost_panels({"VAE": curve}, [("VAE", 1.0, 2.0, -140.0, 4.0)])
    >>> [ax.get_xscale() for ax in axes]
    ['log', 'log', 'log']
    >>> plt.close(axes[0].figure)
    """
    _, axes = plt.subplots(1, 3, figsize=(7.6, 3.9), width_ratios=(1.25, 1, 1))
    best = max(curve[:, 1].max().item() for curve in curves.values())
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":", "-") * 3, strict=False):
        axes[0].plot(curve[:, 0], best - curve[:, 1], style, label=name)
    axes[0].set(
        xscale="log", yscale="log", xlabel="evaluations, each observation", ylim=(0.01, None)
    )
    axes[0].set_ylabel("nats below the best")
    axes[0].legend(fontsize=7, loc="lower left")
    markers = "osD^vPX*<>"
    for i, (label, evaluations, minutes, level, error) in enumerate(recorded):
        style = {"color": COLOURS[_CYCLE[i % len(_CYCLE)]], "markersize": 5, "elinewidth": 0.8}
        for ax, cost in zip(axes[1:], (evaluations, minutes), strict=True):
            ax.errorbar(cost, level, 2 * error, fmt=markers[i % len(markers)], label=label, **style)
    axes[1].set(xscale="log", xlabel="evaluations, each image", ylabel="log p(x), nats")
    axes[2].set(xscale="log", xlabel="minutes of training")
    axes[2].sharey(axes[1])
    if recorded:
        handles, labels = axes[1].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, fontsize=7, ncols=5, loc="outside upper center")
    return axes


def _rows_from_the_top(ax: Axes, num_rows: int) -> None:
    ax.set_ylim(num_rows - 0.5, -0.5)
    ax.tick_params(left=False)
    ax.spines["left"].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.3)


# --- animation -----------------------------------------------------------------------------------


def animate(
    draw: Callable[[Figure, int], object],
    num_frames: int,
    *,
    alt: str,
    size: tuple[float, float] = (5.0, 3.6),
    fps: float = 8.0,
    hold: float = 1.5,
    num_colours: int = 128,
    dpi: int = 144,
    max_bytes: int = 400_000,
):
    """Draw ``num_frames`` figures and return them as one animated image, shown as a cell's result.

    The format is animated PNG. Of those that Pillow writes it alone has smooth transparency, which
    a picture for light and for dark pages needs, and is at the same time shown as an image by
    Jupyter, nbconvert, MyST-NB and the code hosts. What cannot play it shows the last frame. The
    same frames always give the same bytes.

    :param draw: ``draw(figure, frame)`` draws frame number ``frame``, from 0, on an empty figure.
        Fix the limits of the axes, or they jump from frame to frame.
    :param num_frames: number of frames.
    :param alt: what the animation shows, for those who cannot see it.
    :param size: width and height, inches.
    :param fps: frames in a second.
    :param hold: seconds for which the last frame stays before the animation starts again.
    :param num_colours: size of the palette, at most 256; fewer colours make a smaller file.
    :param dpi: pixels drawn in an inch; the page shows 96, so 144 is sharp on a fine screen too.
    :param max_bytes: largest size that is accepted.
    :return: an ``IPython.display.Image``.
    :raises ValueError: if the image would be larger than ``max_bytes``.

    >>> image = animate(lambda figure, t: figure.subplots().plot([0, t]), 3, alt="a line rises")
    >>> image.format, image.data[:4], image.data.count(b"fcTL")  # one control block for each frame
    ('png', b'\\x89PNG', 3)
    """
    from IPython.display import Image as DisplayedImage
    from PIL import Image

    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    frames = []
    for frame in range(num_frames):
        figure = Figure(figsize=size, dpi=dpi, facecolor="none", layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, frame)
        canvas.draw()
        frames.append(np.array(canvas.buffer_rgba()))
    # One palette for all frames, so that colours do not flicker. Pillow needs octrees for RGBA.
    sheet = Image.fromarray(np.concatenate(frames))
    sheet = sheet.quantize(num_colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    height = frames[0].shape[0]
    strips = [sheet.crop((0, i * height, sheet.width, (i + 1) * height)) for i in range(num_frames)]
    buffer = io.BytesIO()
    strips[-1].save(
        buffer,
        format="PNG",
        save_all=True,
        default_image=True,  # what save() is called on is the still picture
        append_images=strips,
        duration=[1000 / fps] * (num_frames - 1) + [1000 / fps + 1000 * hold],
        loop=0,
    )
    content = buffer.getvalue()
    if len(content) > max_bytes:
        raise ValueError(
            f"the animation takes {len(content):,} bytes, more than max_bytes = {max_bytes:,}; "
            "use fewer frames, a smaller size or fewer colours"
        )
    return DisplayedImage(content, format="png", width=round(96 * size[0]), alt=alt)
