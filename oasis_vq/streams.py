"""Streams of slices for training: from PNG or JPEG files, or a cache of decoded ones, to batches in [0, 1].

Only a few batches are ever in memory. An image is 8-bit until it is batched, also after resizing, so that the cache
holds exactly what the files give.
"""

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.config import Augmentation, Paths
from oasis_vq.slices import Slices

ABANDONED = 3600.0
"""Seconds without a change after which a half-made cache is taken for that of a process that was killed."""


def epoch_orders(
    num_items: int, *, seed: int = 0, first_epoch: int = 0, num_draws: int = 0, endless: int = 0
) -> tf.data.Dataset:
    """Return a dataset of all indices below `num_items`; each pass over it gives the next epoch's order.

    The order is a function of (seed, epoch) alone: a run resumed at epoch k sees what it would have seen.

    Args:
        num_items: how many indices.
        seed: of the orders.
        first_epoch: epoch of the first pass.
        num_draws: if positive, elements are (index, draws) with so many random numbers in [0, 1) each.
        endless: if positive, a batch size: every pass begins at the first epoch and goes on from epoch to epoch, and
            leaves out of each what does not fill a batch.

    Raises:
        ValueError: if there are fewer items than such a batch has.
    """
    if endless > num_items:
        raise ValueError(f"A batch of {endless} is not filled by {num_items} items: use a smaller one.")
    num_used = num_items // endless * endless if endless else num_items
    epoch = first_epoch

    def next_epoch() -> Iterator[int]:
        nonlocal epoch
        epoch += 1
        yield epoch - 1

    def order(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng([seed, epoch])
        indices = generator.permutation(num_items)
        draws = generator.random((num_items, num_draws), np.float32)
        return indices[:num_used], draws[:num_used]

    def items(epoch: tf.Tensor) -> tf.data.Dataset:
        indices, draws = tf.numpy_function(order, [epoch], [tf.int64, tf.float32])
        indices, draws = tf.ensure_shape(indices, (num_used,)), tf.ensure_shape(draws, (num_used, num_draws))
        return tf.data.Dataset.from_tensor_slices((indices, draws) if num_draws else indices)

    if endless:
        return tf.data.Dataset.range(first_epoch, 2**31).flat_map(items)
    epochs = tf.data.Dataset.from_generator(next_epoch, output_signature=tf.TensorSpec((), tf.int64))
    return epochs.flat_map(items).apply(tf.data.experimental.assert_cardinality(num_items))


def part_of_batches(items: tf.data.Dataset, batch_size: int, part: tuple[int, int]) -> tf.data.Dataset:
    """Return batches of items, and of each only one part: (number, count), the first being 0."""
    number, count = part
    size = batch_size // count

    def cut(*batch: tf.Tensor):
        own = tuple(values[number * size : (number + 1) * size] for values in batch)
        return own if len(own) > 1 else own[0]

    return items.batch(batch_size, drop_remainder=True).map(cut)


def make_dataset(
    slices: Slices,
    *,
    image_size: int,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int = 0,
    first_epoch: int = 0,
    fit: str = "pad",
    augmentation: Augmentation | None = None,
    conditions: bool = False,
    cache: bool = False,
    part: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Stream slices from disk in batches.

    Args:
        slices: what to read.
        image_size: height and width of the images; files of another size are resized by area.
        batch_size: images per batch; the last batch of a pass may be smaller.
        shuffle: whether every pass has another order, a function of (seed, epoch).
        seed: seed of the order and of the augmentation.
        first_epoch: epoch of the first pass.
        fit: what becomes of an image that is not square: black borders ('pad') or another shape ('stretch').
        augmentation: changes to the images; their random part is a function of (seed, epoch). Needs `shuffle`.
        conditions: whether a batch is (images, {"slice_index": (batch,), "label": (batch,)}), both int32.
        cache: whether images are read from a file of decoded ones, made first if it is not there (`cached_images`).
        part: (number, count), if only one part of so many of each batch is wanted, the first being 0. A last batch
            that is not whole is then left out, and a shuffled stream goes on with the next epoch instead of ending.

    Returns:
        Dataset of (batch, image_size, image_size, 1), float32 in [0, 1].
    """
    augmentation = augmentation or Augmentation()
    if augmentation.augments and not shuffle:
        raise ValueError("Augmentation is for training streams: use shuffle=True. Received: shuffle=False.")
    if fit not in ("pad", "stretch") or augmentation.max_shift >= image_size:
        raise ValueError(
            "fit is 'pad' or 'stretch', and max_shift is below image_size. "
            f"Received: {fit}, {augmentation.max_shift}, {image_size}."
        )
    num_slices = len(slices)
    copies = 2 if augmentation.upside_down_copies else 1
    if shuffle:
        endless = batch_size if part else 0
        items = epoch_orders(num_slices * copies, seed=seed, first_epoch=first_epoch, num_draws=3, endless=endless)
    else:
        items = tf.data.Dataset.range(num_slices).map(lambda index: (index, tf.zeros(3)))
    if part is not None:
        items, batch_size = part_of_batches(items, batch_size, part).unbatch(), batch_size // part[1]
    given = {"slice_index": tf.constant(slices.slice), "label": tf.constant(slices.label)}

    def finish(indices: tf.Tensor, draws: tf.Tensor, images: tf.Tensor):
        images = tf.ensure_shape(images, (None, image_size, image_size, 1))
        if augmentation.augments:
            images = _augment(images, indices >= num_slices, draws, augmentation)
        images = tf.cast(images, tf.float32) / 255.0
        rows = indices % num_slices
        return (images, {name: tf.gather(values, rows) for name, values in given.items()}) if conditions else images

    if cache:
        stored = cached_images(slices, image_size=image_size, fit=fit)

        def take(indices: tf.Tensor, draws: tf.Tensor):
            return indices, draws, tf.numpy_function(lambda rows: stored[rows], [indices % num_slices], tf.uint8)

        batches = items.batch(batch_size).map(take)
    else:
        paths = tf.constant(slices.path)

        def read(index: tf.Tensor, draws: tf.Tensor):
            return index, draws, read_image(paths[index % num_slices], image_size, fit)

        batches = items.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size)
    return batches.map(finish, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def read_image(path: tf.Tensor | str, image_size: int, fit: str) -> tf.Tensor:
    """Return the image in a file, (image_size, image_size, 1) uint8."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=1, expand_animations=False)  # (height, width, 1)
    return _resized(image, image_size, fit)


@tf.function(reduce_retracing=True, autograph=False)  # traced once, not in each dataset
def _resized(image: tf.Tensor, image_size: int, fit: str) -> tf.Tensor:
    """Return an image (height, width, 1) uint8 as (image_size, image_size, 1) uint8."""
    shape = tf.shape(image)

    def resized() -> tf.Tensor:
        side = tf.reduce_max(shape)
        square = tf.image.resize_with_crop_or_pad(image, side, side) if fit == "pad" else image
        again = tf.image.resize(square, (image_size, image_size), method="area")
        return tf.cast(tf.round(again), tf.uint8)

    image = tf.cond(tf.reduce_all(shape[:2] == image_size), lambda: image, resized)
    return tf.ensure_shape(image, (image_size, image_size, 1))


def _augment(images: tf.Tensor, upside_down: tf.Tensor, draws: tf.Tensor, how: Augmentation) -> tf.Tensor:
    """Return images (b, size, size, 1) with the changes that flags (b,) and random numbers (b, 3) in [0, 1) say."""
    last = float(images.shape[1] - 1)
    mirrored = (draws[:, 0] < 0.5) & how.flip_left_right
    shifts = tf.floor(draws[:, 1:] * (2 * how.max_shift + 1)) - how.max_shift  # (b, 2), whole pixels
    # The pixel at x comes from a x + b, that at y from c y + d: one operation, four times as fast as three.
    a, c = (tf.where(flipped, -1.0, 1.0) for flipped in (mirrored, upside_down))
    b = tf.where(mirrored, last - shifts[:, 1], shifts[:, 1])
    d = tf.where(upside_down, last - shifts[:, 0], shifts[:, 0])
    zero = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a, zero, b, zero, c, d, zero, zero], axis=1),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )


def cached_images(slices: Slices, *, image_size: int, fit: str = "pad") -> np.ndarray:
    """Return decoded slices as a memory-mapped array, (n, image_size, image_size, 1) uint8.

    The file is made in `Paths.cache` when it is not there; one made before a slice was changed is made anew.

    Raises:
        OSError: if the disk has no room for it.
    """
    folder = Paths().cache
    names = [str(Path(path).relative_to(slices.root)) for path in slices.path]
    key = [str(slices.root.resolve()), image_size, fit, *names]
    key = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:12]
    file = folder / f"{slices.root.name}-{image_size}-{key}-{slices.fingerprint(modified=True)[:12]}.npy"
    if not file.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{error}. Choose another folder for the cache by OASIS_VQ_CACHE.") from None
        for old in folder.iterdir():
            outdated = old.name.startswith(f"{slices.root.name}-{image_size}-{key}-") and old != file
            with contextlib.suppress(OSError):  # another process does the same, or reads it on Windows
                if outdated or (old.suffix == ".partial" and time.time() - old.stat().st_mtime > ABANDONED):
                    old.unlink()
        _write_cache(file, slices, image_size=image_size, fit=fit)
    return np.load(file, mmap_mode="r")


def _write_cache(file: Path, slices: Slices, *, image_size: int, fit: str) -> None:
    needed, free = len(slices) * image_size**2, shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            f"The cache of {len(slices)} slices takes {needed / 1e6:.0f} MB, and {file.parent} has {free / 1e6:.0f} MB "
            "free. Choose another folder by OASIS_VQ_CACHE, or do without the cache."
        )
    paths = tf.data.Dataset.from_tensor_slices(slices.path)
    images = paths.map(lambda path: read_image(path, image_size, fit), num_parallel_calls=tf.data.AUTOTUNE)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")  # another process may be making the same
    shape = (len(slices), image_size, image_size, 1)
    try:
        with partial.open("wb") as out, tqdm(desc="caching", total=len(slices), unit="image", leave=False) as progress:
            # Written, not mapped: on a full disk a write is an error, and a mapped page ends the process.
            np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for batch in images.batch(256).prefetch(1).as_numpy_iterator():
                out.write(batch.tobytes())
                progress.update(len(batch))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_images(slices: Slices, *, image_size: int, fit: str = "pad") -> np.ndarray:
    """Read a few slices into memory.

    Returns:
        (n, image_size, image_size, 1), float32 in [0, 1].
    """
    images = [read_image(path, image_size, fit) for path in slices.path]
    return np.stack(images).astype(np.float32) / 255
