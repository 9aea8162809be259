"""Vector quantizers: from latents to the nearest vectors of a codebook, with a gradient that passes."""

import keras
import numpy as np
import tensorflow as tf


def nearest_codes(latents: tf.Tensor, codebook: tf.Tensor) -> tf.Tensor:
    """Return the index of the codebook vector nearest to each latent.

    The squared distance is compared as z·e - |e|²/2, which needs neither |z|² nor a one-hot matrix.

    Args:
        latents: (..., embedding_dim), float32.
        codebook: (num_embeddings, embedding_dim), float32.

    Returns:
        (...), int32 in [0, num_embeddings). Ties go to the lower index. No gradient.

    Source: van den Oord et al. 2017, equation 1.
    """
    codebook = tf.stop_gradient(codebook)
    flat = tf.reshape(tf.stop_gradient(latents), (-1, codebook.shape[-1]))  # (n, d)
    similarity = tf.matmul(flat, codebook, transpose_b=True) - 0.5 * tf.reduce_sum(codebook**2, axis=1)  # (n, k)
    return tf.reshape(tf.argmax(similarity, axis=1, output_type=tf.int32), tf.shape(latents)[:-1])


class _Quantizer(keras.layers.Layer):
    """What all quantizers share: the codebook, the search, the lookup and the commitment term.

    Computes in float32 whatever the precision policy says: half precision changes codes and overflows distances.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, commitment_cost: float = 0.25, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("num_embeddings", "embedding_dim", "commitment_cost")}
        return {**super().get_config(), **own}

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
        codebook_term = tf.reduce_mean((tf.stop_gradient(latents) - vectors) ** 2)
        commitment_term = tf.reduce_mean((latents - tf.stop_gradient(vectors)) ** 2)
        quantized = latents + tf.stop_gradient(vectors - latents)
        return quantized, codes, codebook_term + self.commitment_cost * commitment_term


@keras.saving.register_keras_serializable("oasis_vq")
class EMAVectorQuantizer(_Quantizer):
    """Replaces each latent by the nearest vector of a codebook that follows the latents by moving averages.

    At the first training step and every `restart_interval` steps after it, dead codes (average count under
    `DEAD_SHARE` of an even share; at the first step all) move onto latents of the batch, drawn with a probability
    proportional to their squared distance from the codebook: three quarters of a brain slice are background, and
    even draws would put most codes there.

    Args:
        num_embeddings: vectors in the codebook, K.
        embedding_dim: length of each, D.
        commitment_cost: weight of the commitment term, beta.
        decay: of the moving averages of counts and sums.
        restart_interval: training steps between restarts of dead codes; 0 for none.
        seed: of the choice of latents in the initialisation and in restarts.

    Call: as `VectorQuantizer`; the loss is beta times the commitment term.

    Source: van den Oord et al. 2017, appendix A.1; restarts: Dhariwal et al. 2020 (Jukebox), section 3.1;
    the draw: Arthur and Vassilvitskii 2007 (k-means++).
    """

    DEAD_SHARE = 0.03
    EPSILON = 1e-5

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        restart_interval: int = 50,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(num_embeddings, embedding_dim, commitment_cost=commitment_cost, **kwargs)
        self.decay = decay
        self.restart_interval = restart_interval
        self.seed = seed

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("decay", "restart_interval", "seed")}
        return {**super().get_config(), **own}

    def build(self, input_shape) -> None:
        def state(name: str, shape: tuple, initializer: str, dtype: str = "float32", **options):
            return self.add_weight(
                name=name, shape=shape, initializer=initializer, dtype=dtype, autocast=False, trainable=False, **options
            )

        shape = (self.num_embeddings, self.embedding_dim)
        # Counts start at 1 and sums at the codebook: with counts of 0 an unused vector explodes at the first step.
        self.codebook = state("codebook", shape, "zeros", aggregation="mean")
        self.average_counts = state("average_counts", shape[:1], "ones", aggregation="mean")
        self.average_sums = state("average_sums", shape, "zeros", aggregation="mean")
        # int64: TensorFlow keeps int32 variables on the CPU, which a step compiled for the GPU cannot reach.
        self.num_steps = state("num_steps", (), "zeros", dtype="int64", aggregation="only_first_replica")

    def call(self, latents: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        self._check(latents)
        if training:
            flat = tf.reshape(tf.stop_gradient(latents), (-1, self.embedding_dim))  # (n, d)
            step = tf.convert_to_tensor(self.num_steps)
            interval = self.restart_interval or 2**30
            tf.cond(step % interval == 0, lambda: self._restart(flat, step), lambda: None)
            self.num_steps.assign(step + 1)
        codes = self.codes(latents)
        vectors = self.lookup(codes)
        if training:
            self._update(flat, tf.reshape(codes, (-1,)))
        commitment_term = tf.reduce_mean((latents - tf.stop_gradient(vectors)) ** 2)
        quantized = latents + tf.stop_gradient(vectors - latents)
        return quantized, codes, self.commitment_cost * commitment_term

    def _restart(self, flat: tf.Tensor, step: tf.Tensor) -> None:
        """Move dead codes, at step 0 all codes, onto latents (n, d) drawn from the batch; reset their averages."""
        share = tf.reduce_mean(self.average_counts)
        dead = tf.logical_or(step == 0, self.average_counts < self.DEAD_SHARE * share)  # (k,)
        distances = tf.reduce_sum((flat - self.lookup(self.codes(flat))) ** 2, axis=1)  # (n,)
        rows = tf.random.stateless_categorical(
            tf.math.log(distances + 1e-12)[None],
            self.num_embeddings,
            seed=tf.stack([self.seed, tf.cast(step, tf.int32)]),
        )[0]
        drawn = tf.gather(flat, rows)  # (k, d)
        fresh = tf.where(step == 0, 1.0, share)
        counts = tf.where(dead, fresh, self.average_counts)
        self.codebook.assign(tf.where(dead[:, None], drawn, self.codebook))
        self.average_counts.assign(counts)
        self.average_sums.assign(tf.where(dead[:, None], drawn * fresh, self.average_sums))

    def _update(self, flat: tf.Tensor, codes: tf.Tensor) -> None:
        """Move the averages towards the latents (n, d) that chose each code, and the codebook with them."""
        counts = tf.math.unsorted_segment_sum(tf.ones_like(codes, tf.float32), codes, self.num_embeddings)
        sums = tf.math.unsorted_segment_sum(flat, codes, self.num_embeddings)
        counts = self.decay * self.average_counts + (1 - self.decay) * counts
        sums = self.decay * self.average_sums + (1 - self.decay) * sums
        self.average_counts.assign(counts)
        self.average_sums.assign(sums)
        self.codebook.assign(sums / tf.maximum(counts, self.EPSILON)[:, None])


@keras.saving.register_keras_serializable("oasis_vq")
class Perplexity(keras.metrics.Metric):
    """Perplexity of all codes seen since the last reset: 1 if one code does all, `num_embeddings` if all share evenly.

    Source: van den Oord et al. 2017 report it per batch; here the counts are summed before the entropy is taken.
    """

    def __init__(self, num_embeddings: int, name: str = "perplexity", **kwargs):
        super().__init__(name=name, **kwargs)
        self.num_embeddings = num_embeddings
        self.counts = self.add_weight(name="counts", shape=(num_embeddings,), initializer="zeros")

    def update_state(self, codes: tf.Tensor, sample_weight=None) -> None:
        """Add codes (...), int32."""
        codes = tf.reshape(codes, (-1,))
        self.counts.assign_add(
            tf.math.unsorted_segment_sum(tf.ones_like(codes, tf.float32), codes, self.num_embeddings)
        )

    def result(self) -> tf.Tensor:
        share = self.counts / tf.maximum(tf.reduce_sum(self.counts), 1.0)
        return tf.exp(-tf.reduce_sum(tf.math.xlogy(share, share)))

    def get_config(self) -> dict:
        return {**super().get_config(), "num_embeddings": self.num_embeddings}


def perplexity(codes: np.ndarray, num_embeddings: int) -> float:
    """Return the perplexity of codes (...), int: the exponential of the entropy of their histogram."""
    share = np.bincount(np.ravel(codes), minlength=num_embeddings) / np.size(codes)
    return float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))
