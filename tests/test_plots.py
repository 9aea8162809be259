"""Figures: same bytes on a rerun, brains in gray, codes in nominal colours, nothing shown."""

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

import oasis_vq as ovq
from oasis_vq import figures

IMAGES = np.random.default_rng(0).uniform(size=(3, 16, 16, 1)).astype(np.float32)
CODES = np.arange(48).reshape(3, 4, 4)
POSITIONS = ovq.code_positions(CODES % 5, 6)
COUNTS = np.bincount(CODES.ravel() % 5, minlength=6)
PATCHES = ovq.code_patches(CODES % 5, IMAGES, 6)  # code 5 is dead
PLACES = np.array([[0, 0], [1, 2], [3, 1], [-2, 1], [-1, -1], [2, -1]], float)
HISTORY = {"epoch": np.arange(3), "total_loss": np.ones(3), "val_total_loss": np.ones(3)}
CURVE = {"ssim": [0.9, 0.8], "brain_ssim": [0.7, None]}
BY_POSITION = {"slice": [4, 5], "model": CURVE, "mean_slice": CURVE, "black": CURVE}
FIGURES = {
    "slices": lambda: ovq.plot_slices(IMAGES, titles=["a", "b", "c"], columns=2, title="t"),
    "reconstructions": lambda: ovq.plot_reconstructions(
        IMAGES, CODES, IMAGES[::-1], num_embeddings=48, scores=[1, 2, 3]
    ),
    "codes": lambda: ovq.plot_code_images(CODES, num_embeddings=48),
    "usage": lambda: ovq.plot_codebook_usage(CODES, num_embeddings=64),
    "positions": lambda: ovq.plot_code_positions(
        POSITIONS, titles=list("abcdef"), background=IMAGES.mean(axis=0), columns=4
    ),
    "patches": lambda: ovq.plot_code_patches(PATCHES, codes=range(6), columns=4, title="t"),
    "changes": lambda: ovq.plot_changes(IMAGES[0], IMAGES[1:], titles=["a", "b"]),
    "map": lambda: ovq.plot_codebook_map(PLACES, patches=PATCHES, counts=COUNTS, variance=(0.6, 0.3)),
    "maps": lambda: ovq.plot_maps(IMAGES, CODES / 10, label="bits", titles=["a", "b", "c"]),
    "distances": lambda: ovq.plot_distances({"samples": [0.1, 0.2, 0.2], "test": [0.1, 0.3]}),
    "history": lambda: ovq.plot_history(HISTORY, ["total_loss"]),
    "pipeline": lambda: ovq.plot_pipeline(IMAGES[0], CODES[0], IMAGES[1], IMAGES[2], num_embeddings=48),
    "scores by position": lambda: ovq.plot_scores_by_position(BY_POSITION),
    "rate and distortion": lambda: ovq.plot_rate_distortion(
        {"default": (2304, 0.7), "fine": (9216, 0.9)}, baselines={"mean slice": 0.4}
    ),
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
    colours = figures.code_colours(64)["cmap"].colors
    assert len(np.unique(colours, axis=0)) == 64
    np.testing.assert_array_equal(colours, figures.code_colours(64)["cmap"].colors)


def test_an_unused_row_of_panels_is_no_error():
    figure = ovq.plot_slices(IMAGES, columns=8)
    assert len(figure.axes) == 3
    plt.close(figure)


def test_differences_share_one_symmetric_scale():
    figure = ovq.plot_changes(IMAGES[0], IMAGES[1:], titles=["a", "b"])
    shown = [axis.images[0] for axis in figure.axes if axis.images]
    below = [image for image in shown if image.get_cmap().name == "RdBu_r"]
    limit = float(np.abs(IMAGES[1:] - IMAGES[0]).max())
    assert len(shown) == 5 and [image.get_clim() for image in below] == [(-limit, limit)] * 2
    np.testing.assert_array_equal(below[1].get_array(), (IMAGES[2] - IMAGES[0])[..., 0])
    plt.close(figure)


def test_outlines_lie_where_the_slices_are():
    """A square of 4 of 16 pixels on each side is outlined at a quarter of the grid of 4."""
    background = np.zeros((16, 16, 1))
    background[4:8, 8:12] = 1.0
    axis = ovq.plot_code_positions(POSITIONS[:1], titles=["a"], background=background).axes[0]
    corners = axis.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([corners.x0, corners.x1, corners.y0, corners.y1], [2, 3, 1, 2], atol=0.13)
    assert axis.get_ylim() == (4, 0)
    plt.close("all")


def test_codes_over_the_map_do_not_overlap_and_dead_ones_are_crosses():
    points, pictures, *_ = ovq.plot_codebook_map(PLACES, patches=PATCHES, counts=COUNTS, variance=(0.6, 0.3)).axes
    living, dead = (part.get_offsets() for part in points.collections)
    np.testing.assert_array_equal(living, PLACES[:5])
    np.testing.assert_array_equal(dead, PLACES[5:])
    assert len(pictures.images) == 5
    on_three_places = np.eye(6, 2)
    crowd = ovq.plot_codebook_map(on_three_places, patches=PATCHES, counts=COUNTS, variance=(0.6, 0.3)).axes[1]
    assert len(crowd.images) == 3
    plt.close("all")


def test_film_has_every_frame_and_the_same_bytes_again(tmp_path):
    images = np.linspace(0, 1, 5 * 16 * 16).reshape(5, 16, 16, 1)
    first = ovq.save_film(images, "film", folder=tmp_path)
    assert first == ovq.save_film(images, "film", folder=tmp_path) == (tmp_path / "film.gif").read_bytes()
    frames = iio.imread(first, extension=".gif", index=None)
    np.testing.assert_allclose(frames.mean(axis=-1), 255 * images[..., 0], atol=1)


def test_a_rate_distortion_figure_names_all_points_and_its_texts_stay_inside():
    points = {f"a system with rather a long name, {number}": (10.0**number, 0.9) for number in (3, 4, 5)}
    figure = ovq.plot_rate_distortion(points, baselines={"mean slice": 0.4})
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    assert [text.get_text().split("  ")[1] for text in legend.get_texts()] == [*points, "mean slice"]
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert box.x0 >= figure.axes[0].get_window_extent().x1  # not over the points
