"""Figures of codes and codebooks: data first, a Figure back; nothing is shown and no file is read."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from oasis_vq.figures import GRAY, PANEL, code_colours, panels

SHARES = (0.001, 0.01, 0.1, 1.0)
"""Ticks of the logarithmic scale on which shares of slices are drawn."""
BACKDROP = "lightsteelblue"
"""Behind gray points and patches on a map, so that black and white ones both stand out."""
OUTLINE = 0.1
"""Intensity at which the outline of a mean slice is drawn."""


def plot_code_images(codes: np.ndarray, *, num_embeddings: int, columns: int = 8, title: str | None = None) -> Figure:
    """Show code grids (n, h, w) int as nominal colours."""
    columns = min(columns, len(codes))
    figure, axes = panels(-(-len(codes) // columns), columns, title=title)
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


def plot_code_positions(
    positions: np.ndarray,
    *,
    titles: Sequence[str],
    background: np.ndarray | None = None,
    columns: int = 8,
    title: str | None = None,
) -> Figure:
    """Show where codes fire: the share of the images in which each stands at each position, on one logarithmic scale.

    Args:
        positions: (n, h, w) in [0, 1], rows of `code_positions`.
        titles: n texts, one over each.
        background: (size, size, 1) in [0, 1], usually a mean slice, whose outline is drawn over each map.
        columns: maps in a row.
        title: over all.
    """
    columns = min(columns, len(positions))
    figure, axes = panels(-(-len(positions) // columns), columns, title=title, titled=True, margin=0.9)
    height, width = positions.shape[1:]
    scale = {"cmap": "inferno", "norm": LogNorm(SHARES[0], SHARES[-1]), "interpolation": "nearest"}
    for axis, shares, text in zip(axes.flat, positions, titles, strict=False):
        shown = axis.imshow(np.maximum(shares, SHARES[0]), extent=(0, width, height, 0), **scale)
        axis.set_title(text, fontsize=8)
        if background is not None:
            size = background.shape[0]
            pixels = (np.arange(size) + 0.5) / size
            axis.contour(pixels * width, pixels * height, background[..., 0], [OUTLINE], colors="white", linewidths=0.6)
    bar = figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, extend="min")
    bar.set_ticks(SHARES, labels=[f"{100 * share:g} %" for share in SHARES])
    bar.set_label("share of slices", fontsize=8)
    return figure


def plot_code_patches(
    patches: np.ndarray, *, codes: Sequence[int], columns: int = 16, title: str | None = None
) -> Figure:
    """Show what codes decode to, the number of each over it.

    Args:
        patches: (n, p, p, 1) in [0, 1], rows of `code_patches`.
        codes: (n,) int, whose patches they are.
        columns: patches in a row.
        title: over all.
    """
    columns = min(columns, len(patches))
    figure, axes = panels(-(-len(patches) // columns), columns, title=title, titled=True, side=PANEL / 2)
    for axis, patch, code in zip(axes.flat, patches, codes, strict=False):
        axis.imshow(patch[..., 0], **GRAY)
        axis.set_title(code, fontsize=8, pad=2)
    return figure


def plot_codebook_map(
    places: np.ndarray, *, patches: np.ndarray, counts: np.ndarray, variance: Sequence[float], title: str | None = None
) -> Figure:
    """Show a 2-D map of the codebook: every code as a point, and beside it some as what they decode to.

    Args:
        places: (num_embeddings, 2), of `codebook_map`.
        patches: (num_embeddings, p, p, 1) in [0, 1], of `code_patches`; their means are the colours of the points.
        counts: (num_embeddings,), how often each code occurs; the areas of the points. A red cross is a dead code.
        variance: (2,) in [0, 1], the share of the variance on each axis.
        title: over all.
    """
    look = {"aspect": "equal", "facecolor": BACKDROP}
    figure, (points, pictures) = plt.subplots(
        1, 2, figsize=(12, 4.4), sharex=True, sharey=True, layout="constrained", subplot_kw=look
    )
    used = counts > 0
    areas = np.clip(3000 * counts[used] / counts.sum(), 12, 400)
    style = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "edgecolors": "0.4", "linewidths": 0.3}
    shown = points.scatter(*places[used].T, s=areas, c=patches[used].mean(axis=(1, 2, 3)), **style)
    points.scatter(*places[~used].T, s=12, c="C3", marker="x", linewidths=0.7)
    figure.colorbar(shown, ax=points, shrink=0.8, pad=0.01).set_label("mean decoded intensity")
    side = 0.06 * np.ptp(places, axis=0).max()
    drawn: list[int] = []
    for code in np.argsort(-counts, kind="stable")[: used.sum()]:  # the more frequent one where two would overlap
        if not drawn or np.abs(places[drawn] - places[code]).max(axis=1).min() > 1.1 * side:
            drawn.append(code)
            left, bottom = places[code] - side / 2
            pictures.imshow(patches[code, ..., 0], extent=(left, left + side, bottom, bottom + side), **GRAY)
    (left, bottom), (right, top) = places.min(axis=0) - side, places.max(axis=0) + side
    points.set(xlim=(left, right), ylim=(bottom, top), ylabel=f"second component ({variance[1]:.0%} of the variance)")
    for axis in (points, pictures):
        axis.set_xlabel(f"first component ({variance[0]:.0%} of the variance)")
    if title:
        figure.suptitle(title)
    return figure
