"""Diagrams of both architectures: layers, shapes and weights, read off the models themselves."""

from itertools import groupby
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.vqvae import VQVAE

PITCH, WIDTH, HEIGHT, GAP = 0.75, 0.56, 2.5, 0.35
"""From box to box, width and least height of a box, and between the two stacks, in inches."""
CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.Conv2DTranspose)
COLOURS = ("whitesmoke", "lightsteelblue", "navajowhite", "darkseagreen", "thistle")
"""Of the parts of a network, in their order."""
LINE = {"color": "0.2", "lw": 0.8}


class Stage(NamedTuple):
    """A box of the diagram: some layers of a network that follow one another, and what they give."""

    part: str
    text: str
    shape: tuple[int, ...]
    """Without the batch."""
    num_weights: int
    """Of one, where there are several."""
    times: int = 1
    is_told: bool = False
    """Whether what is known of the grid and of the position goes into it."""

    def __str__(self) -> str:
        several = f"{self.times} × " if self.times > 1 else ""
        weights = f"\n{several}{self.num_weights:,} weights" if self.num_weights else ""
        return f"{several}{self.text}\n{'×'.join(map(str, self.shape))}{weights}"


def plot_vqvae(vqvae: VQVAE, *, title: str | None = None) -> Figure:
    """Draw a VQ-VAE from image to reconstruction: a box for each layer with its activation, or residual block."""
    return _draw([[stage] for stage in vqvae_stages(vqvae)], title=title)


def plot_prior(prior: PixelCNN, *, title: str | None = None) -> Figure:
    """Draw a prior from codes to logits: gated blocks as two boxes, the vertical stack above the horizontal one."""
    return _draw(prior_stages(prior), given=_given(prior), title=title)


def vqvae_stages(vqvae: VQVAE) -> list[Stage]:
    """Return the boxes of a VQ-VAE from image to reconstruction; equal ones that follow each other are one."""
    config, codebook = vqvae.config, vqvae.quantizer.codebook
    nearest = f"nearest of {config.num_embeddings} codes"
    return [
        Stage("data", "images", vqvae.encoder.input_shape[1:], 0),
        *_network_stages(vqvae.encoder, "encoder"),
        Stage("quantizer", nearest, (*config.grid_shape, config.embedding_dim), int(np.prod(codebook.shape))),
        *_network_stages(vqvae.decoder, "decoder"),
    ]


def prior_stages(prior: PixelCNN) -> list[list[Stage]]:
    """Return the boxes of a prior in columns; a column of two has what the vertical stack does above."""
    config = prior.config
    grid, channels = config.grid_shape, config.num_channels
    columns = [
        [Stage("data", "codes", grid, 0)],
        [_stage("embedding", "Embedding", (*grid, config.embedding_dim), prior.code_embedding)],
    ]
    if config.architecture == "residual":
        size = prior.first.kernel_size
        first = _stage("blocks", f"masked {size}×{size} type A", (*grid, channels), prior.first)
        columns.append([first._replace(is_told=True)])
    for number, block in enumerate(prior.blocks):
        if number in prior.attention:
            columns.append([_stage("blocks", "causal attention", (*grid, channels), prior.attention[number])])
        if config.architecture == "residual":
            text = f"residual block, {block.kernel_size}×{block.kernel_size} type B"
            columns.append([_stage("blocks", text, (*grid, channels), block)._replace(is_told=block.conditioned)])
        else:
            columns.append(_gated_block(block, grid))
    for layer in prior.head:
        columns.append([_stage("head", "Dense, relu", (*grid, channels), layer)])
    columns.append([_stage("head", "Dense: logits", (*grid, config.num_embeddings), prior.to_logits)])
    return [[stage._replace(times=times) for stage in column] for column, times in _counted(columns)]


def _gated_block(block: keras.layers.Layer, grid: tuple[int, int]) -> list[Stage]:
    """Return the boxes of both stacks; the last vertical one has no gate, it only tells the horizontal one."""
    above = block.vertical.count_params() + (0 if block.last else block.vertical_condition.count_params())
    vertical, horizontal = ("×".join(map(str, layer.window)) for layer in (block.vertical, block.horizontal))
    gated, shape = not block.last, (*grid, block.num_channels)
    return [
        Stage("blocks", f"vertical {vertical}, gate", shape, above, is_told=True)
        if gated
        else Stage("blocks", f"vertical {vertical}", (*grid, 2 * block.num_channels), above),
        Stage("blocks", f"horizontal {horizontal}, gate", shape, block.count_params() - above, is_told=True),
    ]


def _given(prior: PixelCNN) -> Stage | None:
    """Return what the boxes that are told something are told, if anything."""
    refines = prior.config.refines
    names = [*prior.condition_sizes, *["grid position"] * prior.config.learned_position, *["draft"] * refines]
    if not names:
        return None
    embeddings = sum(layer.count_params() for layer in prior.condition_embeddings.values())
    weights = embeddings + int(np.prod(prior.position.shape)) * prior.config.learned_position
    weights += prior.of_draft.count_params() if refines else 0
    return Stage("blocks", " + ".join(names), (prior.config.num_channels,), weights)


def _stage(part: str, text: str, shape: tuple[int, ...], layer: keras.layers.Layer) -> Stage:
    return Stage(part, text, tuple(shape), layer.count_params())


def _counted(items: list) -> list[tuple]:
    """Return each item of a list with how often it follows itself."""
    return [(item, len(list(group))) for item, group in groupby(items)]


def _network_stages(network: keras.Model, part: str) -> list[Stage]:
    """Return the boxes of a Keras functional model; layers without a convolution go with what is before them."""
    groups: list[list[keras.layers.Layer]] = []
    for layer in network.layers[1:]:  # the first is the input
        if isinstance(layer, keras.layers.Add):  # all since what it adds to is one residual block
            skipped = layer.input[0]._keras_history.operation
            start = next((number for number, group in enumerate(groups) if group[-1] is skipped), -1) + 1
            groups[start:] = [[*(one for group in groups[start:] for one in group), layer]]
        else:
            groups.append([layer])
    merged: list[list[keras.layers.Layer]] = []
    for group in groups:
        if merged and not any(isinstance(layer, CONVOLUTIONS) for layer in group):
            merged[-1] += group
        else:
            merged.append(list(group))
    stages = [
        Stage(part, _text(group), tuple(group[-1].output.shape[1:]), sum(layer.count_params() for layer in group))
        for group in merged
    ]
    return [stage._replace(times=times) for stage, times in _counted(stages)]


def _text(layers: list[keras.layers.Layer]) -> str:
    """Return what a box says of its layers."""
    if any(isinstance(layer, keras.layers.Add) for layer in layers):
        kernels = ["×".join(map(str, layer.kernel_size)) for layer in layers if isinstance(layer, CONVOLUTIONS)]
        return f"residual block {', '.join(kernels)}"
    words = []
    for layer in layers:
        if isinstance(layer, CONVOLUTIONS):
            words.append(f"{type(layer).__name__} {'×'.join(map(str, layer.kernel_size))}")
            words += [f"stride {layer.strides[0]}"] * (layer.strides[0] > 1)
            words += [layer.activation.__name__] * (layer.activation is not keras.activations.linear)
        elif isinstance(layer, keras.layers.Activation):
            words.append(layer.activation.__name__)
        else:
            words.append(type(layer).__name__.replace("Normalization", "Norm"))
    return ", ".join(words)


def _draw(columns: list[list[Stage]], *, given: Stage | None = None, title: str | None = None) -> Figure:
    """Return a figure of boxes from left to right, higher ones for larger grids, with arrows between them."""
    stacked = any(len(column) > 1 for column in columns)
    smallest = min(stage.shape[0] for column in columns for stage in column)
    tallest = HEIGHT + 0.35 * np.log2(max(stage.shape[0] for column in columns for stage in column) / smallest)
    top = (2 * HEIGHT + GAP if stacked else tallest) + 0.75 * (given is not None)
    figure, axis = plt.subplots(figsize=(PITCH * len(columns) + 0.1, top + 0.85), layout="constrained")
    parts = list(dict.fromkeys(stage.part for column in columns for stage in column))
    for number, column in enumerate(columns):
        x = PITCH * number
        for row, stage in enumerate(reversed(column)):
            height = HEIGHT + 0.35 * np.log2(stage.shape[0] / smallest)
            y = (0 if stacked else (tallest - height) / 2) + row * (HEIGHT + GAP)
            _box(axis, (x, y), (WIDTH, height), str(stage), COLOURS[parts.index(stage.part)])
        for row in range(len(column)) if number else ():
            source = _source(columns, number, row)
            if source is not None:
                middle = (HEIGHT if stacked else tallest) / 2
                start = middle + min(row, len(columns[source]) - 1) * (HEIGHT + GAP)
                _arrow(axis, (PITCH * source + WIDTH, start), (x, middle + row * (HEIGHT + GAP)))
        if len(column) > 1:
            _arrow(axis, (x + WIDTH / 2, HEIGHT + GAP), (x + WIDTH / 2, HEIGHT))
            axis.plot([x + WIDTH / 2] * 2, [0, -0.12], **LINE)
    for part in parts:
        places = [PITCH * number + WIDTH / 2 for number, column in enumerate(columns) if column[0].part == part]
        axis.text(np.mean(places), -0.22 if stacked else -0.1, part, ha="center", va="top", fontsize=9)
    if stacked:  # the skips of all blocks, and where their sum goes
        ends = [PITCH * number + WIDTH / 2 for number, column in enumerate(columns) if len(column) > 1]
        axis.plot([ends[0], ends[-1] + PITCH], [-0.12, -0.12], **LINE)
        axis.text(ends[-1] + PITCH / 2, -0.1, "skips", ha="center", va="bottom", fontsize=7)
        _arrow(axis, (ends[-1] + PITCH, -0.12), (ends[-1] + PITCH, 0))
    if given is not None:
        places = [PITCH * number for number, column in enumerate(columns) if column[0].part == given.part]
        size = (places[-1] - places[0] + WIDTH + (PITCH - WIDTH) * stacked / 2, 0.45)
        _box(axis, (places[0], top - size[1]), size, str(given), COLOURS[0], rotation=0)
        for place, column in zip(places, (c for c in columns if c[0].part == given.part), strict=True):
            above, below = top - size[1], HEIGHT + (HEIGHT + GAP) * (len(column) - 1)
            if column[0].is_told:
                _arrow(axis, (place + WIDTH / 2, above), (place + WIDTH / 2, below))
            if len(column) > 1:  # past the vertical stack to the horizontal one
                beside = place + WIDTH + 0.4 * (PITCH - WIDTH)
                axis.plot([beside] * 2, [above, 0.9 * HEIGHT], **LINE)
                _arrow(axis, (beside, 0.9 * HEIGHT), (place + WIDTH, 0.9 * HEIGHT))
    axis.set(xlim=(-0.05, PITCH * len(columns)), ylim=(-0.5, top + 0.05), aspect="equal")
    axis.set_axis_off()
    axis.set_title(title or "", fontsize=10)
    return figure


def _source(columns: list[list[Stage]], number: int, row: int) -> int | None:
    """Return the column whose box an arrow comes from: of the vertical stack (row 1) the last that has one, if any."""
    if row:
        return max((place for place in range(number) if len(columns[place]) > 1), default=number - 1)
    leaves_the_stacks = len(columns[number - 1]) > 1 and columns[number][0].part != columns[number - 1][0].part
    return None if leaves_the_stacks else number - 1  # by the skips


def _box(axis, at: tuple, size: tuple, text: str, colour: str, *, rotation: int = 90) -> None:
    axis.add_patch(FancyBboxPatch(at, *size, boxstyle="round,pad=0,rounding_size=0.05", facecolor=colour, lw=0.6))
    middle = at[0] + size[0] / 2, at[1] + size[1] / 2
    axis.text(*middle, text, rotation=rotation, ha="center", va="center", fontsize=7, linespacing=1.35)


def _arrow(axis, start: tuple, end: tuple) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **LINE})
