"""The data guard finds every fault that is planted in a copy of a good cohort, and none in the good one."""

import io
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import oasis_vq as ovq
from oasis_vq.guard import check_readable, without_unreadable

TRAIN, VALIDATE, TEST = (f"keras_png_slices_{split}" for split in ("train", "validate", "test"))
NAME = "case_003_slice_4.nii.png"


def kinds(folder):
    findings = ovq.check_folder(folder)[1]
    return {finding.kind for finding in findings if finding.is_error}, {
        finding.kind for finding in findings if not finding.is_error
    }


def test_good_cohorts_have_no_error(cohort, adni):
    errors, notes = kinds(cohort)
    assert errors == set() and notes == {"few", "counts"}
    (counts,) = (finding for finding in ovq.check_folder(adni)[1] if finding.kind == "counts")
    assert "60 / 24 slices, where the published ADNI set has 21,520 / 9,000" in counts.text
    errors, notes = kinds(adni)
    assert errors == set() and notes == {"shape", "image ids", "counts"}


def test_real_slices_have_no_error(real_data):
    errors, notes = kinds(real_data)
    assert errors == set() and notes <= {"counts"}


def pointer(folder, file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def truncated(folder, file):
    file.write_bytes(file.read_bytes()[:400])


def text(folder, file):
    file.write_bytes(b"text")


def without_its_end(folder, file):
    file.write_bytes(file.read_bytes()[:-4])


def flipped_bit(folder, file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def another_format(folder, file):
    file.write_bytes(iio.imwrite("<bytes>", iio.imread(file), extension=".tiff"))


def link_to_nowhere(folder, file):
    file.unlink()
    file.symlink_to(folder / "away" / "image.png")


def other_content(folder, file):
    file.write_bytes(iio.imwrite("<bytes>", np.stack([iio.imread(file)] * 3, -1), extension=".bmp"))


def four_colours(folder, file):
    content = io.BytesIO()
    Image.fromarray(iio.imread(file)).convert("CMYK").save(content, "jpeg")
    file.write_bytes(content.getvalue())


def tissue_labels(folder, file):
    image = iio.imread(file)
    iio.imwrite(file, (np.digitize(image, (1, 90, 160)) * 85).astype(np.uint8))


def many_labels(folder, file):
    image = iio.imread(file)
    y, x = np.mgrid[:64, :64]
    iio.imwrite(file, ((y // 6 * 11 + x // 6 + 40) * (image > 0)).astype(np.uint8))


def subject_in_two_splits(folder, file):
    shutil.copy(file, folder / TEST / NAME)


def same_pixels_in_two_splits(folder, file):
    shutil.copy(file, folder / TEST / "case_009_slice_3.nii.png")


def wrong_name(folder, file):
    file.rename(file.with_name("brain.png"))


def no_validation(folder, file):
    shutil.rmtree(folder / VALIDATE)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (pointer, "pointer"), (truncated, "unreadable"), (text, "unreadable"), (without_its_end, "unreadable"),
        (flipped_bit, "unreadable"), (another_format, "unreadable"),
        (link_to_nowhere, "closed"), (other_content, "unreadable"), (four_colours, "unreadable"),
        (tissue_labels, "labels"),
        (many_labels, "labels"), (subject_in_two_splits, "leak"), (same_pixels_in_two_splits, "leak"),
        (wrong_name, "name"), (no_validation, "nothing found"),
    ],
)  # fmt: skip
def test_errors_are_found_and_name_file_and_remedy(copied, plant, kind):
    plant(copied, copied / TRAIN / NAME)
    found = next(finding for finding in ovq.check_folder(copied)[1] if finding.is_error)
    assert kinds(copied)[0] == {kind}
    named = {"name": "brain.png", "nothing found": VALIDATE}.get(kind, NAME)
    assert named in str(found) and len(found.remedy) > 20
    try:
        index = ovq.find_slices(copied)
    except (ValueError, FileNotFoundError) as error:
        assert named in str(error) and kind in ("leak", "name", "nothing found")
        return
    with pytest.raises(ValueError, match=named.replace(".", r"\.") + ".*python -m oasis_vq check"):
        ovq.fit_or_load(copied / "model", ovq.VQVAEConfig(image_size=64, width=4, epochs=1), index)
    assert not list(copied.glob("model*"))
    if plant is not same_pixels_in_two_splits:
        with pytest.raises(ValueError, match=named.replace(".", r"\.")):
            check_readable(index.test, index.train)


def colour(folder, file):
    iio.imwrite(file, np.stack([iio.imread(file)] * 3, axis=-1))


def cyan(folder, file):
    image = iio.imread(file)
    iio.imwrite(file, np.stack([image * 0, image, image], axis=-1))


def sixteen_bits(folder, file):
    iio.imwrite(file, iio.imread(file).astype(np.uint16) * 257)


def dark(folder, file):
    iio.imwrite(file, iio.imread(file) // 8)


def white_background(folder, file):
    image = iio.imread(file)
    iio.imwrite(file, np.where(image == 0, 255, image).astype(np.uint8))


def grey_background(folder, file):
    iio.imwrite(file, np.maximum(iio.imread(file), 20))


def black(folder, file):
    iio.imwrite(file, np.zeros((64, 64), np.uint8))


def other_size(folder, file):
    iio.imwrite(file, iio.imread(file)[::2, ::2])


def not_square(folder, file):
    iio.imwrite(file, iio.imread(file)[:, 8:-8])


def same_pixels(folder, file):
    shutil.copy(file, file.with_name("case_003_slice_5.nii.png"))


def slice_missing(folder, file):
    file.unlink()


def test_positions_that_are_not_trained_on_are_told(copied):
    for file in (copied / TRAIN).glob("case_*_slice_[25].nii.png"):
        file.unlink()
    (found,) = (finding for finding in ovq.check_folder(copied)[1] if finding.kind == "gap")
    assert "no training slice is at position 2, 5" in str(found) and not found.is_error


def another_of_the_same(folder, file):
    image = iio.imread(file)
    image[30, 30] += 1
    iio.imwrite(file.with_name(NAME.replace(".nii", "")), image)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (colour, "colour"), (cyan, "colour"), (sixteen_bits, "bits"), (dark, "range"), (white_background, "background"),
        (grey_background, "background"),
        (black, "blank"), (other_size, "sizes"), (not_square, "shape"), (same_pixels, "duplicates"),
        (slice_missing, "incomplete"), (another_of_the_same, "twice"),
    ],
)  # fmt: skip
def test_notes_are_found_and_name_the_file(copied, plant, kind):
    plant(copied, copied / TRAIN / NAME)
    (found,) = (finding for finding in ovq.check_folder(copied)[1] if finding.kind == kind)
    assert not found.is_error and found.remedy
    assert ("003" if kind == "incomplete" else NAME) in str(found)
    errors, notes = kinds(copied)
    assert not errors and notes == {kind, "few", "counts", *({"shape", "sizes"} if plant is not_square else ())}


def test_several_faults_are_all_told(copied):
    for plant, name in ((pointer, "case_001_slice_1"), (truncated, "case_002_slice_1"), (colour, "case_004_slice_2")):
        plant(copied, copied / TRAIN / f"{name}.nii.png")
    subject_in_two_splits(copied, copied / TRAIN / "case_005_slice_0.nii.png")
    assert kinds(copied) == ({"pointer", "unreadable", "leak"}, {"colour", "few", "counts", "incomplete"})


def test_brains_enlarged_by_repeating_pixels_are_no_labels(copied):
    for file in copied.glob("*/*.png"):
        iio.imwrite(file, np.kron(iio.imread(file), np.ones((2, 2), np.uint8)))
    assert kinds(copied)[0] == set()


def test_constant_slices_in_two_splits_are_no_leak(copied):
    for split in (TRAIN, TEST):
        for file in list((copied / split).iterdir())[:2]:
            iio.imwrite(file, np.full((64, 64), 40, np.uint8))
    assert "leak" not in kinds(copied)[0]


def test_nothing_left_of_a_split_is_said(copied):
    for file in (copied / VALIDATE).iterdir():
        file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"Not one of the 16 slices to validate in .* can be decoded"):
        without_unreadable(ovq.find_slices(copied))


def test_trainings_say_the_notes(adni, tmp_path, capsys):
    ovq.fit_or_load(tmp_path / "v", ovq.VQVAEConfig(image_size=32, width=4, epochs=1), ovq.find_slices(adni))
    said = capsys.readouterr().out
    assert all(words in said for words in ("note: ", "not square", "ids are those of images", "published ADNI set"))
    assert str(adni) not in said and f"{adni.name}: " in said


def test_converted_files_are_read_as_said(copied):
    slices = ovq.find_slices(copied).train
    row = slices.path.tolist().index(str(copied / TRAIN / NAME))
    before = ovq.load_images(slices, image_size=64)[row]
    for plant in (colour, sixteen_bits):
        plant(copied, copied / TRAIN / NAME)
        np.testing.assert_allclose(ovq.load_images(slices, image_size=64)[row], before, atol=2 / 255)
        iio.imwrite(copied / TRAIN / NAME, np.rint(before[..., 0] * 255).astype(np.uint8))


def test_unreadable_files_are_left_out_when_asked(copied):
    for plant, name in ((pointer, "case_001_slice_1"), (truncated, "case_002_slice_1")):
        plant(copied, copied / TRAIN / f"{name}.nii.png")
    index, dropped = without_unreadable(ovq.find_slices(copied))
    assert [path.rsplit("case_")[-1] for path in dropped] == ["001_slice_1.nii.png", "002_slice_1.nii.png"]
    assert len(index.train) == 46 and len(index.test) == 16
    check_readable(*index.splits().values())
