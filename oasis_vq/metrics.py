"""Scores of reconstructions: arrays in, numbers out.

SSIM is skimage's `structural_similarity` with its default 7x7 window and data_range 1 (Wang et al. 2004); a brain
slice is three quarters black and an all-black image scores about 0.7, so the brain-masked scores stand beside it.
"""

import numpy as np
from skimage.metrics import structural_similarity

BRAIN_THRESHOLD = 0.05
"""Intensity above which a pixel of the reference counts as brain."""
WINDOW = 7
"""Side of SSIM's window, in pixels."""


def ssim_per_image(references: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return SSIM over all pixels, and over the brain, of each image.

    Args:
        references: (n, size, size, 1), float in [0, 1].
        images: the same shape, compared with them.

    Returns:
        ssim (n,) and brain_ssim (n,), the mean of the SSIM map over pixels whose reference exceeds 0.05; NaN where
        there are none.

    Raises:
        ValueError: as all scores here, if the images are not such; and if they are smaller than the window.
    """
    _check(references, images)
    if min(references.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels or more. Received: images {references.shape}.")
    whole, brain = np.empty(len(references)), np.full(len(references), np.nan)
    for number, (reference, image) in enumerate(zip(references[..., 0], images[..., 0], strict=True)):
        options = {"data_range": 1.0, "full": True, "win_size": WINDOW}
        whole[number], similarity = structural_similarity(reference, image, **options)
        mask = reference > BRAIN_THRESHOLD
        if mask.any():
            brain[number] = similarity[mask].mean()
    return whole, brain


def squared_errors(references: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each image, the mean squared error, the sum of squared errors in the brain, and its pixel count."""
    _check(references, images)
    errors = (references.astype(np.float64) - images) ** 2
    mask = references > BRAIN_THRESHOLD
    axes = (1, 2, 3)
    return errors.mean(axis=axes), (errors * mask).sum(axis=axes), mask.sum(axis=axes)


def ssim(references: np.ndarray, images: np.ndarray) -> float:
    """Return the mean SSIM of images (n, size, size, 1) in [0, 1]."""
    return float(ssim_per_image(references, images)[0].mean())


def brain_ssim(references: np.ndarray, images: np.ndarray) -> float:
    """Return the mean SSIM over brain pixels of images (n, size, size, 1) in [0, 1]; NaN without any brain."""
    brain = ssim_per_image(references, images)[1]
    return float(np.nanmean(brain)) if np.isfinite(brain).any() else float("nan")


def psnr(references: np.ndarray, images: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, from the mean squared error of all images together."""
    return decibels(squared_errors(references, images)[0].mean())


def brain_psnr(references: np.ndarray, images: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB over the brain pixels of all images together."""
    _, sums, counts = squared_errors(references, images)
    return decibels(sums.sum() / counts.sum()) if counts.sum() else float("nan")


def decibels(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1]; infinite without error."""
    return float(-10 * np.log10(mean_squared_error)) if mean_squared_error else float("inf")


def _check(references: np.ndarray, images: np.ndarray) -> None:
    if references.shape != images.shape or references.ndim != 4 or references.shape[-1] != 1:
        raise ValueError(f"Both are (n, size, size, 1). Received: {references.shape} and {images.shape}.")
    if not all(np.issubdtype(one.dtype, np.floating) for one in (references, images)):
        raise ValueError(f"Both are float. Received: {references.dtype} and {images.dtype}.")
    if references.size and not (references.min() >= 0 and references.max() <= 1):
        raise ValueError(f"References are in [0, 1]. Received: {references.min()} to {references.max()}.")
