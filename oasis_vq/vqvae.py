"""The VQ-VAE: encoder, quantizer and decoder, with their training step and the verbs encode, decode, reconstruct.

Source: van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning, arXiv:1711.00937.
"""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.config import VQVAEConfig
from oasis_vq.quantizer import EMAVectorQuantizer, Perplexity, VectorQuantizer

VERB_BATCH_SIZE = 64
"""Arrays given to encode, decode and the like pass through the network in batches of this many."""


def in_batches(function: Callable, *arrays: np.ndarray | None) -> np.ndarray:
    """Apply a function to arrays in batches along their first axis; an array that is None is passed on as None."""
    size = next(len(array) for array in arrays if array is not None)
    parts = []
    for start in range(0, max(size, 1), VERB_BATCH_SIZE):
        rows = slice(start, start + VERB_BATCH_SIZE)
        parts.append(function(*(None if array is None else tf.constant(array[rows]) for array in arrays)).numpy())
    return np.concatenate(parts)


def _channels(config: VQVAEConfig) -> list[int]:
    """Return the channels of each strided convolution, finest resolution first; the last is `config.width`."""
    stages = config.downsampling.bit_length() - 1
    return [max(1, config.width >> (stages - 1 - stage)) for stage in range(stages)]


def _residual_blocks(x: keras.KerasTensor, config: VQVAEConfig) -> keras.KerasTensor:
    """Add ReLU, 3x3 convolution, ReLU, 1x1 convolution, and the skip, once for each residual block."""
    for _ in range(config.num_residual_blocks):
        hidden = keras.layers.ReLU()(x)
        hidden = keras.layers.Conv2D(config.width, 3, padding="same", activation="relu")(hidden)
        hidden = keras.layers.Conv2D(config.width, 1)(hidden)
        x = keras.layers.Add()([x, hidden])
    return keras.layers.ReLU()(x) if config.num_residual_blocks else x


def build_encoder(config: VQVAEConfig) -> keras.Model:
    """Return a model from images (b, size, size, 1) to latents (b, *grid_shape, embedding_dim)."""
    x = inputs = keras.Input((config.image_size, config.image_size, 1), name="images")
    for channels in _channels(config):
        x = keras.layers.Conv2D(channels, _kernel_size(config), strides=2, padding="same", activation="relu")(x)
    x = _residual_blocks(x, config)
    return keras.Model(inputs, keras.layers.Conv2D(config.embedding_dim, 1, name="latents")(x), name="encoder")


def build_decoder(config: VQVAEConfig) -> keras.Model:
    """Return a model from quantized latents (b, *grid_shape, embedding_dim) to images (b, size, size, 1).

    With residual blocks the last transposed convolution makes the image (van den Oord et al. 2017, section 4.1);
    without, a convolution after it (the keras.io example).
    """
    x = inputs = keras.Input((*config.grid_shape, config.embedding_dim), name="quantized")
    upsample = {"kernel_size": _kernel_size(config), "strides": 2, "padding": "same"}
    channels = _channels(config)[::-1]
    if config.num_residual_blocks:
        x = keras.layers.Conv2D(config.width, 3, padding="same")(x)
        x = _residual_blocks(x, config)
        for filters in channels[1:]:
            x = keras.layers.Conv2DTranspose(filters, activation="relu", **upsample)(x)
        images = keras.layers.Conv2DTranspose(1, dtype="float32", name="images", **upsample)(x)
    else:
        for filters in channels:
            x = keras.layers.Conv2DTranspose(filters, activation="relu", **upsample)(x)
        images = keras.layers.Conv2D(1, 3, padding="same", dtype="float32", name="images")(x)
    return keras.Model(inputs, images, name="decoder")


def _kernel_size(config: VQVAEConfig) -> int:
    # Sides of 4 share evenly between strides of 2 (no checkerboard); the keras.io example, without blocks, has 3.
    return 4 if config.num_residual_blocks else 3


@keras.saving.register_keras_serializable("oasis_vq")
class VQVAE(keras.Model):
    """Vector-quantized variational autoencoder of grey images.

    Args:
        config: sizes, quantizer and loss.

    Call: images (batch, size, size, 1) float32 in [0, 1] to their reconstructions, same shape, not clipped.
    """

    def __init__(self, config: VQVAEConfig | dict, **kwargs):
        super().__init__(**kwargs)
        self.config = config if isinstance(config, VQVAEConfig) else VQVAEConfig.from_dict(config)
        self.encoder = build_encoder(self.config)
        self.decoder = build_decoder(self.config)
        sizes = (self.config.num_embeddings, self.config.embedding_dim)
        options = {"commitment_cost": self.config.commitment_cost, "name": "quantizer"}
        if self.config.quantizer == "ema":
            self.quantizer = EMAVectorQuantizer(*sizes, seed=self.config.seed, **options)
        else:
            self.quantizer = VectorQuantizer(*sizes, **options)
        self.image_variance = self.add_weight(
            name="image_variance", shape=(), initializer="ones", dtype="float32", autocast=False, trainable=False
        )
        self._means = {name: keras.metrics.Mean(name) for name in ("total_loss", "reconstruction_loss", "vq_loss")}
        self._perplexity = Perplexity(self.config.num_embeddings)
        self(tf.zeros((1, self.config.image_size, self.config.image_size, 1)))  # builds every weight

    def get_config(self) -> dict:
        return {"config": self.config.to_dict()}

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        quantized, _, _ = self.quantizer(self.encoder(images, training=training), training=training)
        return self.decoder(quantized, training=training)

    def adapt(self, dataset: tf.data.Dataset) -> None:
        """Set the variance that the squared error is divided by: that of all pixels of a dataset of images.

        Source: van den Oord et al. 2017 and the keras.io example scale the error so; there the number is typed in.
        """
        count, total, squares = 0, 0.0, 0.0
        for images in dataset.as_numpy_iterator():
            count += images.size
            total += images.sum(dtype=np.float64)
            squares += np.square(images, dtype=np.float64).sum()
        variance = squares / count - (total / count) ** 2
        if variance <= 0:
            raise ValueError(f"Images need to differ for their variance to scale the loss. Received: {variance}.")
        self.image_variance.assign(variance)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [*self._means.values(), self._perplexity]

    def losses_of(self, images: tf.Tensor, *, training: bool) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """Return the losses, each () float32, and the codes (batch, h, w) of images (batch, size, size, 1).

        reconstruction_loss is the mean squared error over the data's variance, plus `ssim_weight` (1 - SSIM);
        vq_loss is the quantizer's; total_loss is their sum.
        """
        quantized, codes, vq_loss = self.quantizer(self.encoder(images, training=training), training=training)
        again = self.decoder(quantized, training=training)
        reconstruction_loss = tf.reduce_mean((images - again) ** 2) / self.image_variance
        if self.config.ssim_weight:
            similarity = tf.reduce_mean(tf.image.ssim(images, again, max_val=1.0))
            reconstruction_loss += self.config.ssim_weight * (1.0 - similarity)
        total_loss = reconstruction_loss + vq_loss
        return {"total_loss": total_loss, "reconstruction_loss": reconstruction_loss, "vq_loss": vq_loss}, codes

    def train_step(self, data) -> dict[str, tf.Tensor]:
        images, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            losses, codes = self.losses_of(images, training=True)
            scaled = self.optimizer.scale_loss(losses["total_loss"])
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self._record(losses, codes)

    def test_step(self, data) -> dict[str, tf.Tensor]:
        images, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self._record(*self.losses_of(images, training=False))

    def _record(self, losses: dict[str, tf.Tensor], codes: tf.Tensor) -> dict[str, tf.Tensor]:
        for name, mean in self._means.items():
            mean.update_state(losses[name], sample_weight=tf.shape(codes)[0])  # the last batch may be smaller
        self._perplexity.update_state(codes)
        return {metric.name: metric.result() for metric in self.metrics}

    @tf.function(reduce_retracing=True)
    def _encode(self, images: tf.Tensor) -> tf.Tensor:
        return self.quantizer.codes(self.encoder(images, training=False))

    @tf.function(reduce_retracing=True)
    def _decode(self, codes: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(self.decoder(self.quantizer.lookup(codes), training=False), 0.0, 1.0)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return the codes of images.

        Args:
            images: (n, size, size, 1), float32 in [0, 1].

        Returns:
            (n, h, w), int32 in [0, num_embeddings).
        """
        images = np.asarray(images, np.float32)
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 1):
            raise ValueError(f"Images are (n, {size}, {size}, 1) in this model. Received: {images.shape}.")
        return in_batches(self._encode, images)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the images that codes stand for.

        Args:
            codes: (n, h, w), int in [0, num_embeddings).

        Returns:
            (n, size, size, 1), float32 in [0, 1].
        """
        return in_batches(self._decode, checked_codes(codes, self.config.grid_shape, self.config.num_embeddings))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Return images (n, size, size, 1) in [0, 1] after they have gone through their codes, clipped to [0, 1]."""
        return self.decode(self.encode(images))


def checked_codes(codes: np.ndarray, grid_shape: tuple[int, int], num_embeddings: int) -> np.ndarray:
    """Return codes as int32 if they are (n, *grid_shape) in [0, num_embeddings), else raise ValueError."""
    codes = np.asarray(codes)
    if codes.ndim != 3 or codes.shape[1:] != tuple(grid_shape) or not np.issubdtype(codes.dtype, np.integer):
        expected = f"(n, {grid_shape[0]}, {grid_shape[1]}) integers"
        raise ValueError(f"Codes are {expected} in this model. Received: {codes.shape} {codes.dtype}.")
    if codes.size and not (codes.min() >= 0 and codes.max() < num_embeddings):
        raise ValueError(f"Codes are in [0, {num_embeddings}). Received: {codes.min()} to {codes.max()}.")
    return codes.astype(np.int32)
