"""Slices on disk in the OASIS layout, and the tf.data streams made of them.

Layout: `keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png`; a subject is in exactly one split.
"""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

SPLITS = ("train", "validate", "test")
_NAME = re.compile(r"case_(\d+)_slice_(\d+)(\.nii)?\.png")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff"}
_EXAMPLE = "keras_png_slices_train/case_001_slice_0.nii.png"


@dataclass(frozen=True)
class Slices:
    """A table of slices, one row each, as parallel arrays of length n; rows are taken as from an array.

    Attributes:
        root: the data folder.
        path: (n,) str, the files.
        subject: (n,) str, who is shown.
        slice: (n,) int32, position from inferior (0) to superior.
        label: (n,) int32, class, -1 where unknown.
    """

    root: Path
    path: np.ndarray
    subject: np.ndarray
    slice: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows) -> "Slices":
        """Return the rows of a slice object, an index array or a boolean mask."""
        return Slices(self.root, self.path[rows], self.subject[rows], self.slice[rows], self.label[rows])

    @property
    def num_subjects(self) -> int:
        """How many subjects there are."""
        return len(np.unique(self.subject))

    def fingerprint(self) -> str:
        """Return a hash of the files' names and sizes, wherever the data folder is; no file is read."""
        files = (f"{Path(path).name} {Path(path).stat().st_size}" for path in self.path)
        return hashlib.sha256("\n".join(files).encode()).hexdigest()


@dataclass(frozen=True)
class SliceIndex:
    """The slices of a data folder by split."""

    root: Path
    train: Slices
    validate: Slices
    test: Slices

    def __str__(self) -> str:
        counts = (f"{split} {len(part)} of {part.num_subjects} subjects" for split, part in self.splits().items())
        return f"{self.root.name}: slices: " + ", ".join(counts)

    def splits(self) -> dict[str, Slices]:
        """Return the three splits by name."""
        return {split: getattr(self, split) for split in SPLITS}


def find_slices(folder: str | Path) -> SliceIndex:
    """List the slices of a data folder, sorted by subject and slice position; nothing is decoded.

    Raises:
        FileNotFoundError: if a split's folder is missing or has no slices.
        ValueError: if a file is named outside the layout, or a subject is in two splits.
    """
    root = Path(folder)
    index = SliceIndex(root, *(_find_split(root, split) for split in SPLITS))
    split_of: dict[str, str] = {}
    for split, part in index.splits().items():
        for subject in np.unique(part.subject):
            if subject in split_of:
                raise ValueError(
                    f"Subject {subject} is in {split_of[subject]} and in {split} of {root}. A subject belongs to "
                    "exactly one split: move all of its slices to one of the two folders."
                )
            split_of[str(subject)] = split
    return index


def _find_split(root: Path, split: str) -> Slices:
    folder = root / f"keras_png_slices_{split}"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    rows = []
    for file in files:
        if file.name.startswith(".") or file.suffix.lower() not in _IMAGE_SUFFIXES:
            continue
        match = _NAME.fullmatch(file.name)
        if not match:
            raise ValueError(
                f"{file} is named outside the layout. Expected a name like case_001_slice_0.nii.png: "
                "rename it or move it away."
            )
        rows.append((match[1], int(match[2]), str(file)))
    if not rows:
        raise FileNotFoundError(
            f"No PNG slices in {folder}. Expected {_EXAMPLE} and the like in {root} (README, 'Data'), "
            "or run: python -m oasis_vq phantom --out data/phantom256"
        )
    subjects, positions, paths = zip(*sorted(rows), strict=True)
    return Slices(
        root,
        np.array(paths),
        np.array(subjects),
        np.array(positions, dtype=np.int32),
        np.full(len(paths), -1, dtype=np.int32),
    )


def check_readable(slices: Slices) -> None:
    """Decode every slice once, as training will, so that a bad file is named before a long job starts.

    Takes a few seconds for thousands.

    Raises:
        ValueError: naming the first file that is not a readable, square PNG.
    """

    def fault(path: str) -> str | None:
        try:
            height, width, _ = tf.io.decode_png(tf.io.read_file(path), channels=1).shape
        except tf.errors.OpError as error:
            return f"it cannot be decoded ({error.message.splitlines()[0]})"
        return None if height == width else f"it is {height} by {width} pixels"

    with ThreadPoolExecutor() as pool:
        faults = pool.map(fault, slices.path)
        for path, text in zip(slices.path, tqdm(faults, "checking", len(slices), leave=False), strict=True):
            if text:
                raise ValueError(f"{path}: {text}. Expected a square 8-bit grey PNG: replace the file or remove it.")


def epoch_orders(num_items: int, *, seed: int = 0, first_epoch: int = 0) -> tf.data.Dataset:
    """Return a dataset of all indices below `num_items`; each pass over it gives the next epoch's order.

    The order is a function of (seed, epoch) alone: a run resumed at epoch k sees what it would have seen.
    """
    epoch = first_epoch

    def order() -> Iterator[np.ndarray]:
        nonlocal epoch
        shuffled = np.random.default_rng([seed, epoch]).permutation(num_items)
        epoch += 1
        yield shuffled

    orders = tf.data.Dataset.from_generator(order, output_signature=tf.TensorSpec((num_items,), tf.int64))
    indices = orders.flat_map(tf.data.Dataset.from_tensor_slices)
    return indices.apply(tf.data.experimental.assert_cardinality(num_items))


def make_dataset(
    slices: Slices, *, image_size: int, batch_size: int = 32, shuffle: bool = False, seed: int = 0, first_epoch: int = 0
) -> tf.data.Dataset:
    """Stream slices from disk in batches; never more than a few batches are in memory.

    Args:
        slices: what to read.
        image_size: height and width of the images; files of another size are resized by area.
        batch_size: images per batch; the last batch of a pass may be smaller.
        shuffle: whether every pass has another order, a function of (seed, epoch).
        seed: seed of the order.
        first_epoch: epoch of the first pass.

    Returns:
        Dataset of (batch, image_size, image_size, 1), float32 in [0, 1].
    """
    paths = tf.constant(slices.path)
    if shuffle:
        indices = epoch_orders(len(slices), seed=seed, first_epoch=first_epoch)
    else:
        indices = tf.data.Dataset.range(len(slices))

    def read(index: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_png(tf.io.read_file(paths[index]), channels=1)  # (height, width, 1) uint8
        image = tf.cast(image, tf.float32) / 255.0
        image = tf.cond(
            tf.reduce_all(tf.shape(image)[:2] == image_size),
            lambda: image,
            lambda: tf.image.resize(image, (image_size, image_size), method="area"),
        )
        return tf.ensure_shape(image, (image_size, image_size, 1))

    return indices.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size).prefetch(tf.data.AUTOTUNE)


def load_images(slices: Slices, *, image_size: int) -> np.ndarray:
    """Read a few slices into memory.

    Returns:
        (n, image_size, image_size, 1), float32 in [0, 1].
    """
    return np.concatenate(list(make_dataset(slices, image_size=image_size).as_numpy_iterator()))
