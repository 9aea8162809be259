"""Slices: what is found, how it streams, and what bad input is told."""

import imageio.v3 as iio
import numpy as np
import pytest

import oasis_vq as ovq
from oasis_vq.slices import check_readable

TRAIN = "keras_png_slices_train"


def batches(dataset):
    return [batch.numpy() for batch in dataset]


def test_index_has_the_cohort_and_no_subject_twice(index):
    assert {name: (len(part), part.num_subjects) for name, part in index.splits().items()} == {
        "train": (48, 6), "validate": (16, 2), "test": (16, 2)
    }  # fmt: skip
    subjects = [set(part.subject) for part in index.splits().values()]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    assert index.train.slice[:9].tolist() == [*range(8), 0]
    assert "train 48 of 6 subjects" in str(index)


def test_slices_sort_by_number_not_by_letters(cohort, copied):
    for number in (10, 9):
        source = copied / TRAIN / "case_001_slice_0.nii.png"
        (copied / TRAIN / f"case_001_slice_{number}.nii.png").write_bytes(source.read_bytes())
    assert ovq.find_slices(copied).train.slice[:10].tolist() == [*range(8), 9, 10]


def test_images_are_the_files_in_zero_to_one(index):
    images = ovq.load_images(index.train[:3], image_size=64)
    assert images.shape == (3, 64, 64, 1) and images.dtype == np.float32
    for path, image in zip(index.train.path, images, strict=False):
        np.testing.assert_array_equal(np.rint(image[..., 0] * 255).astype(np.uint8), iio.imread(path))


def test_resizing_keeps_the_mean_and_the_order(index):
    full, half = (ovq.load_images(index.train[:5], image_size=size) for size in (64, 32))
    np.testing.assert_allclose(half, full.reshape(5, 32, 2, 32, 2, 1).mean(axis=(2, 4)), atol=1e-6)


def test_order_is_a_function_of_seed_and_epoch(index):
    def epochs(count, **options):
        dataset = ovq.make_dataset(index.train, image_size=16, batch_size=48, shuffle=True, **options)
        return [batches(dataset)[0] for _ in range(count)]

    first, second, third = epochs(3, seed=1)
    np.testing.assert_array_equal(np.stack(epochs(3, seed=1)), np.stack([first, second, third]))
    assert not np.array_equal(first, second) and not np.array_equal(first, epochs(1, seed=2)[0])
    np.testing.assert_array_equal(epochs(1, seed=1, first_epoch=2)[0], third)
    np.testing.assert_allclose(np.sort(first.sum((1, 2, 3))), np.sort(second.sum((1, 2, 3))))  # all slices, once


def test_last_batch_is_kept(index):
    dataset = ovq.make_dataset(index.train, image_size=16, batch_size=20, shuffle=True)
    assert len(dataset) == 3 and [len(batch) for batch in batches(dataset)] == [20, 20, 8]


def test_missing_folder_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No PNG slices in .*nowhere.*python -m oasis_vq phantom"):
        ovq.find_slices(tmp_path / "nowhere")


def test_empty_split_is_named(copied):
    for file in (copied / "keras_png_slices_validate").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="keras_png_slices_validate"):
        ovq.find_slices(copied)


@pytest.mark.parametrize("name", ["brain.png", "case_001_slice_x.nii.png", "case_001.nii.png", "photo.JPG"])
def test_file_outside_the_layout_is_named(copied, name):
    (copied / TRAIN / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is named outside the layout.*case_001_slice_0"):
        ovq.find_slices(copied)


def test_files_that_are_no_images_are_passed_over(copied):
    for name in (".DS_Store", "notes.txt", "Thumbs.db"):
        (copied / TRAIN / name).write_bytes(b"")
    assert len(ovq.find_slices(copied).train) == 48


def test_subject_in_two_splits_is_refused(copied):
    leak = copied / "keras_png_slices_test" / "case_001_slice_0.nii.png"
    leak.write_bytes((copied / TRAIN / "case_001_slice_0.nii.png").read_bytes())
    with pytest.raises(ValueError, match="Subject 001 is in train and in test"):
        ovq.find_slices(copied)


@pytest.mark.parametrize("fault", ["empty", "truncated", "without its end", "flipped", "text", "another format"])
def test_unreadable_png_is_named(copied, fault):
    file = copied / TRAIN / "case_003_slice_4.nii.png"
    content = bytearray(file.read_bytes())
    if fault == "flipped":
        content[len(content) // 2] ^= 0xFF
    image = iio.imread(file)
    faulty = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "without its end": content[:-4],
        "flipped": content,
        "text": b"text",
        "another format": iio.imwrite("<bytes>", image, extension=".tiff"),
    }
    file.write_bytes(faulty[fault])
    with pytest.raises(ValueError, match=r"case_003_slice_4\.nii\.png: it cannot be decoded.*replace the file"):
        check_readable(ovq.find_slices(copied).train)


def test_image_that_is_not_square_is_named(copied):
    iio.imwrite(copied / TRAIN / "case_003_slice_4.nii.png", np.zeros((64, 48), np.uint8))
    with pytest.raises(ValueError, match=r"case_003_slice_4\.nii\.png: it is 64 by 48 pixels"):
        check_readable(ovq.find_slices(copied).train)


def test_phantom_is_made_when_there_are_no_data(tmp_path, monkeypatch, cohort):
    monkeypatch.setenv("OASIS_VQ_DATA", str(cohort))
    assert len(ovq.find_or_make_slices(16).train) == 48
    monkeypatch.delenv("OASIS_VQ_DATA")
    monkeypatch.setenv("OASIS_VQ_PHANTOM", str(tmp_path))
    index = ovq.find_or_make_slices(16)
    assert index.root == tmp_path / "phantom16-24" and index.train.num_subjects == 20
