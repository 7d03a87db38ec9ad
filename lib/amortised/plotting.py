r"""Figures, and nothing else: no algorithm is imported here.

:func:`use_style` is called once in a chapter. From then on figures are transparent SVG whose text,
axes and colours are of middle lightness, so that one file reads well on a white and on a dark page,
and whose bytes do not change from one run to the next. The other functions draw on axes that the
caller made, or make one figure and return it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

GREY = "#757d89"
"""Text, axes and ticks: a contrast of about 4.2 to 1 on white and on the dark page #14181e."""

COLOURS = {
    "exact": "#5f6774",
    "approximation": "#d2691e",
    "bound": "#2b7fc4",
    "samples": "#1f9a8a",
    "method": "#9a6ad0",
    "reference": GREY,
}
"""One colour for each thing that recurs through the book."""


def use_style() -> None:
    """Set the book's figure style for this process.

    In a notebook, figures become SVG with a transparent background, no date and fixed identifiers:
    two runs of a chapter give the same bytes. In a script only the appearance changes.
    """
    plt.rcParams.update(_STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # a script on a machine without Jupyter
        return
    set_matplotlib_formats("svg", metadata={"Date": None})


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
    "axes.facecolor": "none",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(
        color=["#2b7fc4", "#d2691e", "#1f9a8a", "#9a6ad0", "#c2528b", "#7d8a2a"]
    ),
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.8,
    "font.size": 10,
    "image.interpolation": "none",
}


# --- images --------------------------------------------------------------------------------------


def show_digits(
    images: Tensor,
    ncols: int | None = None,
    *,
    ax: Axes | None = None,
    colour: str = GREY,
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
    :param padding: empty pixels between neighbours.
    :param width: width of the new figure, inches.
    :returns: the axes.
    :raises ValueError: if ``images`` has another shape, is empty or leaves ``[0, 1]``.

    >>> ax = show_digits(torch.rand(6, 784), ncols=3)
    >>> ax.images[0].get_array().shape  # two rows and three columns of 28 pixels, and padding
    (58, 88, 4)
    >>> plt.close(ax.figure)
    """
    pixels = _as_images(images)
    ncols = min(len(pixels), 16) if ncols is None else ncols
    if ncols < 1:
        raise ValueError(f"ncols must be at least 1, got {ncols}")
    mosaic = _mosaic(pixels, ncols, padding)
    if ax is None:
        height = width * mosaic.shape[0] / mosaic.shape[1]
        _, ax = plt.subplots(figsize=(width, max(height, 0.4)))
    ax.imshow(_ink(mosaic, colour), interpolation="none")
    ax.set_axis_off()
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


# --- animation -----------------------------------------------------------------------------------


def animate(
    draw: Callable[[Figure, int], None],
    num_frames: int,
    *,
    size: tuple[float, float] = (5.0, 3.6),
    fps: float = 8.0,
    alt: str = "",
    dpi: int = 96,
    num_colours: int = 128,
    max_bytes: int = 400_000,
):
    """Draw ``num_frames`` figures and return them as one animated image.

    The result is an animated PNG: of the formats that Pillow writes it is the only one that both
    keeps smooth transparency, which a picture for light and dark pages needs, and is shown as an
    image by Jupyter, nbconvert, MyST-NB and code hosts alike. A viewer that cannot play it, and
    paper, show the first frame. Make the last line of the cell the call itself.

    :param draw: ``draw(figure, frame)`` draws frame number ``frame`` on an empty figure.
    :param num_frames: number of frames.
    :param size: width and height, inches.
    :param fps: frames in a second.
    :param alt: what the animation shows, for those who cannot see it.
    :param dpi: pixels in an inch.
    :param num_colours: size of the palette, at most 256; fewer colours make a smaller file.
    :param max_bytes: largest size that is accepted.
    :returns: an ``IPython.display.Image``.
    :raises ValueError: if the result is larger than ``max_bytes``.

    >>> image = animate(lambda figure, t: figure.subplots().plot([0, t]), 3, alt="a line rises")
    >>> image.data[:4], image.format
    (b'\\x89PNG', 'png')
    """
    from IPython.display import Image
    from PIL import Image as Pillow

    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    frames = []
    for frame in range(num_frames):
        figure = Figure(figsize=size, dpi=dpi, facecolor="none", layout="constrained")
        draw(figure, frame)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(np.array(canvas.buffer_rgba()))
    # One palette for all frames, so that colours do not flicker.
    sheet = Pillow.fromarray(np.concatenate(frames)).quantize(num_colours, method=2, dither=0)
    height = frames[0].shape[0]
    strips = [sheet.crop((0, i * height, sheet.width, (i + 1) * height)) for i in range(num_frames)]
    buffer = io.BytesIO()
    strips[0].save(
        buffer,
        format="PNG",
        save_all=True,
        append_images=strips[1:],
        duration=1000 / fps,
        loop=0,
        optimize=True,
    )
    data = buffer.getvalue()
    if len(data) > max_bytes:
        raise ValueError(
            f"the animation takes {len(data):,} bytes, more than max_bytes = {max_bytes:,}; "
            "use fewer frames, a smaller size or fewer colours"
        )
    return Image(data, format="png", width=round(size[0] * 96), alt=alt)
