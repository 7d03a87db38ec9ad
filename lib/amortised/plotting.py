r"""Figures, and nothing else: no algorithm is imported here.

:func:`use_style` is called once in a chapter. From then on figures are transparent SVG whose text,
axes and colours are of middle lightness, so that one file reads well on a white and on a dark page,
and whose bytes do not change from one run to the next. :func:`show_digits` and :func:`show_density`
draw on axes that the caller made, or make a figure of their own if given none, and return the axes.
What only one chapter draws is drawn there.
"""

import io
import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

#: Text, axes and ticks: 4.5 to 1 in contrast on white and on the dark page #030405.
GREY = "#71777f"

#: A colour for each thing that recurs: the exact answer (posterior, evidence), the approximation q,
#: a bound, samples, and two for whatever else there is. Each has a contrast of at least 3.2 to 1 on
#: white and on #030405; chosen by search so that they stay apart for readers who confuse red and
#: green (a test simulates protanopia and deuteranopia).
COLOURS = {
    "exact": "#529e74",
    "approximation": "#d67320",
    "bound": "#4a85fe",
    "samples": "#d85bbb",
    "highlight": "#7e53bc",
    "other": "#796914",
}

#: Line styles to go with the colours, so that no line is told by its colour alone: ``ax.plot(x, y,
#: **LINES["exact"])``.
LINES = {
    "exact": {"color": COLOURS["exact"], "linestyle": "-", "linewidth": 2.4},
    "approximation": {"color": COLOURS["approximation"], "linestyle": "--"},
    "bound": {"color": COLOURS["bound"], "linestyle": "-"},
    "samples": {"color": COLOURS["samples"], "linestyle": "-."},
    "reference": {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.2},
}


_CYCLE = "bound approximation exact samples highlight other"
_BARE = "figure.facecolor figure.edgecolor savefig.facecolor savefig.edgecolor axes.facecolor"
_INK = (
    "axes.edgecolor axes.labelcolor axes.titlecolor text.color xtick.color ytick.color grid.color "
    "legend.labelcolor hatch.color"
)
_STYLE = {
    **dict.fromkeys(_BARE.split(), "none"),
    **dict.fromkeys(_INK.split(), GREY),
    "figure.figsize": (6.4, 3.6),
    "figure.constrained_layout.use": True,
    "figure.dpi": 96,
    "svg.hashsalt": "amortised",
    "svg.fonttype": "path",
    "path.simplify_threshold": 0.5,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=[COLOURS[name] for name in _CYCLE.split()]),
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "font.size": 10,
    "image.interpolation": "none",
}


def use_style() -> None:
    """Set the book's figure style, once in a process.

    In a notebook, figures become SVG with a transparent background, no date and fixed identifiers:
    two runs of a chapter give the same bytes. In a script only the appearance changes.

    >>> use_style()
    >>> plt.rcParams["figure.facecolor"], plt.rcParams["text.color"]
    ('none', '#71777f')
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


def mosaic(images: Tensor, ncols: int, *, colour: str = GREY, padding: int = 2) -> np.ndarray:
    """Images side by side, filled row by row, as ink on the page.

    Values are opacities: 0 is the bare page, 1 is full ink, so a digit reads well on a light and on
    a dark page.

    :param images: ``[N, 784]``, ``[N, 28, 28]`` or ``[N, H, W]``, values in ``[0, 1]``.
    :param ncols: images in a row.
    :param colour: colour of the ink.
    :param padding: empty pixels between neighbours.
    :return: red, green, blue and opacity of each pixel, from 0 to 255; ``[height, width, 4]``.
    :raises ValueError: if ``images`` has another shape, is empty or leaves ``[0, 1]``.

    >>> mosaic(torch.tensor([[[0.0, 0.2]], [[0.4, 1.0]]]), ncols=1, padding=1)[..., 3]
    array([[  0,  51],
           [  0,   0],
           [102, 255]], dtype=uint8)
    """
    pixels = _as_images(images)
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, got {ncols}")
    nrows = math.ceil(len(pixels) / ncols)
    empty = nrows * ncols - len(pixels)
    cells = np.pad(pixels, ((0, empty), (0, padding), (0, padding)))
    _, height, width = cells.shape
    opacity = cells.reshape(nrows, ncols, height, width).swapaxes(1, 2)
    opacity = opacity.reshape(nrows * height, ncols * width)
    opacity = opacity[: nrows * height - padding, : ncols * width - padding]
    ink = np.empty((*opacity.shape, 4), dtype=np.uint8)
    ink[..., :3] = np.round(255 * np.array(to_rgb(colour)))
    ink[..., 3] = np.round(255 * opacity)
    return ink


def show_digits(
    images: Tensor,
    ncols: int | None = None,
    *,
    ax: Axes | None = None,
    colour: str = GREY,
    row_labels: Sequence[str] = (),
) -> Axes:
    """Show a :func:`mosaic` of images.

    :param images: ``[N, 784]``, ``[N, 28, 28]`` or ``[N, H, W]``, values in ``[0, 1]``.
    :param ncols: images in a row; all of them by default, at most 16.
    :param ax: axes to draw on; a new figure by default.
    :param colour: colour of the ink.
    :param row_labels: a label for each row, left of it.
    :return: the axes.
    :raises ValueError: as :func:`mosaic`, or if there is not one label for each row.

    >>> ax = show_digits(torch.linspace(0, 1, 6 * 784).reshape(6, 784), ncols=3)
    >>> ax.images[0].get_array().shape  # two rows of three images of 28 pixels, and padding
    (58, 88, 4)
    >>> plt.close(ax.figure)
    """
    ncols = min(len(images), 16) if ncols is None else ncols
    ink = mosaic(images, ncols, colour=colour)
    nrows = math.ceil(len(images) / ncols)
    if row_labels and len(row_labels) != nrows:
        raise ValueError(f"{nrows} rows, but {len(row_labels)} row_labels")
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, max(6.4 * ink.shape[0] / ink.shape[1], 0.4)))
    ax.imshow(ink, interpolation="none")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if row_labels:
        height = (ink.shape[0] + 2) / nrows  # of an image with the padding below it
        ax.set_yticks((np.arange(nrows) + 0.5) * height - 1.5, labels=row_labels)
        ax.tick_params(left=False)
    return ax


def _as_images(images: Tensor) -> np.ndarray:
    pixels = torch.as_tensor(images).detach().cpu().float().numpy()
    if pixels.ndim == 2:
        side = math.isqrt(pixels.shape[1])
        if side * side != pixels.shape[1]:
            raise ValueError(f"images of {pixels.shape[1]} pixels are no squares; pass [N, H, W]")
        pixels = pixels.reshape(-1, side, side)
    if pixels.ndim != 3 or len(pixels) == 0:
        raise ValueError(f"images must be [N, pixels] or [N, H, W], got {list(pixels.shape)}")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images go from {low:.3g} to {high:.3g}; pass probabilities")
    return pixels


# --- densities -----------------------------------------------------------------------------------


def show_density(
    log_density_fn: Callable[[Tensor], Tensor],
    extent: tuple[float, float, float, float],
    *,
    ax: Axes | None = None,
    colour: str = COLOURS["exact"],
    masses: Sequence[float] = (0.95, 0.8, 0.5),
    fill: bool = True,
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
            f"log_density_fn maps {list(points.shape)} to {list(log_density.shape)}, not to [...]"
        )
    if not torch.isfinite(log_density.max()):
        raise ValueError(f"the largest log-density on the grid is {log_density.max().item()}")
    density = (log_density - log_density.max()).exp()
    falling = density.flatten().sort(descending=True).values
    share = falling.cumsum(0) / falling.sum()
    counts = ((share < mass).sum().clamp(max=len(share) - 1) for mass in masses)
    levels = sorted({falling[count].item() for count in counts})
    if fill:
        for level in levels:
            ax.contourf(x, y, density, levels=[level, 2.0], colors=[colour], alpha=0.14)
    ax.contour(x, y, density, levels=levels, colors=[colour], linewidths=1.2)
    if label is not None:
        ax.plot([], [], color=colour, label=label)
    ax.set_aspect("equal")
    return ax


# --- animation -----------------------------------------------------------------------------------


def animate(
    draw: Callable[[Figure, int], object],
    num_frames: int,
    *,
    alt: str,
    size: tuple[float, float] = (5.0, 3.6),
    fps: float = 8.0,
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
    :param fps: frames in a second; the last one stays for 1.5 seconds more.
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
    buffer, duration = io.BytesIO(), [1000 / fps] * (num_frames - 1) + [1000 / fps + 1500]
    movie = {"append_images": strips, "duration": duration, "loop": 0}
    # What save() is called on is the still picture.
    strips[-1].save(buffer, format="PNG", save_all=True, default_image=True, **movie)
    content = buffer.getvalue()
    if len(content) > max_bytes:
        raise ValueError(
            f"the animation takes {len(content):,} bytes, more than max_bytes = {max_bytes:,}; "
            "use fewer frames, a smaller size or fewer colours"
        )
    return DisplayedImage(content, format="png", width=round(96 * size[0]), alt=alt)
