"""Figures: what they show, that they read on light and dark pages, that their bytes are stable."""

from __future__ import annotations

import ast
import base64
import io
import itertools
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from amortised import plotting


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    with matplotlib.rc_context():
        yield
    plt.close("all")


# --- style ---------------------------------------------------------------------------------------


def svg(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def test_svg_is_transparent_without_date_and_the_same_each_time():
    def draw():
        figure, (left, right) = plt.subplots(1, 2)
        left.plot([0, 1], [1, 0], label="a")
        left.legend()
        plotting.show_digits(torch.linspace(0, 1, 4 * 9).reshape(4, 3, 3), ncols=2, ax=right)
        return svg(figure)

    plotting.use_style()
    first, second = draw(), draw()
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg") and b"<dc:date>" not in first and b"#ffffff" not in first
    assert b"<text" not in first  # letters are paths: no font of the reader's machine is needed


def linear(colour: str) -> np.ndarray:
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, WCAG 2.2."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    dark, light = sorted((linear(a) @ weights, linear(b) @ weights))
    return (light + 0.05) / (dark + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson (2020), perceptually even coordinates of linear RGB."""
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ rgb)


# Machado, Oliveira and Fernandes (2009), complete deficiency, on linear RGB.
VISION = {
    "common": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("page", ["#ffffff", "#030405"])
def test_colours_stand_out_on_light_and_dark_pages(page):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast(plotting.GREY, page) >= 4.5
    for name, colour in plotting.COLOURS.items():
        assert contrast(colour, page) > 3.2, name


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_all_readers(vision):
    seen = {
        name: oklab(np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1))
        for name, colour in {"grey": plotting.GREY, **plotting.COLOURS}.items()
    }
    for (a, x), (b, y) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(x - y) > 0.07, f"{a} and {b} look alike"


def test_lines_differ_in_more_than_colour():
    styles = [(str(s["linestyle"]), s.get("linewidth")) for s in plotting.LINES.values()]
    assert len(set(styles)) == len(styles)
    _, ax = plt.subplots()
    for style in plotting.LINES.values():
        ax.plot([0, 1], **style)


def test_no_algorithm_is_imported():
    tree = ast.parse(Path(plotting.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not node.module.startswith("amortised")


NOTEBOOK = """
import matplotlib.pyplot as plt
from amortised import plotting
plotting.use_style()
---
plt.plot([0, 1])
plt.show()
---
plt.plot([0, 1])
plt.show()
---
plotting.animate(lambda figure, t: figure.subplots().plot([0, t]), 3, alt="a line rises")
"""


def test_in_a_notebook():
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in NOTEBOOK.split("---")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    first, second, animation = (cell.outputs[0] for cell in notebook.cells[1:])
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 1, 1, 1]
    assert set(first.data) == {"image/svg+xml", "text/plain"} and first.data == second.data
    assert "<dc:date>" not in first.data["image/svg+xml"]
    assert plotting.GREY in first.data["image/svg+xml"]
    assert set(animation.data) == {"image/png", "text/plain"}
    assert animation.metadata["image/png"]["alt"] == "a line rises"
    assert base64.b64decode(animation.data["image/png"]).count(b"fcTL") == 3


# --- images --------------------------------------------------------------------------------------


def test_mosaic_places_images_row_by_row():
    images = torch.zeros(5, 4, 6)
    for i in range(5):
        images[i, 0, 0] = (i + 1) / 5
    ink = plotting.mosaic(images, ncols=3, padding=1, colour="#102030")
    assert ink.shape == (2 * 5 - 1, 3 * 7 - 1, 4)
    assert np.all(ink[..., :3] == (0x10, 0x20, 0x30))
    corners = ink[::5, ::7, 3]
    assert corners.tolist() == [[51, 102, 153], [204, 255, 0]]
    assert ink[..., 3].astype(int).sum() == corners.astype(int).sum()
    assert plotting.mosaic(images, ncols=3, padding=0).shape == (2 * 4, 3 * 6, 4)


@pytest.mark.parametrize("shape", [(3, 784), (3, 28, 28)])
def test_show_digits_takes_flat_and_square_images(shape):
    ax = plotting.show_digits(torch.ones(shape, requires_grad=True), row_labels=["data"])
    assert ax.images[0].get_array().shape == (28, 88, 4)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data"]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 783), {}, "783 pixels are no squares"),
        (torch.zeros(784), {}, r"got \[784\]"),
        (torch.zeros(0, 784), {}, r"got \[0, 28, 28\]"),
        (torch.zeros(2, 1, 28, 28), {}, r"got \[2, 1, 28, 28\]"),
        (torch.full((1, 784), -0.1), {}, "from -0.1 to -0.1; pass probabilities"),
        (torch.full((1, 784), math.nan), {}, "from nan"),
        (torch.zeros(2, 784), {"ncols": 0}, "ncols must be at least 1, got 0"),
        (torch.zeros(4, 784), {"ncols": 2, "row_labels": ["a"]}, "2 rows, but 1 row_labels"),
    ],
)
def test_show_digits_refuses(images, options, message):
    with pytest.raises(ValueError, match=message):
        plotting.show_digits(images, **options)


# --- densities -----------------------------------------------------------------------------------


def radii(ax) -> list[float]:
    """Radius of each contour, from the outermost in."""
    paths = ax.collections[-1].get_paths()
    return [np.linalg.norm(path.vertices, axis=1).mean() for path in paths]


def test_contours_hold_their_share_of_the_mass():
    masses = (0.95, 0.8, 0.5)
    ax = plotting.show_density(lambda z: 7 - 0.5 * z.square().sum(-1), (-5, 5, -5, 5))
    expected = [math.sqrt(-2 * math.log(1 - mass)) for mass in masses]
    assert radii(ax) == pytest.approx(expected, abs=0.02)
    assert len(ax.collections) == 4  # three shades, and the contours
    ax = plotting.show_density(
        lambda z: -0.5 * z.square().sum(-1), (-5, 5, -5, 5), masses=(0.5,), fill=False, label="p"
    )
    assert len(ax.collections) == 1
    assert ax.get_legend_handles_labels()[1] == ["p"]


def test_density_without_support_somewhere():
    """A half plane: the contour of the whole mass runs along its edge."""

    def half_normal(z):
        return torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), -math.inf)

    ax = plotting.show_density(half_normal, (-4, 4, -4, 4), masses=(0.9,))
    assert min(path.vertices[:, 0].min() for path in ax.collections[-1].get_paths()) > -0.1


@pytest.mark.parametrize(
    ("log_density", "message"),
    [
        (lambda z: z, r"to \[121, 121, 2\], not to"),
        (lambda z: z.sum(-1) * math.nan, "is nan"),
        (lambda z: torch.full(z.shape[:-1], -math.inf), "is -inf"),
    ],
)
def test_bad_density_is_refused(log_density, message):
    with pytest.raises(ValueError, match=message):
        plotting.show_density(log_density, (0, 1, 0, 1))


# --- animation -----------------------------------------------------------------------------------


def rising(figure, frame):
    ax = figure.subplots()
    ax.plot([0, 1], [0, frame])
    ax.set(xlim=(0, 1), ylim=(0, 10))


def frames_of(image):
    picture = Image.open(io.BytesIO(image.data))
    for i in range(1, picture.n_frames):  # frame 0 is the still picture
        picture.seek(i)
        yield picture.info["duration"], np.array(picture.convert("RGBA"))


def test_animation_moves_is_transparent_and_the_same_each_time():
    plotting.use_style()
    options = dict(alt="a line rises", size=(3.0, 2.0), fps=10, dpi=100)
    image = plotting.animate(rising, 5, **options)
    assert image.data == plotting.animate(rising, 5, **options).data
    assert image.alt == "a line rises" and image.width == 288
    assert plt.get_fignums() == []
    durations, frames = zip(*frames_of(image), strict=True)
    assert durations == (100, 100, 100, 100, 1600)
    assert all(frame.shape == (200, 300, 4) for frame in frames)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))
    still = np.array(Image.open(io.BytesIO(image.data)).convert("RGBA"))
    assert (still == frames[-1]).all()
    opacity = still[..., 3]
    assert (opacity == 0).mean() > 0.8 and len(np.unique(opacity)) > 4  # smooth, not cut out


def test_animation_is_refused_when_it_is_too_large():
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes, more than max_bytes = 2,000; use"):
        plotting.animate(rising, 5, alt="", max_bytes=2_000)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        plotting.animate(rising, 0, alt="")


def test_scripts_need_no_notebook(monkeypatch):
    """The style works where IPython is missing, and starts no shell where it is present."""
    plotting.use_style()
    assert plt.rcParams["text.color"] == plotting.GREY
    from IPython import get_ipython

    assert get_ipython() is None
    monkeypatch.setitem(sys.modules, "IPython", None)
    plt.rcdefaults()
    plotting.use_style()
    assert plt.rcParams["text.color"] == plotting.GREY


def test_file_names_no_machine():
    assert not re.search(rb"/(home|root|tmp)/", svg(plt.figure()))
