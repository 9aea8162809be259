"""The VQ-VAE: encoder, quantizer and decoder, with their training step and the verbs encode, decode, reconstruct.

Source: van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning, arXiv:1711.00937.
"""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.config import VQVAEConfig
from oasis_vq.devices import reported, shares_of_mean
from oasis_vq.quantizer import CodebookUsage, EMAVectorQuantizer, Perplexity, VectorQuantizer
from oasis_vq.runtime import in_precision

VERB_BATCH_SIZE = 64
"""Arrays given to encode, decode and the like pass through the network in batches of this many."""


def in_batches(function: Callable, *arrays: np.ndarray | None, batch_size: int = VERB_BATCH_SIZE) -> np.ndarray:
    """Apply a function to arrays in batches along their first axis; an array that is None is passed on as None."""
    size = next(len(array) for array in arrays if array is not None)
    if size == 0:  # what one array of zeros would give, without it
        ones = (None if array is None else np.zeros((1, *array.shape[1:]), array.dtype) for array in arrays)
        return in_batches(function, *ones)[:0]
    parts = []
    for start in range(0, size, batch_size):
        rows = slice(start, start + batch_size)
        parts.append(function(*(None if array is None else tf.constant(array[rows]) for array in arrays)).numpy())
    return np.concatenate(parts)


def _convolution(
    x: keras.KerasTensor, config: VQVAEConfig, channels: int, stride: int, *, up: bool = False, kernel_size: int = 0
):
    """Add a convolution, transposed if it leads up to the image, its batch normalization if any, and the activation."""
    convolution = keras.layers.Conv2DTranspose if up else keras.layers.Conv2D
    x = convolution(channels, kernel_size or config.kernel_size, strides=stride, padding="same")(x)
    return _activated(x, config)


def _activated(x: keras.KerasTensor, config: VQVAEConfig) -> keras.KerasTensor:
    if config.batch_norm:
        x = keras.layers.BatchNormalization()(x)
    return keras.layers.Activation(config.activation)(x)


def _residual_blocks(x: keras.KerasTensor, config: VQVAEConfig) -> keras.KerasTensor:
    """Add activation, 3x3 convolution, activation, 1x1 convolution, and the skip, once for each residual block."""
    channels = config.encoder_channels[-1]
    for _ in range(config.num_residual_blocks):
        hidden = keras.layers.Activation(config.activation)(x)
        hidden = _activated(keras.layers.Conv2D(channels, 3, padding="same")(hidden), config)
        hidden = keras.layers.Conv2D(channels, 1)(hidden)
        x = keras.layers.Add()([x, hidden])
    return keras.layers.Activation(config.activation)(x) if config.num_residual_blocks else x


def build_encoder(config: VQVAEConfig) -> keras.Model:
    """Return a model from images (b, size, size, 1) to latents (b, *grid_shape, embedding_dim)."""
    x = inputs = keras.Input((config.image_size, config.image_size, 1), name="images")
    for channels, stride in zip(config.encoder_channels, config.strides, strict=True):
        x = _convolution(x, config, channels, stride)
    x = _residual_blocks(x, config)
    options = {"padding": "same", "activation": config.latent_activation, "name": "latents"}
    latents = keras.layers.Conv2D(config.embedding_dim, config.latent_kernel_size, **options)(x)
    return keras.Model(inputs, latents, name="encoder")


def build_decoder(config: VQVAEConfig) -> keras.Model:
    """Return a model from quantized latents (b, *grid_shape, embedding_dim) to images (b, size, size, 1).

    With residual blocks the last transposed convolution makes the image (van den Oord et al. 2017, section 4.1);
    without, the convolutions of the encoder are mirrored and one after them makes the image (the keras.io example),
    unless that of the latents is mirrored, too, so that the last of them does.
    """
    x = inputs = keras.Input((*config.grid_shape, config.embedding_dim), name="quantized")
    channels, strides = config.encoder_channels[::-1], config.strides[::-1]
    output = {"padding": "same", "activation": config.output_activation, "dtype": "float32", "name": "images"}
    if config.num_residual_blocks:
        x = keras.layers.Conv2D(channels[0], 3, padding="same")(x)
        x = _residual_blocks(x, config)
        for filters, stride in zip(channels[1:], strides, strict=False):
            x = _convolution(x, config, filters, stride, up=True)
        images = keras.layers.Conv2DTranspose(1, config.kernel_size, strides=strides[-1], **output)(x)
    elif config.exact_mirror:
        kernels = [config.latent_kernel_size, *[config.kernel_size] * (len(channels) - 1)]
        for filters, stride, kernel in zip(channels, (1, *strides), kernels, strict=False):
            x = _convolution(x, config, filters, stride, up=True, kernel_size=kernel)
        images = keras.layers.Conv2DTranspose(1, config.kernel_size, strides=strides[-1], **output)(x)
    else:
        for filters, stride in zip(channels, strides, strict=True):
            x = _convolution(x, config, filters, stride, up=True)
        images = keras.layers.Conv2D(1, 3, **output)(x)
    if config.output_activation == "tanh":
        images = keras.layers.Rescaling(0.5, 0.5, dtype="float32")(images)
    return keras.Model(inputs, images, name="decoder")


def pixel_loss(name: str, images: tf.Tensor, again: tf.Tensor, *, variance: tf.Tensor | float = 1.0) -> tf.Tensor:
    """Return a mean over all pixels that measures how far reconstructions are from images.

    Args:
        name: 'mse', squared errors in units of the variance (van den Oord et al. 2017); 'l1', absolute errors in units
            of the standard deviation; 'bce', binary cross-entropy in nats, least where both are equal, but not 0 there.
        images: (b, size, size, 1), float32 in [0, 1].
        again: the same shape; in (0, 1) for 'bce'.
        variance: of the pixels of the data; 'bce' does without.

    Returns:
        (), float32.
    """
    if name == "mse":
        return tf.reduce_mean((images - again) ** 2) / variance
    if name == "l1":
        return tf.reduce_mean(tf.abs(images - again)) / variance**0.5
    return tf.reduce_mean(keras.losses.binary_crossentropy(images, again))


def structural_similarity(images: tf.Tensor, again: tf.Tensor) -> tf.Tensor:
    """Return the mean SSIM of images and reconstructions as a loss needs it: `tf.image.ssim`, several times faster.

    The Gaussian window, 11 pixels wide with a standard deviation of 1.5, is applied as one matrix product along each
    axis, which is faster than a convolution on CPUs; on GPUs as a sum of shifted images, since they round the factors
    of products to ten bits (TF32), too few for a variance.

    Args:
        images: (b, size, size, 1), float32 in [0, 1], of 11 pixels or more.
        again: the same shape.

    Returns:
        (), float32, at most 1.

    Source: Wang et al. 2004, equation 13.
    """
    size, width = images.shape[1], 11
    taps = np.exp(-0.5 * ((np.arange(width) - width // 2) / 1.5) ** 2).astype(np.float32)
    taps, count = taps / taps.sum(), size - width + 1
    window = np.stack([np.roll(np.pad(taps, (0, count - 1)), shift) for shift in range(count)])  # (size - 10, size)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    def mean(x: tf.Tensor) -> tf.Tensor:
        x = x[..., 0]
        if not on_gpu:
            return tf.matmul(window, tf.matmul(x, window, transpose_b=True))
        x = tf.add_n([tap * x[:, first : first + count] for first, tap in enumerate(taps)])
        return tf.add_n([tap * x[:, :, first : first + count] for first, tap in enumerate(taps)])

    first, second = mean(images), mean(again)
    product, squares = 2 * first * second, first**2 + second**2
    luminance = (product + 0.01**2) / (squares + 0.01**2)
    covariance, variances = 2 * mean(images * again) - product, mean(images**2 + again**2) - squares
    return tf.reduce_mean(luminance * (covariance + 0.03**2) / (variances + 0.03**2))


@keras.saving.register_keras_serializable("oasis_vq")
class VQVAE(keras.Model):
    """Vector-quantized variational autoencoder of grey images.

    Args:
        config: sizes, quantizer and loss.

    Call: images (batch, size, size, 1) float32 in [0, 1] to their reconstructions, same shape, not clipped.
    """

    score = "reconstruction_loss"
    """What is to fall in validation. The total loss can rise while reconstructions get better: latents spread out."""

    def __init__(self, config: VQVAEConfig | dict, **kwargs):
        config = config if isinstance(config, VQVAEConfig) else VQVAEConfig.from_dict(config)
        super().__init__(**{**kwargs, "dtype": config.precision})
        self.config = config
        with in_precision(self.config.precision):
            self.encoder = build_encoder(self.config)
            self.decoder = build_decoder(self.config)
        self.quantizer = self.build_quantizer()
        self.image_variance = self.add_weight(
            name="image_variance", shape=(), initializer="ones", dtype="float32", autocast=False, trainable=False
        )
        self.ssim_warmup = 0
        """Steps of training over which the SSIM comes into the loss."""
        self._means = {name: keras.metrics.Mean(name) for name in ("total_loss", "reconstruction_loss", "vq_loss")}
        self._code_metrics = [kind(self.config.num_embeddings) for kind in (Perplexity, CodebookUsage)]
        self(tf.zeros((1, self.config.image_size, self.config.image_size, 1)))  # builds every weight

    def build(self, input_shape=None) -> None:
        """Do nothing: every weight is built where the model is made. Keras would trace the whole network for it."""

    def build_quantizer(self) -> keras.layers.Layer:
        """Return the quantizer that the configuration names; the place for an experiment with another one."""
        sizes = (self.config.num_embeddings, self.config.embedding_dim)
        options = {"commitment_cost": self.config.commitment_cost, "name": "quantizer"}
        if self.config.quantizer == "ema":
            return EMAVectorQuantizer(*sizes, seed=self.config.seed, **options)
        return VectorQuantizer(*sizes, **options)

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
        return [*self._means.values(), *self._code_metrics]

    def losses_of(self, images: tf.Tensor, *, training: bool) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """Return the losses, each () float32, and the codes (batch, h, w) of images (batch, size, size, 1).

        reconstruction_loss is the one that the configuration names, plus `ssim_weight` (1 - SSIM); vq_loss is the
        quantizer's; total_loss is their sum. In training the weight rises over the first `ssim_warmup` steps: the SSIM
        of a black background is 1, and so steep there that it can hold a decoder at black that has learned nothing.
        """
        quantized, codes, vq_loss = self.quantizer(self.encoder(images, training=training), training=training)
        again = self.decoder(quantized, training=training)
        reconstruction_loss = pixel_loss(self.config.loss, images, again, variance=self.image_variance)
        if weight := self.config.ssim_weight:
            if training and self.ssim_warmup:
                weight *= tf.minimum(1.0, tf.cast(self.optimizer.iterations, tf.float32) / self.ssim_warmup)
            reconstruction_loss += weight * (1.0 - structural_similarity(images, again))
        total_loss = reconstruction_loss + vq_loss
        return {"total_loss": total_loss, "reconstruction_loss": reconstruction_loss, "vq_loss": vq_loss}, codes

    def train_step(self, data) -> dict[str, tf.Tensor]:
        images, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            losses, codes = self.losses_of(images, training=True)
            scaled = self.optimizer.scale_loss(losses["total_loss"])
        gradients = shares_of_mean(tape.gradient(scaled, self.trainable_variables))
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self._record(losses, codes)

    def test_step(self, data) -> dict[str, tf.Tensor]:
        images, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self._record(*self.losses_of(images, training=False))

    def _record(self, losses: dict[str, tf.Tensor], codes: tf.Tensor) -> dict[str, tf.Tensor]:
        for name, mean in self._means.items():
            mean.update_state(losses[name], sample_weight=tf.shape(codes)[0])  # the last batch may be smaller
        for metric in self._code_metrics:
            metric.update_state(codes)
        return reported({metric.name: metric.result() for metric in self.metrics})

    @tf.function(reduce_retracing=True, autograph=False)
    def _encode(self, images: tf.Tensor) -> tf.Tensor:
        return self.quantizer.codes(self.encoder(images, training=False))

    @tf.function(reduce_retracing=True, autograph=False)
    def _decode(self, codes: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(self.decoder(self.quantizer.lookup(codes), training=False), 0.0, 1.0)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return the codes of images.

        Args:
            images: (n, size, size, 1), float32 in [0, 1].

        Returns:
            (n, h, w), int32 in [0, num_embeddings).

        Raises:
            ValueError: if the images are of another size or range.
        """
        images = np.asarray(images)
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 1):
            raise ValueError(f"Images are (n, {size}, {size}, 1) in this model. Received: {images.shape}.")
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"Images are float in [0, 1]. Received: {images.dtype}.")
        if images.size and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):  # which an interpolation may leave
            raise ValueError(f"Images are in [0, 1]. Received: {images.min()} to {images.max()}.")
        return in_batches(self._encode, images.astype(np.float32))

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
