"""What a prior finds unusual: where in a slice, and which slices.

That unlikely codes betray what is not healthy is of Marimont and Tarroni 2021, Anomaly detection through latent space
restoration using vector quantized variational autoencoders, arXiv:2012.06765. They count codes above a threshold; here
a slice is as unusual as its most unlikely codes, and maps compare codes with what is usual at their place.
"""

from dataclasses import replace

import numpy as np
from scipy.ndimage import uniform_filter
from sklearn.metrics import roc_auc_score

from oasis_vq.codes import Codes, encode_slices
from oasis_vq.evaluation import code_scores
from oasis_vq.metrics import BRAIN_THRESHOLD
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.slices import SliceIndex
from oasis_vq.streams import load_images
from oasis_vq.vqvae import VQVAE

NUM_SLICES_AROUND = 2
"""Slice positions below and above that count as like a slice."""
UNLIKELY_SHARE = 1 / 32
"""Share of the codes of a slice, the dearest, that make its score."""


class Surprise:
    """How many bits more than usual the codes of a slice cost, where they are.

    Args:
        prior: gives the bits.
        usual: codes of healthy slices that the prior was not trained on, of several people. What is usual is taken at
            each grid position from slices at nearly the same slice position.
    """

    def __init__(self, prior: PixelCNN, usual: Codes):
        self.prior = prior
        self.bits, _ = code_scores(prior, usual)
        self.positions = usual.slice_index

    def maps(self, codes: Codes) -> np.ndarray:
        """Return (n, h, w): bits above the usual mean, over the usual deviation plus 1 bit, averaged over 3x3 codes."""
        bits, _ = code_scores(self.prior, codes)
        maps = np.empty_like(bits)
        for position in np.unique(codes.slice_index):
            near = np.abs(self.positions - position) <= NUM_SLICES_AROUND
            usual = self.bits[near] if near.any() else self.bits
            rows = codes.slice_index == position
            # Plus one: the background never varies.
            maps[rows] = (bits[rows] - usual.mean(axis=0)) / (usual.std(axis=0) + 1.0)
        return uniform_filter(maps, size=(1, 3, 3), mode="nearest")

    def scores(self, codes: Codes) -> np.ndarray:
        """Return (n,): bits a code of the dearest codes of each slice, mean over `UNLIKELY_SHARE` of all.

        On IXI validation slices this told planted lesions from clean ones better than anything taken from the maps.
        """
        bits, _ = code_scores(self.prior, codes)
        ordered = np.sort(bits.reshape(len(bits), -1), axis=1)
        return ordered[:, -max(1, round(UNLIKELY_SHARE * ordered.shape[1])) :].mean(axis=1)


def plant_lesions(images: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Put one to three soft spots, bright or dark, into the brain of each image: a stand-in for lesions.

    Args:
        images: (n, size, size, 1) in [0, 1].
        seed: of places, sizes and brightness.

    Returns:
        The images with the spots, and where they are: (n, size, size, 1), from 0 to 1. A slice without brain stays
        as it is.
    """
    generator = np.random.default_rng(seed)
    size = images.shape[1]
    rows, columns = np.mgrid[:size, :size]
    spots = np.zeros_like(images)
    changed = images.copy()
    for number, image in enumerate(images[..., 0]):
        brain = np.argwhere(image > BRAIN_THRESHOLD)
        for _ in range(generator.integers(1, 4)):
            radius, bright = generator.uniform(0.03, 0.06) * size, generator.random() < 0.5
            if not len(brain):
                continue
            row, column = brain[generator.integers(len(brain))]
            distance = np.hypot(rows - row, columns - column)
            spot = np.clip(1.5 - distance / radius, 0, 1) * (image > BRAIN_THRESHOLD)
            spots[number, ..., 0] = np.maximum(spots[number, ..., 0], spot)
            changed[number, ..., 0] += spot * ((0.95 if bright else 0.1) - changed[number, ..., 0])
    return changed, spots


def find_lesions(prior: PixelCNN, vqvae: VQVAE, index: SliceIndex, *, num: int = 50, seed: int = 0) -> dict:
    """Plant lesions in some test slices, leave as many others clean, and see whether the prior tells them apart.

    Args:
        prior: is surprised.
        vqvae: whose codes it knows.
        index: test for the slices, validate for what is usual.
        num: slices of either kind at most, at least 2; slices that are less than a tenth brain are left out.
        seed: of the choice and the lesions.

    Returns:
        `auroc`: probability that a slice with a lesion has the higher score of the two, float; beside it as arrays
        `scores` (2 num,), `planted` (2 num,) bool, `maps` (2 num, h, w), `images` (2 num, size, size, 1) with the
        lesions in, `spots` likewise, where they are.

    Raises:
        ValueError: if there are fewer than four slices, two of either kind.
    """
    reading = {"image_size": vqvae.config.image_size, "fit": vqvae.config.fit}
    order = np.random.default_rng(seed).permutation(len(index.test))
    rows, images = [], []
    for row in order:
        image = load_images(index.test[row : row + 1], **reading)
        if (image > BRAIN_THRESHOLD).mean() >= 0.1:
            rows.append(row)
            images.append(image)
        if len(rows) == 2 * num:
            break
    if len(rows) < 4:
        raise ValueError(f"Half of at least 4 test slices with brain get lesions. Received: {len(rows)}, num={num}.")
    half = len(rows) // 2
    rows, images = np.array(rows[: 2 * half]), np.concatenate(images[: 2 * half])
    images[:half], spots = plant_lesions(images[:half], seed=seed)
    chosen = index.test[rows]
    codes = Codes(vqvae.encode(images), chosen.slice, chosen.label, chosen.subject, np.full(len(rows), "test"))
    if prior.drafter:
        codes = replace(codes, draft=prior.drafter.of_images(images))
    surprise = Surprise(prior, encode_slices(vqvae, index.validate, drafter=prior.drafter))
    maps, scores, planted = surprise.maps(codes), surprise.scores(codes), np.arange(len(rows)) < half
    return {
        "auroc": float(roc_auc_score(planted, scores)),
        "scores": scores,
        "planted": planted,
        "maps": maps,
        "images": images,
        "spots": np.concatenate([spots, np.zeros_like(spots)]),
    }
