"""The explorers without a browser: sliders are set, and the mouse's messages sent, as a browser's would be."""

import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import PRIOR_CONFIG

import oasis_vq as ovq
from oasis_vq.explore import LIMIT, NUM_COMPLETIONS, NUM_SAMPLES
from oasis_vq.figures import code_colours
from oasis_vq.metrics import ssim_per_image

CODES, BRAIN, PALETTE = "codes: paint here", "brain: or here", "codes, from dark to bright: click one"


def pixels(explorer, title, size=None):
    """Return a picture, brought back to one pixel for each that was enlarged if its height before is given."""
    picture = iio.imread(explorer.pictures[title].value)
    return picture if size is None else picture[:: len(picture) // size, :: len(picture) // size]


def mouse(explorer, title, row, column, shape, event="mousedown", buttons=1, shift=False):
    """Send what a browser sends when the mouse is at the middle of a cell of a picture."""
    content = {
        "event": event, "buttons": buttons, "shiftKey": shift, "boundingRectHeight": 320.0, "boundingRectWidth": 640.0,
        "relativeY": 320 * (row + 0.5) / shape[0], "relativeX": 640 * (column + 0.5) / shape[1],
    }  # fmt: skip
    data = {"method": "custom", "content": content}
    explorer.mice[title]._handle_msg({"content": {"data": data}, "buffers": []})


def first_slice(explorer, slices, size):
    """Return the image (1, size, size, 1) of the slice whose subject and position the controls say."""
    values = explorer.values()
    rows = (slices.subject == values["subject"]) & (slices.slice == values["position"])
    return ovq.load_images(slices[rows], image_size=size)


def as_gray(image):
    return np.round(255 * image[..., 0]).astype(np.uint8)


def test_slices_of_all_splits_are_there(index):
    explorer = ovq.explore_slices(index, image_size=64)
    labels = [label for label, _ in explorer.controls["subject"].options]
    assert len(labels) == 10 and sum("(train)" in label for label in labels) == 6 and labels[-1].endswith("(test)")
    before = explorer.pictures["slice"].value
    explorer.controls["subject"].value = index.test.subject[-1]
    explorer.controls["position"].value = 2
    assert explorer.pictures["slice"].value != before
    (image,) = first_slice(explorer, index.test, 64)
    assert np.array_equal(pixels(explorer, "slice", 64), as_gray(image))
    assert f"case {index.test.subject[-1]} (test), slice 2" in explorer.text.value and explorer.codes is None


def test_a_subject_without_the_position_shows_the_nearest(vqvae, index):
    slices = index.test[(index.test.subject != index.test.subject[0]) | (index.test.slice < 3)]
    explorer = ovq.explore_reconstructions(vqvae, slices)
    explorer.controls["position"].value = 6
    assert f"case {slices.subject[0]}, slice 2:" in explorer.text.value
    explorer.controls["subject"].value = slices.subject[-1]
    assert f"case {slices.subject[-1]}, slice 6:" in explorer.text.value


def test_reconstructions_have_their_scores_and_errors(vqvae, index):
    explorer = ovq.explore_reconstructions(vqvae, index.test)
    before = {title: picture.value for title, picture in explorer.pictures.items()}
    explorer.controls["position"].value = 3
    assert all(picture.value != before[title] for title, picture in explorer.pictures.items())
    image = first_slice(explorer, index.test, 32)
    again = vqvae.reconstruct(image)
    (whole,), (brain,) = ssim_per_image(image, again)
    assert f"ssim {whole:.3f}, brain_ssim {brain:.3f}" in explorer.text.value
    assert np.array_equal(explorer.codes, vqvae.encode(image))
    assert np.array_equal(pixels(explorer, "slice", 32), as_gray(image[0]))
    assert np.array_equal(pixels(explorer, "reconstruction", 32), as_gray(again[0]))
    errors = pixels(explorer, next(title for title in explorer.pictures if title.startswith("error")), 32).astype(int)
    difference = (again - image)[0, ..., 0]
    redness = errors[..., 0] - errors[..., 2]
    assert (redness[difference > 0.1] > 0).all() and (redness[difference < -0.1] < 0).all()
    assert (errors[np.abs(difference) < 0.001] > 240).all()  # white
    assert len(np.unique(errors[difference >= LIMIT], axis=0)) <= 1  # the darkest red


class TestPainting:
    @pytest.fixture
    def explorer(self, vqvae, index):
        explorer = ovq.explore_codes(vqvae, index.test)
        explorer.controls["code"].value = (int(explorer.codes[0, 2, 5]) + 1) % 32  # another than the one at (2, 5)
        return explorer

    @pytest.mark.parametrize("title", [CODES, BRAIN])
    def test_a_click_sets_exactly_that_code(self, explorer, vqvae, title):
        before, shown = explorer.codes, explorer.pictures[BRAIN].value
        mouse(explorer, title, 2, 5, (8, 8))
        expected = before.copy()
        expected[0, 2, 5] = explorer.controls["code"].value
        assert np.array_equal(explorer.codes, expected) and explorer.pictures[BRAIN].value != shown
        colours = code_colours(32)["cmap"](expected[0], bytes=True)[..., :3]
        assert np.array_equal(pixels(explorer, CODES, 8), colours)
        assert np.array_equal(pixels(explorer, BRAIN, 32), as_gray(vqvae.decode(expected)[0]))
        assert explorer.text.value.startswith("1 of 64 codes changed")

    def test_a_drag_paints_every_cell_on_its_way(self, explorer):
        expected = explorer.codes.copy()
        mouse(explorer, CODES, 1, 0, (8, 8))
        mouse(explorer, CODES, 1, 6, (8, 8), "mousemove")
        mouse(explorer, CODES, 7, 7, (8, 8), "mousemove", buttons=0)  # let go
        expected[0, 1, :7] = explorer.controls["code"].value
        assert np.array_equal(explorer.codes, expected)

    def test_two_strokes_are_not_joined(self, explorer):
        expected = explorer.codes.copy()
        mouse(explorer, CODES, 0, 7, (8, 8))
        mouse(explorer, CODES, 4, 9, (8, 8), "mouseleave")
        mouse(explorer, CODES, 7, 7, (8, 8), "mousemove")
        expected[0, [0, 7], 7] = explorer.controls["code"].value
        assert np.array_equal(explorer.codes, expected)

    @pytest.mark.parametrize("at, options", [((8, 3), {}), ((-1, 3), {}), ((3, 8), {}), ((3, 3), {"buttons": 2})])
    def test_nothing_happens_outside_or_with_another_button(self, explorer, at, options):
        before = explorer.codes
        mouse(explorer, CODES, *at, (8, 8), **options)
        assert np.array_equal(explorer.codes, before)

    def test_shift_takes_up_the_code(self, explorer):
        before = explorer.codes
        mouse(explorer, CODES, 4, 4, (8, 8), shift=True)
        assert explorer.controls["code"].value == before[0, 4, 4] and np.array_equal(explorer.codes, before)

    def test_starting_again_and_another_slice_undo_it(self, explorer, vqvae, index):
        before = explorer.codes
        mouse(explorer, CODES, 2, 5, (8, 8))
        explorer.children[0].children[-1].click()
        assert np.array_equal(explorer.codes, before)
        mouse(explorer, CODES, 2, 5, (8, 8))
        explorer.controls["position"].value = 1
        assert np.array_equal(explorer.codes, vqvae.encode(first_slice(explorer, index.test, 32)))

    def test_the_palette_goes_from_dark_to_bright(self, explorer, vqvae, index):
        codes = ovq.encode_slices(vqvae, index.test).codes
        patches = ovq.code_patches(codes, vqvae.decode(codes), 32)
        means = []
        for number in range(len(np.unique(codes))):
            mouse(explorer, PALETTE, *divmod(number, 8), (4, 8))
            means.append(patches[explorer.controls["code"].value].mean())
        assert means == sorted(means)


def test_where_codes_fire(vqvae, index):
    explorer = ovq.explore_code_positions(vqvae, index.test)
    codes = ovq.encode_slices(vqvae, index.test).codes
    code = int(codes[0, 3, 3])
    explorer.controls["code"].value = code
    heat = pixels(explorer, "where it fires", 32).reshape(8, 4, 8, 4, 3)
    fires = (codes == code).any(axis=0)
    coloured = ((heat > 5).any(axis=-1) & (heat < 255).all(axis=-1)).any(axis=(1, 3))  # neither black nor the outline
    assert np.array_equal(coloured, fires)
    assert (
        f"code {code}: at {(codes == code).mean():.2%} of all positions of {len(codes)} slices" in explorer.text.value
    )
    decoded = ovq.code_patches(codes, vqvae.decode(codes), 32)[code]
    assert np.array_equal(pixels(explorer, "what it decodes to", 4), as_gray(decoded))
    before = explorer.pictures["what it decodes to"].value
    mouse(explorer, PALETTE, 0, 0, (4, 8))
    assert explorer.controls["code"].value != code and explorer.pictures["what it decodes to"].value != before


def test_completions_keep_the_rows(prior, vqvae, index):
    explorer = ovq.explore_completions(prior, vqvae, index.test)
    before = explorer.pictures["completions"].value
    explorer.controls["rows_kept"].value = 3
    known = vqvae.encode(first_slice(explorer, index.test, 32))
    assert explorer.codes.shape == (NUM_COMPLETIONS, 8, 8) and explorer.pictures["completions"].value != before
    assert (explorer.codes[:, :3] == known[:, :3]).all() and (explorer.codes[:, 3:] != known[:, 3:]).any()
    explorer.controls["rows_kept"].value = 8
    assert (explorer.codes == known).all()


def test_completions_are_of_the_class_of_their_slice(adni, vqvae):
    index = ovq.find_slices(adni)
    prior = ovq.PixelCNN(PRIOR_CONFIG.conditioned_by(index))
    sick = index.test[index.test.label == 1]
    explorer = ovq.explore_completions(prior, vqvae, sick)
    known = vqvae.encode(first_slice(explorer, sick, 32))
    given = {"prefix": known[:, :4], "slice_index": explorer.values()["position"], "label": 1}
    np.testing.assert_array_equal(explorer.codes, ovq.sample_codes(prior, NUM_COMPLETIONS, **given))


def test_samples_are_those_of_the_sliders(prior, vqvae):
    explorer = ovq.explore_samples(prior, vqvae)
    assert np.array_equal(explorer.codes, ovq.sample_codes(prior, NUM_SAMPLES, seed=0))
    settings = {"slice_index": 5, "top_k": 4, "temperature": 0.8, "seed": 3}
    for name, value in settings.items():
        before = explorer.pictures["samples"].value
        explorer.controls[name].value = value
        assert explorer.pictures["samples"].value != before, name
    assert np.array_equal(explorer.codes, ovq.sample_codes(prior, NUM_SAMPLES, **settings))
    images = vqvae.decode(explorer.codes)
    assert np.array_equal(pixels(explorer, "samples", 64)[32:, :32], as_gray(images[4]))


def test_what_goes_wrong_is_said_in_one_line(vqvae, copied):
    slices = ovq.find_slices(copied).test
    explorer = ovq.explore_reconstructions(vqvae, slices)
    before = explorer.text.value
    gone = Path(slices.path[(slices.subject == slices.subject[0]) & (slices.slice == 1)][0])
    content = gone.read_bytes()
    gone.unlink()
    explorer.controls["position"].value = 1
    assert explorer.text.value.startswith("error: ") and gone.name in explorer.text.value
    assert len(explorer.text.value.splitlines()) == 1
    gone.write_bytes(content)
    explorer.controls["subject"].value = slices.subject[-1]
    assert "brain_ssim" in explorer.text.value != before


def test_no_slices_are_refused(vqvae, prior, index):
    none = index.test[:0]
    for make in (ovq.explore_reconstructions, ovq.explore_codes, ovq.explore_code_positions):
        with pytest.raises(ValueError, match=r"at least one slice\. Received: none"):
            make(vqvae, none)
    with pytest.raises(ValueError, match=r"at least one slice\. Received: none"):
        ovq.explore_completions(prior, vqvae, none)


def test_missing_packages_are_named():
    code = "import sys; sys.modules['ipyevents'] = None; import oasis_vq as ovq; ovq.explore_slices"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: The explorers need ipywidgets and ipyevents") and "requirements.txt" in last


def test_without_a_kernel_there_is_a_line_of_text(index):
    explorer = ovq.explore_slices(index, image_size=64)
    assert repr(explorer) == "An explorer. JupyterLab shows it while its kernel runs: run the cell again."


@pytest.fixture(scope="module")
def default128():
    """The models of the default sizes, untrained: they take as long as trained ones."""
    recipe = ovq.recipe("default128")
    return ovq.VQVAE(recipe.vqvae), ovq.PixelCNN(recipe.prior)


def median_seconds(explorer, name, count=9):
    """Return how long a slider takes to its picture, the median of some steps after a first one."""
    control, seconds = explorer.controls[name], []
    values = getattr(control, "options", range(100))
    for value in (*values, *values)[: count + 1]:
        start = time.perf_counter()
        control.value = value
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def test_pictures_follow_a_slider_within_a_fifth_of_a_second(default128, index):
    vqvae, _ = default128
    explorers = {
        "slices": (ovq.explore_slices(index, image_size=128), "position"),
        "reconstructions": (ovq.explore_reconstructions(vqvae, index.test), "position"),
        "codes": (ovq.explore_codes(vqvae, index.test), "code"),
        "code positions": (ovq.explore_code_positions(vqvae, index.test), "code"),
    }
    seconds = {name: median_seconds(*explorer) for name, explorer in explorers.items()}
    assert max(seconds.values()) < 0.2, seconds


@pytest.mark.slow
def test_samples_follow_a_slider_within_two_seconds(default128, index):
    vqvae, prior = default128
    explorers = {
        "completions": (ovq.explore_completions(prior, vqvae, index.test), "rows_kept"),
        "samples": (ovq.explore_samples(prior, vqvae), "seed"),
    }
    seconds = {name: median_seconds(*explorer) for name, explorer in explorers.items()}
    assert max(seconds.values()) < 2, seconds
