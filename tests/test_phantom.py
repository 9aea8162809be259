"""The phantom cohort: who is in it, that it looks like brains, and that it is the same however it was made."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from scipy import ndimage

from oasis_vq import phantom

SMALL = {"num_subjects": 6, "image_size": 64, "num_slices": 4, "seed": 3}


def read_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A small cohort written without interruption by this process."""
    return phantom.make_cohort(tmp_path_factory.mktemp("phantom") / "one", **SMALL, num_workers=1, progress=False)


@pytest.fixture(scope="module")
def people():
    """Eight subjects in eight slices, (subject, slice, row, column), float32 in [0, 1]."""
    return np.stack([phantom.subject_slices(0, i, 64, 8) for i in range(8)]).astype(np.float32) / 255


def test_splits_are_those_of_oasis_and_share_no_case():
    splits = phantom.split_cases(354)
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 302, "validate": 35, "test": 17}
    for num_subjects in (6, 7, 24, 100, 354, 355):
        cases = [list(cases) for cases in phantom.split_cases(num_subjects).values()]
        assert [case for split in cases for case in split] == list(range(1, num_subjects + 1))
        assert all(len(split) >= 2 for split in cases)


def test_cohort_has_the_oasis_layout(cohort):
    parameters = json.loads((cohort / "cohort.json").read_text())
    assert parameters == {**SMALL, "format_version": phantom.FORMAT_VERSION}
    expected = {"cohort.json"}
    for split, cases in phantom.split_cases(6).items():
        expected |= {f"keras_png_slices_{split}/case_{c:03d}_slice_{k}.nii.png" for c in cases for k in range(4)}
    assert set(read_bytes(cohort)) == expected
    image = iio.imread(cohort / "keras_png_slices_train" / "case_002_slice_3.nii.png")
    assert image.dtype == np.uint8 and image.shape == (64, 64)
    np.testing.assert_array_equal(image, phantom.subject_slices(seed=3, subject=1, image_size=64, num_slices=4)[3])


def test_same_bytes_with_two_workers_and_other_people_with_another_seed(cohort, tmp_path):
    again = phantom.make_cohort(tmp_path / "two", **SMALL, num_workers=2, progress=False)
    assert read_bytes(again) == read_bytes(cohort)
    images = {name: content for name, content in read_bytes(cohort).items() if name.endswith(".png")}
    other = phantom.make_cohort(tmp_path / "other", **{**SMALL, "seed": 4}, num_workers=1, progress=False)
    assert all(read_bytes(other)[name] != content for name, content in images.items())


def test_subjects_differ_by_more_than_noise(people):
    for plane in range(2, 8):
        smooth = ndimage.gaussian_filter(people[:, plane], (0, 1, 1))  # noise (below 0.03) shrinks to a third
        brain = (smooth > 0.05).mean(0) > 0.5
        distances = [np.abs(a - b)[brain].mean() for i, a in enumerate(smooth) for b in smooth[:i]]
        assert min(distances) > 0.04
    areas = (people > 0.05).mean((1, 2, 3))
    assert areas.std() / areas.mean() > 0.01


def test_background_is_black_and_brain_fills_a_plausible_share(people):
    inside = people > 0
    assert not inside[..., :4, :].any() and not inside[..., -4:, :].any()
    assert not inside[..., :8].any() and not inside[..., -8:].any()
    share = inside.mean((2, 3))  # real adults with this field of view: 0.15-0.30, less at both ends
    assert np.all(share[:, 2:5] > 0.2) and np.all(share < 0.4) and np.all(share > 0.03)
    assert 0.5 < people[inside].mean() < 0.75
    rows = np.abs(np.argwhere(inside.any((0, 1))).mean(0) - 31.5)
    assert np.all(rows < 4)


def test_left_is_not_the_mirror_image_of_right(people):
    middle = ndimage.gaussian_filter(people[:, 4], (0, 1, 1))
    for image in middle:
        brain = image > 0.05
        shifted = [np.roll(image[:, ::-1], by, axis=1) for by in range(-6, 7)]  # a head off centre is not asymmetry
        assert min(np.abs(image - mirrored)[brain].mean() for mirrored in shifted) > 0.03


def test_anterior_is_up(people):
    """The lowest slice is mostly cerebellum, which lies behind the middle of the brain above it."""
    rows = np.arange(64)[:, None]
    lowest, above = ((people[:, plane] > 0.05) for plane in (0, 3))
    for low, high in zip(lowest, above, strict=True):
        assert (low * rows).sum() / low.sum() > (high * rows).sum() / high.sum() + 3


def test_ventricles_differ_between_subjects(people):
    """The dark share of the middle 48 x 40 mm of the brain, at the level of the bodies of the lateral ventricles."""
    dark = (people[:, 4, 27:39, 27:37] < 0.45).mean((1, 2))
    assert dark.max() > 2 * dark.min() and dark.max() > 0.1


def test_killed_run_is_completed_to_the_same_bytes(cohort, tmp_path):
    folder, partial = tmp_path / "killed", tmp_path / "killed.partial"
    code = f"from oasis_vq import phantom; phantom.make_cohort({str(folder)!r}, **{SMALL!r}, num_workers=1)"
    root = Path(phantom.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(partial.glob("*/case_002_*.png")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0
    written = len(list(partial.glob("*/case_*.png")))
    assert 4 < written < 24 and not folder.exists()
    first = partial / "keras_png_slices_train" / "case_001_slice_0.nii.png"
    modified = first.stat().st_mtime_ns

    phantom.make_cohort(folder, **SMALL, num_workers=1, progress=False)
    assert read_bytes(folder) == read_bytes(cohort) and not partial.exists()
    kept = folder / "keras_png_slices_train" / first.name
    assert kept.stat().st_mtime_ns == modified  # continued, not started anew


def test_slices_that_a_power_cut_left_unfinished_are_made_anew(cohort, tmp_path):
    partial = shutil.copytree(cohort, tmp_path / "cut.partial")
    slices = sorted((partial / "keras_png_slices_train").iterdir())
    slices[0].write_bytes(b"")
    slices[-1].write_bytes(slices[-1].read_bytes()[:-20] + bytes(20))  # its length, not yet its last bytes
    phantom.make_cohort(tmp_path / "cut", **SMALL, num_workers=1, progress=False)
    assert read_bytes(tmp_path / "cut") == read_bytes(cohort)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    arguments = {**SMALL, "num_subjects": 300}
    code = f"from oasis_vq import phantom; phantom.make_cohort({str(tmp_path / 'big')!r}, **{arguments!r})"
    root = Path(phantom.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("big.partial/*/case_*.png")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait() != 0
    process.communicate(timeout=10)  # the pipe ends only when every worker that inherited it has ended
    assert 0 < len(list(tmp_path.glob("big.partial/*/case_*.png"))) < 300 * 4 and not (tmp_path / "big").exists()


def test_partial_folder_with_other_parameters_is_started_anew(cohort, tmp_path):
    partial = tmp_path / "anew.partial"
    (partial / "keras_png_slices_train").mkdir(parents=True)
    (partial / "cohort.json").write_text(json.dumps({**SMALL, "seed": 4, "format_version": phantom.FORMAT_VERSION}))
    for k in range(4):
        (partial / "keras_png_slices_train" / f"case_001_slice_{k}.nii.png").write_bytes(b"of another person")
    phantom.make_cohort(tmp_path / "anew", **SMALL, num_workers=1, progress=False)
    assert read_bytes(tmp_path / "anew") == read_bytes(cohort)


def test_finished_cohort_is_left_alone(cohort):
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    assert phantom.make_cohort(cohort, **SMALL) == cohort
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_refusals_say_rule_what_came_and_remedy(cohort, tmp_path):
    with pytest.raises(ValueError, match=r"at least 6 subjects .* Received: 5\. Ask for 6 or more\.$"):
        phantom.make_cohort(tmp_path / "few", num_subjects=5)
    with pytest.raises(ValueError, match=r"^num_slices must be at least 1\. Received: 0\.$"):
        phantom.make_cohort(tmp_path / "none", num_slices=0)
    with pytest.raises(FileExistsError) as other:
        phantom.make_cohort(cohort, **{**SMALL, "seed": 4})
    assert "which holds one made with seed: 3, not 4. Name" in str(other.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError) as stranger:
        phantom.make_cohort(tmp_path / "full", **SMALL)
    assert f"Received: {tmp_path / 'full'}, which holds files without cohort.json." in str(stranger.value)
    for error in (other, stranger):
        assert str(error.value).startswith("A phantom cohort is written to a new or empty folder.")
        assert str(error.value).endswith("Name another folder, or remove this one.") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_import_needs_no_tensorflow_and_loads_no_template():
    code = "import sys; from oasis_vq.phantom import load_template as load; "
    code += "print('tensorflow' in sys.modules, load.cache_info().currsize)"
    root = Path(phantom.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]
