"""What a prior finds unusual: where in a slice, and which slices.

Source: Marimont and Tarroni 2021, Anomaly detection through latent space restoration using vector quantized
variational autoencoders, arXiv:2012.06765.
"""

import numpy as np
from scipy.ndimage import uniform_filter

from oasis_vq.codes import Codes
from oasis_vq.evaluation import code_scores
from oasis_vq.metrics import BRAIN_THRESHOLD
from oasis_vq.pixelcnn import PixelCNN

NUM_SLICES_AROUND = 2
"""Slice positions below and above that count as like a slice."""


class Surprise:
    """How many bits more than usual the codes of a slice cost, where they are.

    Args:
        prior: gives the bits.
        usual: codes of healthy slices that the prior was not trained on, of several people.

    Source: as the module; what is usual is taken at each grid position from slices at nearly the same slice position.
    """

    def __init__(self, prior: PixelCNN, usual: Codes):
        self.prior = prior
        self.bits, _ = code_scores(prior, usual)
        self.positions = usual.slice_index

    def maps(self, codes: Codes) -> np.ndarray:
        """Return (n, h, w): bits above the usual mean, in usual standard deviations, over 3x3 neighbours."""
        bits, _ = code_scores(self.prior, codes)
        maps = np.empty_like(bits)
        for position in np.unique(codes.slice_index):
            near = np.abs(self.positions - position) <= NUM_SLICES_AROUND
            usual = self.bits[near] if near.any() else self.bits
            rows = codes.slice_index == position
            # One bit more than the deviation: the background never varies.
            maps[rows] = (bits[rows] - usual.mean(axis=0)) / (usual.std(axis=0) + 1.0)
        return uniform_filter(maps, size=(1, 3, 3), mode="nearest")

    def scores(self, codes: Codes) -> np.ndarray:
        """Return (n,): how unusual each slice is at its most unusual place."""
        return self.maps(codes).max(axis=(1, 2))


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
