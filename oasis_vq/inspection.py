"""What codes stand for: where they fire, what they decode to, which are near one another. Arrays in, arrays out."""

import numpy as np


def code_positions(codes: np.ndarray, num_embeddings: int) -> np.ndarray:
    """Return in what share of the images each code stands at each position of the grid.

    Args:
        codes: (n, h, w), int in [0, num_embeddings).
        num_embeddings: codes that there are, K.

    Returns:
        (num_embeddings, h, w), float64 in [0, 1]. The shares of all codes at a position sum to 1; those of one code
        over all positions are how often it stands in an image.

    Raises:
        ValueError: if the codes are not (n, h, w) integers in [0, num_embeddings), or none.
    """
    codes = _checked(codes, num_embeddings)
    shares = np.zeros((num_embeddings, *codes.shape[1:]))
    for row, column in np.ndindex(codes.shape[1:]):
        shares[:, row, column] = np.bincount(codes[:, row, column], minlength=num_embeddings) / len(codes)
    return shares


def code_patches(codes: np.ndarray, images: np.ndarray, num_embeddings: int) -> np.ndarray:
    """Return the mean patch of the images over all places where each code stands.

    With the images that the codes decode to, it is what each code decodes to among the neighbours it really has; alone
    in an empty grid a code of tissue decodes to almost nothing. With the slices that were encoded, it is what each code
    stands for.

    Args:
        codes: (n, h, w), int in [0, num_embeddings).
        images: (n, size, size, 1), float in [0, 1]; size is a multiple p of h and of w, p pixels to a code.
        num_embeddings: codes that there are, K.

    Returns:
        (num_embeddings, p, p, 1), float32 in [0, 1]. NaN for a code that does not occur.

    Raises:
        ValueError: as `code_positions`, or if the images do not belong to the codes.
    """
    codes, images = _checked(codes, num_embeddings), np.asarray(images)
    num_images, height, width = codes.shape
    side = images.shape[1] // height if images.ndim == 4 else 0
    if side == 0 or images.shape != (num_images, height * side, width * side, 1):
        raise ValueError(
            "Images are (n, size, size, 1), one for each grid of codes, size a multiple of the grid's sides. "
            f"Received: {images.shape} beside codes {codes.shape}."
        )
    pixels = images.reshape(num_images, height, side, width, side)
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    sums = np.zeros((num_embeddings, side, side, 1))
    for row, column in np.ndindex(side, side):
        sums[:, row, column, 0] = np.bincount(codes.ravel(), pixels[:, :, row, :, column].ravel(), num_embeddings)
    counts = counts[:, None, None, None]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0).astype(np.float32)


def swap_codes(codes: np.ndarray, first: int, second: int) -> np.ndarray:
    """Return codes (...), int, in which `first` stands wherever `second` stood, and the other way round."""
    codes = np.asarray(codes)
    return np.where(codes == first, second, np.where(codes == second, first, codes)).astype(codes.dtype)


def neighbour_codes(codebook: np.ndarray) -> np.ndarray:
    """Return all codes in the order of their distance from each code.

    `neighbour_codes(codebook)[codes, rank]` replaces each of the codes by its neighbour of this rank.

    Args:
        codebook: (num_embeddings, embedding_dim), float.

    Returns:
        (num_embeddings, num_embeddings), int32: in row k the code k itself, then the nearest other one, at last the
        farthest, whether they are in use or not. Ties go to the lower index.
    """
    codebook = np.asarray(codebook, np.float64)
    squares = np.sum(codebook**2, axis=1)
    distances = squares[:, None] + squares - 2 * codebook @ codebook.T  # (k, k), squared
    np.fill_diagonal(distances, -np.inf)  # a twin with a lower index does not come before the code itself
    return np.argsort(distances, axis=1, kind="stable").astype(np.int32)


def codebook_map(codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each code's place in the plane in which the codebook's vectors vary most.

    Args:
        codebook: (num_embeddings, embedding_dim), float; at least two of each.

    Returns:
        (num_embeddings, 2), float64, centred: the first and the second principal component, each with the sign that
        makes its largest weight positive; and the share of the variance that each of them holds, (2,) in [0, 1].

    Raises:
        ValueError: if the codebook is smaller, or all its vectors are equal.

    Source: principal component analysis, Hotelling 1933, by the singular values of the centred codebook.
    """
    codebook = np.asarray(codebook, np.float64)
    if codebook.ndim != 2 or min(codebook.shape) < 2 or not np.ptp(codebook, axis=0).any():
        raise ValueError(
            "A map needs two or more vectors of two or more numbers that are not all equal. "
            f"Received: {codebook.shape} with a standard deviation of {codebook.std():.3g}."
        )
    centred = codebook - codebook.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    return centred @ axes.T, lengths[:2] ** 2 / np.sum(lengths**2)


def _checked(codes: np.ndarray, num_embeddings: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 3 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"Codes are (n, h, w) integers. Received: {codes.shape} {codes.dtype}.")
    if codes.min() < 0 or codes.max() >= num_embeddings:
        raise ValueError(f"Codes are in [0, {num_embeddings}). Received: {codes.min()} to {codes.max()}.")
    return codes
