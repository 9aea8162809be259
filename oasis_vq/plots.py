"""Figures: data first, a Figure back; nothing is shown and no file is read. `save_figure` alone writes.

Brains are gray with 0 black and 1 white, without interpolation. Codes are names, not amounts: their colours are
drawn at random from a fixed seed, so neighbouring numbers need not look alike.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure

from oasis_vq.config import Paths, write_whole

GRAY = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
PANEL = 1.6
"""Side of one image, in inches."""


def plot_slices(
    images: np.ndarray, *, titles: Sequence[str] | None = None, columns: int = 8, title: str | None = None
) -> Figure:
    """Show images side by side.

    Args:
        images: (n, size, size, 1) in [0, 1].
        titles: n texts, one over each.
        columns: images in a row.
        title: over all.
    """
    columns = min(columns, len(images))
    figure, axes = _grid(-(-len(images) // columns), columns, title=title, titled=titles is not None)
    for number, image in enumerate(images):
        axes.flat[number].imshow(image[..., 0], **GRAY)
        if titles is not None:
            axes.flat[number].set_title(titles[number], fontsize=8)
    return figure


def plot_reconstructions(
    images: np.ndarray,
    codes: np.ndarray,
    reconstructions: np.ndarray,
    *,
    num_embeddings: int,
    scores: Sequence[float] | None = None,
    title: str | None = None,
) -> Figure:
    """Show slices, their code maps, their reconstructions and the errors, one column a slice.

    Args:
        images: (n, size, size, 1) in [0, 1].
        codes: (n, h, w) int.
        reconstructions: as images.
        num_embeddings: codes that there are.
        scores: (n,) brain_ssim, written under the reconstructions.
        title: over all.
    """
    figure, axes = _grid(4, len(images), title=title, margin=0.9)
    errors = reconstructions - images
    limit = max(float(np.abs(errors).max()), 1e-6)
    for column in range(len(images)):
        axes[0, column].imshow(images[column, ..., 0], **GRAY)
        axes[1, column].imshow(codes[column], **code_colours(num_embeddings))
        axes[2, column].imshow(reconstructions[column, ..., 0], **GRAY)
        shown = axes[3, column].imshow(errors[column, ..., 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        if scores is not None:
            axes[2, column].text(
                0.5, 0.03, f"{scores[column]:.3f}", color="white", fontsize=8, ha="center",
                transform=axes[2, column].transAxes,
            )  # fmt: skip
    for row, text in enumerate(
        ("slice", "codes", "reconstruction" + ("\n(brain_ssim)" if scores is not None else ""), "error")
    ):
        axes[row, 0].text(-0.08, 0.5, text, rotation=90, ha="right", va="center", transform=axes[row, 0].transAxes)
    figure.colorbar(shown, ax=axes[3, :], fraction=0.02, pad=0.01).set_label("intensity", fontsize=8)
    return figure


def plot_pipeline(
    image: np.ndarray, codes: np.ndarray, reconstruction: np.ndarray, sample: np.ndarray, *, num_embeddings: int
) -> Figure:
    """Show what the project does in one row: a slice, its codes, its reconstruction, and a sample of the prior.

    Args:
        image: (size, size, 1) in [0, 1].
        codes: (h, w) int.
        reconstruction: as image.
        sample: as image.
        num_embeddings: codes that there are.
    """
    figure, axes = _grid(1, 4, titled=True)
    panels = {"slice": image, "codes": codes, "reconstruction": reconstruction, "new sample": sample}
    for axis, (name, values) in zip(axes.flat, panels.items(), strict=True):
        options = code_colours(num_embeddings) if name == "codes" else GRAY
        axis.imshow(values if name == "codes" else values[..., 0], **options)
        axis.set_title(name, fontsize=10)
    return figure


def plot_code_images(codes: np.ndarray, *, num_embeddings: int, columns: int = 8, title: str | None = None) -> Figure:
    """Show code grids (n, h, w) int as nominal colours."""
    columns = min(columns, len(codes))
    figure, axes = _grid(-(-len(codes) // columns), columns, title=title)
    for number, grid in enumerate(codes):
        axes.flat[number].imshow(grid, **code_colours(num_embeddings))
    return figure


def plot_codebook_usage(codes: np.ndarray, *, num_embeddings: int, title: str | None = None) -> Figure:
    """Show how often each code occurs in codes (..., ) int, most frequent first, with usage and perplexity."""
    counts = np.sort(np.bincount(np.ravel(codes), minlength=num_embeddings))[::-1]
    share = counts[counts > 0] / counts.sum()
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.bar(np.arange(num_embeddings), counts / counts.sum(), width=1.0, color="0.3")
    axis.set(yscale="log", xlabel="code, by frequency", ylabel="share of positions", xlim=(-1, num_embeddings))
    used, spread = int((counts > 0).sum()), np.exp(-(share * np.log(share)).sum())
    axis.text(0.98, 0.92, f"{used} of {num_embeddings} used\nperplexity {spread:.0f}", ha="right", va="top",
              transform=axis.transAxes)  # fmt: skip
    axis.set_title(title or "")
    return figure


def plot_history(history: dict[str, np.ndarray], names: Sequence[str], *, title: str | None = None) -> Figure:
    """Show columns of a history.csv against the epoch, training dashed and validation solid.

    Args:
        history: as `read_history` returns it.
        names: columns without the prefix `val_`, one panel each.
        title: over all.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        axis.plot(history["epoch"], history[name], "--", color="0.5", label="train")
        axis.plot(history["epoch"], history[f"val_{name}"], "-", color="C0", label="validate")
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        if name.endswith("loss"):
            axis.set_yscale("log")
    axes[0, 0].legend()
    if title:
        figure.suptitle(title)
    return figure


def plot_scores(scores: dict[str, dict[str, float]], names: Sequence[str], *, title: str | None = None) -> Figure:
    """Show scores as bars with their values: {what is scored: {score: value}}, one panel for each of `names`."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        values = [part[name] for part in scores.values()]
        bars = axis.bar(list(scores), values, color=["C0", *["0.6"] * (len(scores) - 1)])
        axis.bar_label(bars, [f"{value:.2f}" for value in values])
        axis.set_title(name)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelrotation=20)
    if title:
        figure.suptitle(title)
    return figure


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


def _grid(rows: int, columns: int, *, title: str | None = None, titled: bool = False, margin: float = 0.0):
    """Return a figure and its axes (rows, columns), all without ticks and frames."""
    size = (PANEL * columns + margin, (PANEL + 0.3 * titled) * rows + 0.35 * bool(title))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0.01, hspace=0.01)
    for axis in axes.flat:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, axes
