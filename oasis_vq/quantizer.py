"""Vector quantizers: from latents to the nearest vectors of a codebook, with a gradient that passes."""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

TILE_SIZE = 2**21
"""Similarities computed at once by the search: 8 MB of them, as fast as all at once in a sixteenth of the memory."""


def nearest_codes(latents: tf.Tensor, codebook: tf.Tensor) -> tf.Tensor:
    """Return the index of the codebook vector nearest to each latent.

    The squared distance is compared as z·e - |e|²/2, which needs neither |z|² nor a one-hot matrix, for as many latents
    at a time as `TILE_SIZE` allows.

    Args:
        latents: (..., embedding_dim), float32.
        codebook: (num_embeddings, embedding_dim), float32.

    Returns:
        (...), int32 in [0, num_embeddings). Ties go to the lower index, up to rounding. No gradient.

    Source: van den Oord et al. 2017, equation 1.
    """
    codebook = tf.stop_gradient(codebook)
    num_embeddings, embedding_dim = codebook.shape
    flat = tf.reshape(tf.stop_gradient(latents), (-1, embedding_dim))  # (n, d)
    half_norms = 0.5 * tf.reduce_sum(codebook**2, axis=1)  # (k,)

    def search(part: tf.Tensor) -> tf.Tensor:
        # The norms stay outside of the product, which GPUs round to ten bits (TF32).
        similarity = tf.matmul(part, codebook, transpose_b=True) - half_norms  # (tile, k)
        return tf.argmax(similarity, axis=1, output_type=tf.int32)

    most = max(1, TILE_SIZE // num_embeddings)
    if flat.shape[0] is not None and flat.shape[0] <= most:
        codes = search(flat)
    else:
        count = tf.shape(flat)[0]
        num_tiles = tf.maximum(1, -(-count // most))
        tile = -(-count // num_tiles)  # equal tiles: a small batch is not filled up to a whole one
        flat = tf.pad(flat, [[0, num_tiles * tile - count], [0, 0]])
        tiles = tf.reshape(flat, (num_tiles, tile, embedding_dim))
        codes = tf.reshape(tf.map_fn(search, tiles, fn_output_signature=tf.int32), (-1,))[:count]
    return tf.reshape(codes, tf.shape(latents)[:-1])


def count_codes(codes: tf.Tensor, num_embeddings: int) -> tf.Tensor:
    """Return how often each code occurs in codes (...), int32: (num_embeddings,), float32."""
    flat = tf.reshape(codes, (-1,))  # tf.math.bincount does not compile with XLA
    return tf.math.unsorted_segment_sum(tf.ones_like(flat, tf.float32), flat, num_embeddings)


@tf.custom_gradient
def straight_through(latents: tf.Tensor, vectors: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Return vectors (..., d); their gradient goes to latents (..., d) unchanged.

    Source: Bengio et al. 2013, section 4; van den Oord et al. 2017, section 3.2.
    """
    return tf.identity(vectors), lambda upstream: (upstream, None)


@tf.custom_gradient
def _attraction(
    latents: tf.Tensor, vectors: tf.Tensor, latent_weight: tf.Tensor, vector_weight: tf.Tensor
) -> tuple[tf.Tensor, Callable]:
    """Return (latent_weight + vector_weight) times the mean squared distance, each weight pulling its own side."""
    difference = latents - vectors
    share = 2.0 / tf.cast(tf.size(difference), difference.dtype)

    def backward(upstream: tf.Tensor) -> tuple:
        pull = share * upstream  # every pass over the difference takes time: there is one for each side
        return (latent_weight * pull) * difference, (-vector_weight * pull) * difference, None, None

    return (latent_weight + vector_weight) * share * tf.nn.l2_loss(difference), backward


class _Quantizer(keras.layers.Layer):
    """What all quantizers share: the codebook, the search, the lookup, and the gradient that passes.

    Computes in float32 whatever the precision policy says: half precision changes codes and overflows distances. (GPUs
    with TF32 round the factors of the search's product: a latent between two equally near vectors may take the other.)
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, commitment_cost: float = 0.25, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost

    def get_config(self) -> dict:
        names = ("num_embeddings", "embedding_dim", "commitment_cost")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def codes(self, latents: tf.Tensor) -> tf.Tensor:
        """Return the nearest code of each latent: (..., embedding_dim) to (...) int32."""
        return nearest_codes(tf.cast(latents, tf.float32), tf.convert_to_tensor(self.codebook))

    def lookup(self, codes: tf.Tensor) -> tf.Tensor:
        """Return the codebook vector of each code: (...) int32 to (..., embedding_dim) float32."""
        return tf.gather(tf.convert_to_tensor(self.codebook), codes)

    def _check(self, latents: tf.Tensor) -> None:
        if latents.shape[-1] != self.embedding_dim:
            raise ValueError(f"Latents have embedding_dim={self.embedding_dim} channels. Received: {latents.shape}.")


@keras.saving.register_keras_serializable("oasis_vq")
class VectorQuantizer(_Quantizer):
    """Replaces each latent by the nearest vector of a codebook that learns by gradient.

    Args:
        num_embeddings: vectors in the codebook, K.
        embedding_dim: length of each, D.
        commitment_cost: weight of the commitment term, beta.

    Call:
        latents (batch, height, width, embedding_dim) to a tuple of
        quantized (same shape, float32; its gradient goes to the latents unchanged),
        codes (batch, height, width) int32 in [0, K), and
        loss (), the codebook term plus beta times the commitment term, each a mean over all elements.

    The codebook's gradient is one slice a latent, as that of any lookup. `VQVAE` makes it dense before its optimizer
    gets it (`devices.shares_of_mean`): Adam in Keras squares each slice by itself, and its steps are then some times
    longer than with the gradient of a one-hot product, which is what the published systems have.

    Source: van den Oord et al. 2017, equation 3.
    """

    def build(self, input_shape) -> None:
        bound = 1.0 / self.num_embeddings
        self.codebook = self.add_weight(
            name="codebook",
            shape=(self.num_embeddings, self.embedding_dim),
            initializer=keras.initializers.RandomUniform(-bound, bound),
            dtype="float32",
            autocast=False,
        )

    def call(self, latents: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        self._check(latents)
        codes = self.codes(latents)
        vectors = self.lookup(codes)
        return straight_through(latents, vectors), codes, _attraction(latents, vectors, self.commitment_cost, 1.0)


@keras.saving.register_keras_serializable("oasis_vq")
class EMAVectorQuantizer(_Quantizer):
    """Replaces each latent by the nearest vector of a codebook that follows the latents by moving averages.

    At the first training step and every `restart_interval` steps after it, dead codes (average count under
    `DEAD_SHARE` of an even share; at the first step all) move onto latents of the batch, drawn at once with a
    probability proportional to their squared distance from the codebook, at the first step from zero: three quarters
    of a brain slice are background, and even draws would put most codes there.

    On several devices counts, sums and draws are those of the whole batch.

    Args:
        num_embeddings: vectors in the codebook, K.
        embedding_dim: length of each, D.
        commitment_cost: weight of the commitment term, beta.
        decay: of the moving averages of counts and sums.
        restart_interval: training steps between restarts of dead codes; 0 for none.
        seed: of the choice of latents in the initialisation and in restarts.

    Call: as `VectorQuantizer`; the loss is beta times the commitment term.

    Source: van den Oord et al. 2017, appendix A.1; restarts: Dhariwal et al. 2020 (Jukebox), section 3.1;
    the weights of the draw: Arthur and Vassilvitskii 2007 (k-means++), section 2.2.
    """

    DEAD_SHARE = 0.03
    EPSILON = 1e-5

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        decay: float = 0.99,
        restart_interval: int = 50,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.decay = decay
        self.restart_interval = restart_interval
        self.seed = seed

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("decay", "restart_interval", "seed")}
        return {**super().get_config(), **own}

    def build(self, input_shape) -> None:
        def state(name: str, shape: tuple, initializer: str, dtype: str = "float32"):
            options = {"autocast": False, "trainable": False, "aggregation": "only_first_replica"}
            return self.add_weight(name=name, shape=shape, initializer=initializer, dtype=dtype, **options)

        shape = (self.num_embeddings, self.embedding_dim)
        # Counts start at 1 and sums at the codebook: with counts of 0 an unused vector explodes at the first step.
        self.codebook = state("codebook", shape, "zeros")
        self.average_counts = state("average_counts", shape[:1], "ones")
        self.average_sums = state("average_sums", shape, "zeros")
        # int64: TensorFlow keeps int32 variables on the CPU, which a step compiled for the GPU cannot reach.
        self.num_steps = state("num_steps", (), "zeros", dtype="int64")

    def call(self, latents: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        self._check(latents)
        if training:
            flat = tf.reshape(tf.stop_gradient(latents), (-1, self.embedding_dim))  # (n, d)
            self._restart(flat)
        codes = self.codes(latents)
        vectors = self.lookup(codes)
        if training:
            self._update(flat, tf.reshape(codes, (-1,)))
        return straight_through(latents, vectors), codes, _attraction(latents, vectors, self.commitment_cost, 0.0)

    def _restart(self, flat: tf.Tensor) -> None:
        """On schedule, move dead codes, at step 0 all codes, onto latents (n, d) drawn from the batch."""
        step = tf.convert_to_tensor(self.num_steps)
        interval = self.restart_interval or 2**30
        is_due = step % interval == 0
        codebook, counts, sums = (
            tf.convert_to_tensor(part) for part in (self.codebook, self.average_counts, self.average_sums)
        )

        def distances() -> tf.Tensor:
            return tf.reduce_sum((flat - tf.gather(codebook, nearest_codes(flat, codebook))) ** 2, axis=1) + 1e-12

        # Devices agree on values, and variables are assigned, outside of the branch: only there they can.
        weights = tf.cond(is_due, distances, lambda: tf.zeros_like(flat[:, 0]))  # (n,)
        drawn, is_finite = self._drawn(flat, weights, step)
        share = tf.reduce_mean(counts)
        fresh = tf.where(step == 0, 1.0, share)
        dead = is_due & is_finite & ((step == 0) | (counts < self.DEAD_SHARE * share))  # (k,)
        self.codebook.assign(tf.where(dead[:, None], drawn, codebook))
        self.average_counts.assign(tf.where(dead, fresh, counts))
        self.average_sums.assign(tf.where(dead[:, None], drawn * fresh, sums))
        self.num_steps.assign(tf.where(is_due & ~is_finite, step, step + 1))  # if they are not, at the next step

    def _drawn(self, flat: tf.Tensor, weights: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Draw latents from the whole batch with a probability proportional to their weights, with replacement.

        The inverse of the distribution function is taken at as many random numbers as there are codes. On several
        devices each looks up those that fall among its latents.

        Args:
            flat: (n, d), the latents on this device.
            weights: (n,), not negative.
            step: (), int64, of which the draw is a function.

        Returns:
            (k, d), the same on every device, and (), whether all is finite.
        """
        until = tf.cumsum(weights)  # (n,)
        replicas = tf.distribute.get_replica_context()
        devices, number = replicas.num_replicas_in_sync, replicas.replica_id_in_sync_group
        totals = until[-1] * tf.one_hot(number, devices)
        if devices > 1:
            totals = replicas.all_reduce(tf.distribute.ReduceOp.SUM, totals)
        bounds = tf.concat([[0.0], tf.cumsum(totals)], axis=0)  # (devices + 1,), where each device's part begins
        seed = tf.stack([self.seed, tf.cast(step, tf.int32)])
        targets = tf.random.stateless_uniform((self.num_embeddings,), seed) * bounds[-1]
        rows = tf.searchsorted(until, targets - bounds[number], side="right")  # (k,)
        drawn = tf.gather(flat, tf.clip_by_value(rows, 0, tf.shape(flat)[0] - 1))  # (k, d)
        if devices > 1:
            owners = tf.searchsorted(bounds[1:-1], targets, side="right")
            mine = owners == tf.cast(number, owners.dtype)
            drawn = replicas.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(mine[:, None], drawn, 0.0))
        return drawn, tf.math.is_finite(bounds[-1]) & tf.reduce_all(tf.math.is_finite(drawn))

    def _update(self, flat: tf.Tensor, codes: tf.Tensor) -> None:
        """Move the averages towards the latents (n, d) that chose each code, and the codebook with them."""
        counts = count_codes(codes, self.num_embeddings)
        sums = tf.math.unsorted_segment_sum(flat, codes, self.num_embeddings)
        replicas = tf.distribute.get_replica_context()
        if replicas.num_replicas_in_sync > 1:
            counts, sums = replicas.all_reduce(tf.distribute.ReduceOp.SUM, [counts, sums])
        # A step that overflowed, as they do under float16 until the loss scale fits, leaves no trace: one vector that
        # is not a number would be the nearest to every latent.
        decay = tf.where(tf.reduce_all(tf.math.is_finite(sums)), self.decay, 1.0)
        counts = decay * self.average_counts + (1 - decay) * counts
        sums = decay * self.average_sums + tf.math.multiply_no_nan(sums, 1 - decay)
        self.average_counts.assign(counts)
        self.average_sums.assign(sums)
        # One that nothing has chosen for so long that hardly anything is left of its sums stays where it is.
        moved = sums / tf.maximum(counts, self.EPSILON)[:, None]
        self.codebook.assign(tf.where(counts[:, None] > self.EPSILON, moved, self.codebook))


class _CodeCounts(keras.metrics.Metric):
    """Counts how often each code has occurred since the last reset."""

    def __init__(self, num_embeddings: int, name: str, **kwargs):
        super().__init__(name=name, **kwargs)
        self.num_embeddings = num_embeddings
        self.counts = self.add_weight(name="counts", shape=(num_embeddings,), initializer="zeros")

    def update_state(self, codes: tf.Tensor, sample_weight=None) -> None:
        """Add codes (...), int32."""
        self.counts.assign_add(count_codes(codes, self.num_embeddings))

    def get_config(self) -> dict:
        return {**super().get_config(), "num_embeddings": self.num_embeddings}


@keras.saving.register_keras_serializable("oasis_vq")
class Perplexity(_CodeCounts):
    """Perplexity of all codes seen since the last reset: 1 if one code does all, `num_embeddings` if all share evenly.

    Source: van den Oord et al. 2017 report it per batch; here the counts are summed before the entropy is taken.
    """

    def __init__(self, num_embeddings: int, name: str = "perplexity", **kwargs):
        super().__init__(num_embeddings, name, **kwargs)

    def result(self) -> tf.Tensor:
        share = self.counts / tf.maximum(tf.reduce_sum(self.counts), 1.0)
        return tf.exp(-tf.reduce_sum(tf.math.xlogy(share, share)))


@keras.saving.register_keras_serializable("oasis_vq")
class CodebookUsage(_CodeCounts):
    """Share of the codes that have occurred at all since the last reset, in [0, 1]."""

    def __init__(self, num_embeddings: int, name: str = "codebook_usage", **kwargs):
        super().__init__(num_embeddings, name, **kwargs)

    def result(self) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(self.counts > 0, tf.float32))


def perplexity(codes: np.ndarray, num_embeddings: int) -> float:
    """Return the perplexity of codes (...), int: the exponential of the entropy of their histogram."""
    share = np.bincount(np.ravel(codes), minlength=num_embeddings) / np.size(codes)
    return float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))
