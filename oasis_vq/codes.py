"""The codes of slices: made by a VQ-VAE, kept in a codes.npz, learned by a prior."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from oasis_vq.config import Augmentation
from oasis_vq.files import write_whole
from oasis_vq.slices import SPLITS, SliceIndex, Slices
from oasis_vq.streams import epoch_orders, make_dataset
from oasis_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Codes:
    """The codes of slices, and whose they are, as parallel arrays of length n.

    Attributes:
        codes: (n, h, w) int32.
        slice_index: (n,) int32, slice position.
        label: (n,) int32, class, -1 where unknown.
        subject: (n,) str.
        split: (n,) str, train, validate or test.
    """

    codes: np.ndarray
    slice_index: np.ndarray
    label: np.ndarray
    subject: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows) -> "Codes":
        """Return the rows of a slice object, an index array or a boolean mask."""
        return Codes(**{name: values[rows] for name, values in vars(self).items()})

    def save(self, path: str | Path) -> None:
        """Write a codes.npz, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **vars(self))
        write_whole(Path(path), content.getvalue())

    @staticmethod
    def load(path: str | Path) -> "Codes":
        """Read a codes.npz."""
        with np.load(path, allow_pickle=False) as arrays:
            return Codes(**{"split": np.full(len(arrays["codes"]), ""), **arrays})


def encode_slices(
    vqvae: VQVAE, slices: Slices, *, split: str = "", augmentation: Augmentation | None = None, view: int = 0
) -> Codes:
    """Return the codes of all slices; they are streamed from disk, and only the codes stay in memory.

    Args:
        vqvae: the encoder.
        slices: what to encode.
        split: what the table calls them.
        augmentation: changes to the slices before they are encoded, but no upside-down copies.
        view: number of the random changes: the same view has the same ones.
    """
    reading = {"image_size": vqvae.config.image_size, "fit": vqvae.config.fit, "batch_size": 64}
    order = np.arange(len(slices))
    if augmentation is not None:
        reading |= {"augmentation": augmentation, "shuffle": True, "first_epoch": view}
        # Only shuffled streams are augmented: this is the order of that one, which is undone below.
        order = np.array(list(epoch_orders(len(slices), first_epoch=view).as_numpy_iterator()))
    dataset = make_dataset(slices, **reading)
    batches = tqdm(dataset.as_numpy_iterator(), "encoding", len(dataset), unit="batch", leave=False)
    codes, done = np.empty((len(slices), *vqvae.config.grid_shape), np.int32), 0  # once: they can be gigabytes
    for images in batches:
        codes[order[done : done + len(images)]] = vqvae.encode(images)
        done += len(images)
    names = np.full(len(slices), split, dtype="U8")
    return Codes(codes, slices.slice, slices.label, slices.subject, names)


def encode_views(vqvae: VQVAE, slices: Slices, augmentation: Augmentation, num_views: int) -> Codes:
    """Return the codes of all slices as they are, and after them those of further views, each with its own changes."""
    views = [None, *[augmentation] * (num_views - 1)]
    return _joined([encode_slices(vqvae, slices, augmentation=how, view=view) for view, how in enumerate(views)])


def encode_index(vqvae: VQVAE, index: SliceIndex, splits: tuple[str, ...] = SPLITS) -> Codes:
    """Return the codes of several splits in one table."""
    return _joined([encode_slices(vqvae, index.splits()[split], split=split) for split in splits])


def _joined(parts: list[Codes]) -> Codes:
    if len(parts) == 1:
        return parts[0]
    return Codes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})
