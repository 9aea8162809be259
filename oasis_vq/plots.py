"""Figures: data first, a Figure back; nothing is shown and no file is read. `save_figure` alone writes.

Brains are gray with 0 black and 1 white, without interpolation. Codes are names, not amounts: their colours are
drawn at random from a fixed seed, so neighbouring numbers need not look alike.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm, hsv_to_rgb
from matplotlib.figure import Figure

from oasis_vq.config import Paths
from oasis_vq.files import write_whole

GRAY = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
PANEL = 1.6
"""Side of one image, in inches."""
SHARES = (0.001, 0.01, 0.1, 1.0)
"""Ticks of the logarithmic scale on which shares of slices are drawn."""
BACKDROP = "lightsteelblue"
"""Behind gray points and patches on a map, so that black and white ones both stand out."""
OUTLINE = 0.1
"""Intensity at which the outline of a mean slice is drawn."""


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
    figure, axes = _grid(-(-len(positions) // columns), columns, title=title, titled=True, margin=0.9)
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
    figure, axes = _grid(-(-len(patches) // columns), columns, title=title, titled=True, side=PANEL / 2)
    for axis, patch, code in zip(axes.flat, patches, codes, strict=False):
        axis.imshow(patch[..., 0], **GRAY)
        axis.set_title(code, fontsize=8, pad=2)
    return figure


def plot_changes(before: np.ndarray, after: np.ndarray, *, titles: Sequence[str], title: str | None = None) -> Figure:
    """Show an image, what became of it under several changes, and the differences on one symmetric scale.

    Args:
        before: (size, size, 1) in [0, 1].
        after: (n, size, size, 1) in [0, 1].
        titles: n texts, one over each.
        title: over all.
    """
    figure, axes = _grid(2, len(after) + 1, title=title, titled=True, margin=0.9)
    differences = after - before
    limit = max(float(np.abs(differences).max()), 1e-6)
    axes[0, 0].imshow(before[..., 0], **GRAY)
    axes[0, 0].set_title("before", fontsize=8)
    for column, text in enumerate(titles):
        upper, lower = axes[:, column + 1]
        upper.imshow(after[column, ..., 0], **GRAY)
        upper.set_title(text, fontsize=8)
        shown = lower.imshow(
            differences[column, ..., 0], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        lower.set_title(f"mean |change| {np.abs(differences[column]).mean():.4f}", fontsize=7)
    figure.colorbar(shown, ax=axes[1, :], fraction=0.02, pad=0.01).set_label("intensity", fontsize=8)
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


def plot_history(history: dict[str, np.ndarray], names: Sequence[str], *, title: str | None = None) -> Figure:
    """Show columns of a history.csv against the epoch, training dashed and validation solid.

    Args:
        history: as `read_history` returns it.
        names: columns without the prefix `val_`, one panel each.
        title: over all.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, layout="constrained")
    marker = "." if len(history["epoch"]) == 1 else ""  # one point makes no line
    for axis, name in zip(axes.flat, names, strict=True):
        axis.plot(history["epoch"], history[name], "--", color="0.5", marker=marker, label="train")
        axis.plot(history["epoch"], history[f"val_{name}"], "-", color="C0", marker=marker, label="validate")
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        if name.endswith("loss"):
            axis.set_yscale("log")
    axes[0, 0].legend()
    if title:
        figure.suptitle(title)
    return figure


def plot_candidates(histories: dict[str, dict[str, np.ndarray]], name: str, *, title: str | None = None) -> Figure:
    """Show one column of several trainings' history.csv against the epoch: {candidate: history}, the winner first."""
    width = 5 + 0.07 * max(map(len, histories))  # the legend is beside the axes
    figure, axis = plt.subplots(figsize=(width, max(3.2, 0.22 * len(histories) + 1)), layout="constrained")
    for number, (label, history) in enumerate(histories.items()):
        axis.plot(
            history["epoch"], history[name], label=label, color=plt.get_cmap("viridis")(number / len(histories)),
            lw=1 + 2 * (number == 0), zorder=3 - (number > 0),
        )  # fmt: skip
    axis.set(xlabel="epoch", ylabel=name.replace("val_", "").replace("_", " ") + " in validation", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, title="best first", title_fontsize=7)
    axis.set_title(title or "")
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


def plot_scores_by_position(
    positions: dict, names: Sequence[str] = ("ssim", "brain_ssim"), *, title: str | None = None
) -> Figure:
    """Show scores against the slice position, the model's and the baselines', one panel for each of `names`.

    Args:
        positions: the part of this name of a reconstruction report.
        names: scores.
        title: over all.
    """
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 2.8), squeeze=False, layout="constrained")
    styles = {
        "model": {"color": "C0"},
        "mean_slice": {"color": "0.4", "ls": "--"},
        "black": {"color": "0.6", "ls": ":"},
    }
    for axis, name in zip(axes.flat, names, strict=True):
        for scored, style in styles.items():
            values = np.array(positions[scored][name], float)  # null in a file becomes NaN, a gap in the line
            axis.plot(positions["slice"], values, label=scored.replace("_", " "), marker=".", **style)
        axis.set(xlabel="slice position", title=name, ylim=(-0.02, 1.02))
    axes[0, -1].legend()
    if title:
        figure.suptitle(title)
    return figure


def plot_maps(
    images: np.ndarray, maps: np.ndarray, *, label: str, titles: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Show images over maps of something on their code grids, all maps on one scale.

    Args:
        images: (n, size, size, 1) in [0, 1].
        maps: (n, h, w), from about 0 on; what is below is drawn as 0.
        label: what the maps show, with its unit.
        titles: n texts, one over each image.
        title: over all.
    """
    figure, axes = _grid(2, len(images), title=title, titled=titles is not None, margin=0.9)
    for number, (image, values) in enumerate(zip(images, maps, strict=True)):
        axes[0, number].imshow(image[..., 0], **GRAY)
        shown = axes[1, number].imshow(values, cmap="inferno", vmin=0, vmax=maps.max(), interpolation="nearest")
        if titles is not None:
            axes[0, number].set_title(titles[number], fontsize=8)
    figure.colorbar(shown, ax=axes[1], fraction=0.02, pad=0.01).set_label(label, fontsize=8)
    return figure


def plot_distances(distances: dict[str, Sequence[float]], *, title: str | None = None) -> Figure:
    """Show how far images are from the most similar training slice, one line for each set of images.

    Args:
        distances: {name: (n,)}, `distances` of `evaluate_samples`.
        title: over all.
    """
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    bins = np.linspace(0, max(map(max, distances.values())), 41)
    for name, values in distances.items():
        axis.hist(values, bins=bins, histtype="step", weights=np.full(len(values), 1 / len(values)), label=name)
    axis.set(xlabel="root mean squared difference from the nearest training slice", ylabel="share of images")
    axis.legend()
    axis.set_title(title or "")
    return figure


def plot_rate_distortion(
    points: dict[str, tuple[float, float]], *, baselines: dict[str, float] | None = None, title: str | None = None
) -> Figure:
    """Show brain_ssim against the bits that it takes: up and to the left is better.

    Args:
        points: {name: (bits_per_image, brain_ssim)}.
        baselines: {name: brain_ssim} of what takes no bits, drawn as lines.
        title: over all.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    scores = [score for _, score in points.values()] + list((baselines or {}).values())
    line = 0.035 * max(max(scores) - min(scores), 1e-3)  # height of a text
    lowest = np.inf
    for name, (bits, score) in sorted(points.items(), key=lambda item: -item[1][1]):
        axis.scatter(bits, score, s=40, zorder=3, color="C0", edgecolor="white")
        lowest = min(score, lowest - line)  # texts of neighbours stand below each other
        leader = {"arrowstyle": "-", "lw": 0.5, "color": "0.6"}
        axis.annotate(f"{name}: {score:.3f}", (bits, score), (1.12 * bits, lowest), va="center", fontsize=8,
                      arrowprops=leader)  # fmt: skip
    for name, score in (baselines or {}).items():
        axis.axhline(score, color="0.6", ls=":", lw=1)
        axis.annotate(name, (0.01, score), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontsize=8, color="0.4")  # fmt: skip
    bits = [bits for bits, _ in points.values()]
    axis.set(xscale="log", xlabel="bits an image", ylabel="brain_ssim", xlim=(min(bits) / 1.5, max(bits) * 5))
    ticks = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if min(bits) / 1.5 <= tick <= max(bits) * 5]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(min(*scores, lowest) - line, max(scores) + line)
    axis.set_title(title or "")
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


def _grid(
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
