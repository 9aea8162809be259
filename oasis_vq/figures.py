"""How figures look and how they are written: brains in gray, codes in nominal colours, the same figure the same bytes.

Brains are gray with 0 black and 1 white, without interpolation. Codes are names, not amounts: their colours are
drawn at random from a fixed seed, so neighbouring numbers need not look alike.
"""

import io
from pathlib import Path

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure

from oasis_vq.config import Paths
from oasis_vq.files import write_whole

GRAY = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
PANEL = 1.6
"""Side of one image, in inches."""


def panels(
    rows: int, columns: int, *, title: str | None = None, titled: bool = False, margin: float = 0.0, side: float = PANEL
):
    """Return a figure and its axes (rows, columns), each of this side in inches, all without ticks and frames."""
    size = (side * columns + margin, (side + min(0.3, side / 4) * titled) * rows + 0.35 * bool(title))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0.01, hspace=0.01)
    for axis in axes.flat:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, axes


def code_colours(num_embeddings: int) -> dict:
    """Return imshow's options for codes: one colour a code, in a random order from a fixed seed."""
    generator = np.random.default_rng(0)
    hues = generator.permutation(num_embeddings) / num_embeddings
    colours = hsv_to_rgb(np.stack([hues, *generator.uniform((0.4, 0.5), 1.0, (num_embeddings, 2)).T], axis=1))
    return {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": num_embeddings - 0.5, "interpolation": "nearest"}


def save_figure(figure: Figure, name: str, *, folder: str | Path | None = None) -> None:
    """Write a figure as PDF and PNG without timestamps: the same figure gives the same bytes.

    Args:
        figure: what to write.
        name: file name without suffix.
        folder: None for `Paths.figures`.
    """
    folder = Path(folder) if folder is not None else Paths().figures
    folder.mkdir(parents=True, exist_ok=True)
    formats = {"png": {"dpi": 150, "metadata": {"Software": None}}, "pdf": {"metadata": {"CreationDate": None}}}
    for suffix, options in formats.items():
        content = io.BytesIO()
        figure.savefig(content, format=suffix, **options)
        write_whole(folder / f"{name}.{suffix}", content.getvalue())


def save_film(images: np.ndarray, name: str, *, frames_per_second: int = 12, folder: str | Path | None = None) -> bytes:
    """Write images as a GIF that begins again at its end, and return its bytes: the same images give the same.

    Args:
        images: (n, size, size, 1) in [0, 1], one after the other.
        name: file name without suffix.
        frames_per_second: up to 50.
        folder: None for `Paths.figures`.
    """
    folder = Path(folder) if folder is not None else Paths().figures
    folder.mkdir(parents=True, exist_ok=True)
    frames = np.round(255 * np.clip(images[..., 0], 0, 1)).astype(np.uint8)
    gif = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / frames_per_second, loop=0)
    write_whole(folder / f"{name}.gif", gif)
    return gif
