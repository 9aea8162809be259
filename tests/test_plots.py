"""Figures: same bytes on a rerun, brains in gray, codes in nominal colours, nothing shown."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

import oasis_vq as ovq
from oasis_vq import plots

IMAGES = np.random.default_rng(0).uniform(size=(3, 16, 16, 1)).astype(np.float32)
CODES = np.arange(48).reshape(3, 4, 4)
HISTORY = {"epoch": np.arange(3), "total_loss": np.ones(3), "val_total_loss": np.ones(3)}
FIGURES = {
    "slices": lambda: ovq.plot_slices(IMAGES, titles=["a", "b", "c"], columns=2, title="t"),
    "reconstructions": lambda: ovq.plot_reconstructions(
        IMAGES, CODES, IMAGES[::-1], num_embeddings=48, scores=[1, 2, 3]
    ),
    "codes": lambda: ovq.plot_code_images(CODES, num_embeddings=48),
    "usage": lambda: ovq.plot_codebook_usage(CODES, num_embeddings=64),
    "history": lambda: ovq.plot_history(HISTORY, ["total_loss"]),
    "pipeline": lambda: ovq.plot_pipeline(IMAGES[0], CODES[0], IMAGES[1], IMAGES[2], num_embeddings=48),
    "scores": lambda: ovq.plot_scores({"model": {"ssim": 0.9}, "black": {"ssim": 0.7}}, ["ssim"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_returned_and_saved_with_the_same_bytes(name, tmp_path):
    for folder in ("one", "two"):
        figure = FIGURES[name]()
        assert isinstance(figure, Figure)
        ovq.save_figure(figure, name, folder=tmp_path / folder)
        plt.close(figure)
    for suffix in ("png", "pdf"):
        contents = [(tmp_path / folder / f"{name}.{suffix}").read_bytes() for folder in ("one", "two")]
        assert contents[0] == contents[1] and len(contents[0]) > 1000


def test_brains_are_gray_from_zero_to_one():
    shown = [axis.images[0] for axis in ovq.plot_slices(IMAGES).axes]
    assert {(image.get_cmap().name, image.norm.vmin, image.norm.vmax) for image in shown} == {("gray", 0.0, 1.0)}
    plt.close("all")


def test_codes_have_their_own_colours():
    colours = plots.code_colours(64)["cmap"].colors
    assert len(np.unique(colours, axis=0)) == 64
    np.testing.assert_array_equal(colours, plots.code_colours(64)["cmap"].colors)


def test_an_unused_row_of_panels_is_no_error():
    figure = ovq.plot_slices(IMAGES, columns=8)
    assert len(figure.axes) == 3
    plt.close(figure)
