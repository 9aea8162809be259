"""Ancestral sampling of code grids from a PixelCNN, one position a step, in one compiled loop.

At each position only that position is computed, and at the start of each row what its positions hear of the rows
above: every layer in which positions meet keeps what it has been given before (`causal.py`). For proof, the whole
network can be run at every position instead: same loop, same draws.

Source: van den Oord et al. 2016a (ancestral sampling); Ramachandran et al. 2017, arXiv:1704.06001 (caching).
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.pixelcnn import CONDITIONS, PixelCNN
from oasis_vq.vqvae import checked_codes

CHUNK_SIZE = 16
"""Samples drawn together, a quarter of them above 64x64 codes. Fixed, so that sample i is the same for any n."""
BAND_SIZE = 64**2
"""Codes of a grid that are drawn in one call of the compiled loop: whole rows, up to about so many."""
FINE_STREAM = 2**30
"""Added to the number of a chunk where drafts are refined, whose coarse grids are drawn from the same seed."""
CONDITION_STREAM = 2**31 - 1
"""Chunk number that no chunk reaches: the seed of the conditions that are not given."""


def sample_codes(
    prior: PixelCNN,
    n: int = CHUNK_SIZE,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    slice_index: int | np.ndarray | None = None,
    label: int | np.ndarray | None = None,
    prefix: np.ndarray | None = None,
    draft: np.ndarray | None = None,
    cached: bool = True,
) -> np.ndarray:
    """Draw code grids from a prior.

    Args:
        prior: the model to draw from.
        n: how many.
        seed: the same seed gives the same samples, and sample i is the same for any n. From -2**62 to below 2**62.
        temperature: the logits are divided by it; below 1 is more likely and less diverse. At least
            1e-6, which draws the most likely codes.
        top_k: if given, only the k most likely codes of each position are drawn from.
        top_p: if given, only the most likely codes that together reach this probability are drawn from. (0, 1].
        slice_index: slice position, one for all or (n,); None draws one for each sample from the seed, -1 is unknown:
            the prior draws without it.
        label: class, likewise.
        prefix: (rows, w) or (n, rows, w) int, leading rows to complete; exact, since the order is raster.
        draft: (n, h, w) int, what a prior that refines drafts is given; None draws coarse grids from the same seed, and
            makes drafts of them.
        cached: False runs the full network at every position: for proof, hundreds of times slower.

    Returns:
        (n, h, w), int32 in [0, num_embeddings).

    Raises:
        ValueError: if an argument is out of its range.

    Source of top_p: Holtzman et al. 2020, arXiv:1904.09751.
    """
    config = prior.config
    if n < 1 or not temperature >= 1e-6:
        raise ValueError(f"n and temperature are at least 1 and 1e-6. Received: n={n}, temperature={temperature}.")
    if top_k is not None and not 1 <= top_k <= config.num_embeddings:
        raise ValueError(f"top_k is from 1 to {config.num_embeddings}. Received: {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1. Received: {top_p}.")
    known, num_known_rows = _known_rows(prior, n, prefix)
    conditions = sample_conditions(prior, n, seed=seed, slice_index=slice_index, label=label)
    if draft is None and prior.drafter:
        if num_known_rows:
            raise ValueError("A prior that refines drafts completes under given ones. Received: draft=None.")
        coarse_prior = prior.drafter.prior
        k = top_k and min(top_k, coarse_prior.config.num_embeddings)
        options = {"temperature": temperature, "top_k": k, "top_p": top_p, "cached": cached}
        told = coarse_prior.known_conditions(conditions["slice_index"], conditions["label"])
        draft = prior.drafter.of_codes(sample_codes(coarse_prior, n, seed=seed, **options, **told))
    if config.refines or draft is not None:
        conditions["draft"] = prior.checked_draft(n, draft)
    k, p = config.num_embeddings if top_k is None else top_k, 1.0 if top_p is None else float(top_p)
    filters = {"top_k": k, "top_p": p}

    height, width = config.grid_shape
    size = CHUNK_SIZE if height * width <= BAND_SIZE else CHUNK_SIZE // 4
    chunks, starts = [], range(0, n, size)
    band_rows = max(1, BAND_SIZE // width)
    bands = [(row, min(row + band_rows, height)) for row in range(0, height, band_rows)]
    progress = tqdm(
        desc="sampling", total=len(starts) * len(bands), disable=len(starts) * len(bands) == 1, unit="band", leave=False
    )
    for start in starts:
        rows = np.arange(start, start + size) % n  # the last chunk is filled up, and cut below
        drawn, caches = tf.zeros((size, height, width), tf.int32), empty_caches(prior, size) if cached else []
        for band in bands:
            drawn, caches = _sample_band(
                prior,
                tf.constant(band),
                drawn,
                caches,
                tf.constant(known[rows]),
                {name: tf.constant(values[rows]) for name, values in conditions.items()},
                tf.constant(num_known_rows * width),
                _seed(seed, start // size + (FINE_STREAM if config.refines else 0)),
                tf.constant(temperature, tf.float32),
                {name: tf.constant(value) for name, value in filters.items()} if top_k or top_p else None,
                cached,
            )
            progress.update()
        chunks.append(drawn.numpy())
    progress.close()
    return np.concatenate(chunks)[:n]


def _seed(seed: int, stream: int) -> tf.Tensor:
    """Return a stateless seed (2,) int32 for one stream of random numbers of a seed."""
    if not -(2**62) <= seed < 2**62:
        raise ValueError(f"seed is from -2**62 to below 2**62. Received: {seed}.")
    return tf.random.experimental.stateless_fold_in(tf.constant([seed & 0x7FFFFFFF, seed >> 31], tf.int32), stream)


def _known_rows(prior: PixelCNN, n: int, prefix: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return grids (n, h, w) int32 that begin with the prefix, and its number of rows."""
    height, width = prior.config.grid_shape
    known = np.zeros((n, height, width), np.int32)
    if prefix is None:
        return known, 0
    prefix = np.asarray(prefix)
    prefix = prefix[None] if prefix.ndim == 2 else prefix
    if prefix.ndim != 3 or len(prefix) not in (1, n) or prefix.shape[1] > height:
        expected = f"(rows, {width}) or ({n}, rows, {width}) with at most {height} rows"
        raise ValueError(f"prefix is {expected}. Received: {prefix.shape}.")
    rows = prefix.shape[1]
    known[:, :rows] = checked_codes(prefix, (rows, width), prior.config.num_embeddings)
    return known, rows


def sample_conditions(prior: PixelCNN, n: int, *, seed: int = 0, **given) -> dict[str, np.ndarray]:
    """Return the conditions that `sample_codes` uses.

    Args:
        prior: the model to draw from.
        n: how many samples.
        seed: as given to `sample_codes`.
        given: `slice_index`, `label`, as given to `sample_codes`.

    Returns:
        Name to (n,) int32. One that is not given is drawn from those of training, for sample i from (seed, i) alone; -1
        where the prior is not conditioned on it.
    """
    given = {name: given.get(name) for name in CONDITIONS}
    for stream, (name, values) in enumerate(prior.known_values.items()):
        if given[name] is None:
            source, count = _seed(seed, CONDITION_STREAM - stream), len(values)
            drawn = [
                tf.random.stateless_uniform((), tf.random.experimental.stateless_fold_in(source, i), 0, count, tf.int32)
                for i in range(n)
            ]
            given[name] = values[np.array(drawn, np.int32)]
    return prior.checked_conditions(n, **given)


def empty_caches(prior: PixelCNN, size: int) -> list[tf.Tensor]:
    """Return what the layers with memory have in it before the first position of so many grids."""
    return [layer.empty_cache(size, prior.config.grid_shape) for layer in prior.layers_with_memory]


@tf.function(jit_compile=True, autograph=False)
def _sample_band(prior, band, drawn, caches, known, conditions, num_known, seed, temperature, filters, cached):
    """Return grids (b, h, w) int32 with the codes of a band of rows (first, end) drawn too, and the caches.

    The first `num_known` codes in raster order are those of `known` (b, h, w). Traced and compiled once for each prior,
    and for whether there are filters.
    """
    import tensorflow_probability as tfp  # here: it takes seconds to import

    known = tf.transpose(tf.reshape(known, (known.shape[0], -1)))  # (h * w, b)

    def draw(index, logits, nothing):
        logits = logits / temperature
        if filters is not None:
            logits = filter_logits(logits, **filters)
        codes = tfp.distributions.Categorical(logits=logits).sample(
            seed=tf.random.experimental.stateless_fold_in(seed, index)
        )
        return tf.where(index < num_known, known[index], codes), nothing

    condition = prior.condition_vector(drawn.shape[0], conditions)
    given = condition, prior.places(conditions.get("draft"))
    drawn, caches, _ = in_raster_order(prior, given, draw, (), band, drawn, caches, cached=cached)
    return drawn, caches


def in_raster_order(
    prior: PixelCNN,
    given: tuple[tf.Tensor, tf.Tensor],
    choose: Callable,
    state,
    band,
    codes: tf.Tensor,
    caches: list,
    *,
    cached: bool = True,
) -> tuple:
    """Choose one code after the other in a band of rows, each given the logits that follow from those before.

    Args:
        prior: the model.
        given: what `PixelCNN.condition_vector` and `PixelCNN.places` return.
        choose: function of the index in raster order () int32, the logits there (b, k) and a state, to the codes
            there (b,) int32 and the state.
        state: what `choose` is given at first.
        band: first row, and the row after the last.
        codes: (b, h, w) int32, those of the rows before the band.
        caches: as they are after those rows; `empty_caches` before the first.
        cached: False runs the whole network at every position.

    Returns:
        The codes with those of the band, the caches after it, and the last state.
    """
    condition, position = given
    size, (height, width) = condition.shape[0], prior.config.grid_shape
    layers = prior.layers_with_memory
    numbers = {id(layer): number for number, layer in enumerate(layers)}

    def embedded(codes, first, count):
        """Return the vectors (b, 1, count, embedding_dim) of codes (h * w, b); zeros before the first."""
        vectors = prior.code_embedding(tf.transpose(tf.slice(codes, (tf.maximum(first, 0), 0), (count, size))))
        return tf.where(first < 0, tf.zeros_like(vectors), vectors)[:, None]

    def remembering(caches, index, column):
        """Return a function that applies a layer at a position, and puts its new cache into the list of caches."""

        def apply(layer, x):
            number = numbers[id(layer)]
            output, caches[number] = layer.step(x, caches[number], index, column)
            return output

        return apply

    def step(index, codes, caches, heard, state):
        row, column = index // width, index % width
        caches = list(caches)
        if cached:
            apply = remembering(caches, index, column)
            here = position[:, row, column][:, None, None]
            told = [tf.slice(rows, (0, 0, column, 0), (*rows.shape[:2], 1, rows.shape[3])) for rows in heard]
            logits = prior.along(embedded(codes, index - 1, 1), told, condition, here, apply)[:, 0, 0]
        else:
            grids = tf.reshape(tf.transpose(codes), (size, height, width))
            logits = prior.network(grids, condition, position)[:, row, column]
        chosen, state = choose(index, logits, state)
        return index + 1, tf.tensor_scatter_nd_update(codes, [[index]], chosen[None]), caches, heard, state

    def row_of(row, codes, caches, state):
        start, heard = row * width, []
        if cached:
            caches = [layer.next_row(cache) for layer, cache in zip(layers, caches, strict=True)]
            apply = remembering(caches, start, tf.constant(0))
            heard = prior.down(embedded(codes, start - width, width), condition, position[:, row][:, None], apply)
        loop = tf.while_loop(lambda index, *_: index < start + width, step, (start, codes, caches, heard, state))
        _, codes, caches, _, state = loop
        return row + 1, codes, caches, state

    flat = tf.transpose(tf.reshape(codes, (size, height * width)))  # (h * w, b): a position is a row
    first, end = tf.unstack(band)
    _, flat, caches, state = tf.while_loop(lambda row, *_: row < end, row_of, (first, flat, caches, state))
    return tf.reshape(tf.transpose(flat), (size, height, width)), caches, state


def filter_logits(logits: tf.Tensor, *, top_k: tf.Tensor, top_p: tf.Tensor) -> tf.Tensor:
    """Return logits (b, k) with all but the allowed codes at -inf: the top_k most likely, and among them the fewest
    most likely ones whose probability reaches top_p."""
    ordered = tf.sort(logits, direction="DESCENDING", axis=-1)  # (b, k)
    rank = tf.range(tf.shape(logits)[-1])
    ordered = tf.where(rank < top_k, ordered, -np.inf)
    before = tf.cumsum(tf.nn.softmax(ordered), axis=-1, exclusive=True)  # the most likely code has 0 before it
    least = tf.reduce_min(tf.where((rank < top_k) & (before < top_p), ordered, np.inf), axis=-1, keepdims=True)
    return tf.where(logits >= least, logits, -np.inf)
