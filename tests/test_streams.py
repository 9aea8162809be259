"""Streams: the files' pixels, in an order that seed and epoch decide, from PNG or from the cache alike."""

import os
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest

import oasis_vq as ovq


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_VQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def batches(dataset):
    return [batch.numpy() for batch in dataset]


def stream(slices, **options):
    """Return one pass as one array."""
    options = {"image_size": 64, "batch_size": 7, **options}
    return np.concatenate(batches(ovq.make_dataset(slices, **options)))


def test_images_are_the_files_in_zero_to_one(index):
    images = ovq.load_images(index.train[:3], image_size=64)
    assert images.shape == (3, 64, 64, 1) and images.dtype == np.float32
    for path, image in zip(index.train.path, images, strict=False):
        np.testing.assert_array_equal(np.rint(image[..., 0] * 255).astype(np.uint8), iio.imread(path))


def test_resizing_keeps_the_mean_and_the_order(index):
    full, half = (ovq.load_images(index.train[:5], image_size=size) for size in (64, 32))
    expected = full.reshape(5, 32, 2, 32, 2, 1).mean(axis=(2, 4))
    np.testing.assert_allclose(half, expected, atol=0.5 / 255 + 1e-6)  # 8 bits again
    assert abs(half.mean() - full.mean()) < 1e-4


def test_order_is_a_function_of_seed_and_epoch(index):
    def epochs(count, **options):
        dataset = ovq.make_dataset(index.train, image_size=16, batch_size=48, shuffle=True, **options)
        return [batches(dataset)[0] for _ in range(count)]

    first, second, third = epochs(3, seed=1)
    np.testing.assert_array_equal(np.stack(epochs(3, seed=1)), np.stack([first, second, third]))
    assert not np.array_equal(first, second) and not np.array_equal(first, epochs(1, seed=2)[0])
    np.testing.assert_array_equal(epochs(1, seed=1, first_epoch=2)[0], third)
    np.testing.assert_allclose(np.sort(first.sum((1, 2, 3))), np.sort(second.sum((1, 2, 3))))  # all slices, once


def test_a_batch_that_is_never_filled_is_refused(index):
    with pytest.raises(ValueError, match="A batch of 64 is not filled by 48 items"):
        ovq.make_dataset(index.train, image_size=32, batch_size=64, shuffle=True, part=(0, 2))


def test_last_batch_is_kept(index):
    dataset = ovq.make_dataset(index.train, image_size=16, batch_size=20, shuffle=True)
    assert len(dataset) == 3 and [len(batch) for batch in batches(dataset)] == [20, 20, 8]


def test_images_that_are_not_square_are_padded_or_stretched(adni):
    slices = ovq.find_slices(adni).train[:6]
    files = np.stack([iio.imread(path) for path in slices.path]) / 255  # (6, 48, 60)
    padded = stream(slices, image_size=60)[..., 0]
    assert padded.shape == (6, 60, 60) and not padded[:, :6].any() and not padded[:, 54:].any()
    np.testing.assert_allclose(padded[:, 6:54], files, atol=3 / 255)  # two JPEG decoders differ a little
    stretched = stream(slices, image_size=30, fit="stretch")[..., 0]
    assert stretched.shape == (6, 30, 30)
    assert abs(stretched.mean() - files.mean()) < 0.01 and abs(padded.mean() - files.mean() * 0.8) < 0.01


def test_conditions_belong_to_their_images(adni):
    index = ovq.find_slices(adni)
    options = {"image_size": 60, "batch_size": 9, "shuffle": True, "conditions": True}
    plain = {image.tobytes(): row for row, image in enumerate(stream(index.train, image_size=60))}
    for images, given in ovq.make_dataset(index.train, **options):
        rows = [plain[image.tobytes()] for image in images.numpy()]
        assert given["slice_index"].numpy().tolist() == index.train.slice[rows].tolist()
        assert given["label"].numpy().tolist() == index.train.label[rows].tolist()


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 3}, {"image_size": 24}])
def test_cache_gives_the_same_batches(index, cache_folder, options):
    plain = stream(index.train, **options)
    for _ in range(2):  # made, then found
        np.testing.assert_array_equal(stream(index.train, cache=True, **options), plain)
    assert len(list(cache_folder.iterdir())) == 1


def test_cache_of_images_that_are_not_square(adni):
    slices = ovq.find_slices(adni).train
    for fit in ("pad", "stretch"):
        np.testing.assert_array_equal(stream(slices, fit=fit, cache=True), stream(slices, fit=fit))


def test_cache_is_made_anew_when_a_file_changes(copied, cache_folder):
    slices = ovq.find_slices(copied).train
    stream(slices, cache=True)
    (before,) = cache_folder.iterdir()
    content = iio.imread(slices.path[5])
    iio.imwrite(slices.path[5], content[::-1])
    os.utime(slices.path[5], ns=(1, 1))
    np.testing.assert_array_equal(stream(slices, cache=True)[5, ..., 0], content[::-1] / np.float32(255))
    (after,) = cache_folder.iterdir()  # the old one is gone
    assert after != before


def test_half_a_cache_is_never_read(index, cache_folder):
    stream(index.train, cache=True)
    (file,) = cache_folder.iterdir()
    whole = file.read_bytes()
    half, other = (cache_folder / f".{file.name}.{number}.partial" for number in (1, 2))
    half.write_bytes(whole[: len(whole) // 2])
    os.utime(half, (1, 1))  # killed long ago
    other.write_bytes(whole[: len(whole) // 2])  # another process is at it
    file.unlink()
    np.testing.assert_array_equal(stream(index.train, cache=True), stream(index.train))
    assert {path.name for path in cache_folder.iterdir()} == {file.name, other.name} and file.read_bytes() == whole


CACHING = """
import sys
import numpy as np
from oasis_vq.runtime import start_tensorflow; start_tensorflow()
import oasis_vq as ovq
train = ovq.find_slices(sys.argv[1]).train[np.zeros(40_000, int)]
ovq.cached_images(train, image_size=64)
"""


def test_a_process_killed_while_caching_leaves_nothing_that_is_taken_for_a_cache(cohort, cache_folder):
    process = subprocess.Popen([sys.executable, "-c", CACHING, cohort])
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 10**6 for file in cache_folder.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    assert [path.suffix for path in cache_folder.iterdir()] == [".partial"]


def test_cache_without_room_says_how_much_it_needs(index, monkeypatch, tmp_path):
    huge = ovq.Slices(index.root, *(np.repeat(values, 10**5) for values in (
        index.train.path[:1], index.train.subject[:1], index.train.slice[:1], index.train.label[:1])))  # fmt: skip
    monkeypatch.setattr(ovq.Slices, "fingerprint", lambda *_, **__: "f" * 64)  # so many stats take a while
    with pytest.raises(OSError, match=r"takes \d+ MB, and .*cache has \d+ MB free. Choose another folder by OASIS"):
        ovq.cached_images(huge, image_size=16384)


def test_upside_down_copies_double_the_set(index):
    augmentation = ovq.Augmentation(upside_down_copies=True)
    images = stream(index.train, shuffle=True, augmentation=augmentation)
    expected = stream(index.train)
    assert len(images) == 2 * len(expected)
    both = {image.tobytes() for image in (*expected, *expected[:, ::-1])}
    assert {image.tobytes() for image in images} == both


def test_random_changes_are_drawn_anew_in_each_epoch_and_again_on_resuming(index):
    augmentation = ovq.Augmentation(flip_left_right=True, max_shift=5)

    def epochs(count, **options):
        dataset = ovq.make_dataset(
            index.train, image_size=64, batch_size=9, shuffle=True, augmentation=augmentation, **options
        )
        return [np.concatenate(batches(dataset)) for _ in range(count)]

    first, second = epochs(2)
    np.testing.assert_array_equal(epochs(1, first_epoch=1)[0], second)
    np.testing.assert_array_equal(epochs(1, cache=True)[0], first)
    plain = stream(index.train, shuffle=True)
    flips, shifts = 0, set()
    for image, original in zip(first, plain, strict=True):
        padded = np.pad(original, ((5, 5), (5, 5), (0, 0)))
        found = [
            (flipped, dy, dx)
            for flipped in (False, True)
            for dy in range(11)
            for dx in range(11)
            if np.array_equal(image, (padded[:, ::-1] if flipped else padded)[dy : dy + 64, dx : dx + 64])
        ]
        assert found  # some flip and some shift explain the image
        flips += found[0][0]
        shifts.add(found[0][1:])
    assert 8 < flips < 40 and len(shifts) > 20  # of 48


def test_augmentation_is_for_training(index):
    with pytest.raises(ValueError, match="use shuffle=True"):
        ovq.make_dataset(index.train, image_size=16, augmentation=ovq.Augmentation(max_shift=1))
    with pytest.raises(ValueError, match="max_shift is below image_size"):
        ovq.make_dataset(index.train, image_size=16, shuffle=True, augmentation=ovq.Augmentation(max_shift=16))
    with pytest.raises(ValueError, match=r"max_shift is at least 0. Received: -1"):
        ovq.Augmentation(max_shift=-1)
    with pytest.raises(ValueError, match=r"fit is 'pad' or 'stretch'.*padd"):
        ovq.make_dataset(index.train, image_size=16, fit="padd")
