"""The codes of slices: made by a VQ-VAE, kept in a codes.npz while a prior learns them."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from oasis_vq.config import Augmentation
from oasis_vq.files import write_whole
from oasis_vq.pixelcnn import Drafter
from oasis_vq.slices import SPLITS, SliceIndex, Slices
from oasis_vq.streams import epoch_orders, make_dataset
from oasis_vq.vqvae import VQVAE


@dataclass(frozen=True)
class Codes:
    """The codes of slices, and whose they are, as parallel arrays of length n.

    Attributes:
        codes: (n, h, w) int32; in fewer bytes where `encode_slices` was asked for that.
        slice_index: (n,) int32, slice position.
        label: (n,) int32, class, -1 where unknown.
        subject: (n,) str.
        split: (n,) str, train, validate or test.
        coarse, draft: (n, H, W) and (n, h, w) int32, the codes of a coarser VQ-VAE and what `Drafter` makes of them, or
            None.
    """

    codes: np.ndarray
    slice_index: np.ndarray
    label: np.ndarray
    subject: np.ndarray
    split: np.ndarray
    coarse: np.ndarray | None = None
    draft: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows) -> "Codes":
        """Return the rows of a slice object, an index array or a boolean mask."""
        return Codes(**{name: values[rows] for name, values in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that there are, by name."""
        return {name: values for name, values in vars(self).items() if values is not None}

    def save(self, path: str | Path) -> None:
        """Write a codes.npz, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays())
        write_whole(Path(path), content.getvalue())

    @staticmethod
    def load(path: str | Path) -> "Codes":
        """Read a codes.npz."""
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Codes(**{"split": np.full(len(arrays["codes"]), ""), **arrays})


def encode_slices(
    vqvae: VQVAE,
    slices: Slices,
    *,
    split: str = "",
    augmentation: Augmentation | None = None,
    view: int = 0,
    drafter: Drafter | None = None,
    compact: bool = False,
) -> Codes:
    """Return the codes of all slices; they are streamed from disk, and only the codes stay in memory.

    Args:
        vqvae: the encoder.
        slices: what to encode.
        split: what the table calls them.
        augmentation: changes to the slices before they are encoded, but no upside-down copies.
        view: number of the random changes: the same view has the same ones.
        drafter: makes the drafts for a prior that refines some.
        compact: whether the codes are in the smallest integers that hold them, not in int32: 20,000 grids of 256x256
            are 5 GB there.
    """
    models = {"codes": vqvae, **({"coarse": drafter.coarse, "draft": vqvae} if drafter else {})}
    grids = {}  # once: they can be gigabytes
    for name, model in models.items():
        dtype = np.min_scalar_type(model.config.num_embeddings - 1) if compact else np.int32
        grids[name] = np.empty((len(slices), *model.config.grid_shape), dtype)
    reading = {"image_size": vqvae.config.image_size, "fit": vqvae.config.fit, "batch_size": 64}
    order = np.arange(len(slices))
    if augmentation is not None:
        reading |= {"augmentation": augmentation, "shuffle": True, "first_epoch": view}
        # Only shuffled streams are augmented: this is the order of that one, which is undone below.
        order = np.array(list(epoch_orders(len(slices), first_epoch=view).as_numpy_iterator()))
    dataset = make_dataset(slices, **reading)
    batches = tqdm(dataset.as_numpy_iterator(), "encoding", len(dataset), unit="batch", leave=False)
    done = 0
    for images in batches:
        rows = order[done : done + len(images)]
        grids["codes"][rows] = vqvae.encode(images)
        if drafter:
            grids["coarse"][rows] = drafter.coarse.encode(images)
            grids["draft"][rows] = drafter.of_codes(grids["coarse"][rows])
        done += len(images)
    names = np.full(len(slices), split, dtype="U8")
    return Codes(slice_index=slices.slice, label=slices.label, subject=slices.subject, split=names, **grids)


def encode_views(
    vqvae: VQVAE, slices: Slices, augmentation: Augmentation, num_views: int, *, drafter: Drafter | None = None
) -> Codes:
    """Return the codes of all slices as they are, and after them those of further views, each with its own changes.

    They are compact, as in `encode_slices`.
    """
    views = [None, *[augmentation] * (num_views - 1)]
    options = {"split": "train", "drafter": drafter, "compact": True}
    return joined([encode_slices(vqvae, slices, augmentation=how, view=view, **options)
                   for view, how in enumerate(views)])  # fmt: skip


def encode_index(vqvae: VQVAE, index: SliceIndex, splits: tuple[str, ...] = SPLITS) -> Codes:
    """Return the codes of several splits in one table."""
    return joined([encode_slices(vqvae, index.splits()[split], split=split) for split in splits])


def joined(parts: list[Codes]) -> Codes:
    """Return the rows of several tables in one."""
    if len(parts) == 1:
        return parts[0]
    return Codes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].arrays()})
