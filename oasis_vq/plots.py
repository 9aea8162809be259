"""Figures of slices and scores: data first, a Figure back; nothing is shown and no file is read."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from oasis_vq.figures import GRAY, code_colours, panels


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
    figure, axes = panels(-(-len(images) // columns), columns, title=title, titled=titles is not None)
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
    figure, axes = panels(4, len(images), title=title, margin=0.9)
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
    figure.colorbar(shown, ax=axes[3, :], fraction=0.02, pad=0.01).set_label("reconstruction − slice", fontsize=8)
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
    figure, axes = panels(1, 4, titled=True)
    shown = {"slice": image, "codes": codes, "reconstruction": reconstruction, "new sample": sample}
    for axis, (name, values) in zip(axes.flat, shown.items(), strict=True):
        options = code_colours(num_embeddings) if name == "codes" else GRAY
        axis.imshow(values if name == "codes" else values[..., 0], **options)
        axis.set_title(name, fontsize=10)
    return figure


def plot_changes(before: np.ndarray, after: np.ndarray, *, titles: Sequence[str], title: str | None = None) -> Figure:
    """Show an image, what became of it under several changes, and the differences on one symmetric scale.

    Args:
        before: (size, size, 1) in [0, 1].
        after: (n, size, size, 1) in [0, 1].
        titles: n texts, one over each.
        title: over all.
    """
    figure, axes = panels(2, len(after) + 1, title=title, titled=True, margin=0.9)
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
    figure.colorbar(shown, ax=axes[1, :], fraction=0.02, pad=0.01).set_label("after − before", fontsize=8)
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
        axis.set_title(f"{name} (dB)" if name.endswith("psnr") else name)
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
    figure, axes = panels(2, len(images), title=title, titled=titles is not None, margin=0.9)
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
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    colours = plt.colormaps["tab10"].colors
    for number, (name, (bits, score)) in enumerate(sorted(points.items(), key=lambda item: -item[1][1])):
        # Hollow, and each of another shape and colour: of two in one place both are seen.
        axis.plot(bits, score, "osD^v"[number % 5], color=colours[number % 9], markersize=6 + number % 3, mew=1.5,
                  fillstyle="none", ls="", label=f"{score:.3f}  {name}")  # fmt: skip
    for name, score in (baselines or {}).items():
        axis.axhline(score, color="0.6", ls=":", lw=1, label=f"{score:.3f}  {name}")
    bits = [bits for bits, _ in points.values()]
    low, high = min(bits) / 1.5, max(bits) * 1.5
    ticks = [step * 10**power for power in range(8) for step in (1, 2, 5) if low <= step * 10**power <= high]
    axis.set(xscale="log", xlabel="bits an image, of fixed length for each code", ylabel="brain_ssim", xlim=(low, high))
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_title(title or "")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure
