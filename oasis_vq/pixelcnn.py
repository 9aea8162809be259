"""The PixelCNN prior: an autoregressive model of code grids in raster order.

Source: van den Oord, Kalchbrenner and Kavukcuoglu 2016, Pixel Recurrent Neural Networks, arXiv:1601.06759.
"""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.config import PriorConfig
from oasis_vq.vqvae import checked_codes, in_batches

CONDITIONS = ("slice_index", "label")
UNKNOWN = -1
"""Value of a condition that is not known."""


@keras.saving.register_keras_serializable("oasis_vq")
class MaskedConv2D(keras.layers.Layer):
    """Convolution, stride 1, that sees only positions before its own in raster order.

    Args:
        filters: channels of the output.
        kernel_size: side of the square window, odd.
        mask_type: 'A' leaves the own position out (first layer), 'B' takes it in.

    Call: (batch, h, w, channels) to (batch, h, w, filters).

    The kernel holds the rows up to the own one only; a mask multiplies it where it is used.

    Source: van den Oord et al. 2016, section 3.4.
    """

    def __init__(self, filters: int, kernel_size: int, *, mask_type: str, **kwargs):
        super().__init__(**kwargs)
        if mask_type not in ("A", "B"):
            raise ValueError(f"mask_type is 'A' or 'B'. Received: {mask_type}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is odd. Received: {kernel_size}.")
        self.filters = filters
        self.kernel_size = kernel_size
        self.mask_type = mask_type
        self.radius = kernel_size // 2
        self.num_taps = self.radius * kernel_size + self.radius + (mask_type == "B")

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("filters", "kernel_size", "mask_type")}
        return {**super().get_config(), **own}

    def build(self, input_shape) -> None:
        channels = input_shape[-1]
        rows = self.radius + 1
        bound = math.sqrt(6 / (max(self.num_taps, 1) * channels + self.filters))  # Glorot, over what the mask leaves
        self.kernel = self.add_weight(
            name="kernel",
            shape=(rows, self.kernel_size, channels, self.filters),
            initializer=keras.initializers.RandomUniform(-bound, bound),
        )
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    @property
    def mask(self) -> np.ndarray:
        """(radius + 1, kernel_size, 1, 1) float32: 1 where the window may be seen."""
        taps = np.arange((self.radius + 1) * self.kernel_size) < self.num_taps  # in raster order the past is a prefix
        return taps.reshape(self.radius + 1, self.kernel_size, 1, 1).astype(np.float32)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        padding = [[0, 0], [self.radius, 0], [self.radius, self.radius], [0, 0]]
        kernel = self.kernel * tf.cast(self.mask, self.kernel.dtype)
        return tf.nn.conv2d(tf.pad(x, padding), kernel, strides=1, padding="VALID") + self.bias

    def at_position(self, window: tf.Tensor) -> tf.Tensor:
        """Return the output at one position from its window.

        Args:
            window: (radius + 1, kernel_size, batch, channels), the rows up to the own one.

        Returns:
            (batch, 1, 1, filters).
        """
        channels = window.shape[-1]
        taps = tf.reshape(window, (-1, tf.shape(window)[2], channels))[: self.num_taps]  # (taps, b, c)
        taps = tf.reshape(tf.transpose(taps, (1, 0, 2)), (-1, self.num_taps * channels))  # (b, taps * c)
        kernel = tf.reshape(self.kernel, (-1, self.filters))[: self.num_taps * channels]
        return (tf.matmul(taps, tf.cast(kernel, taps.dtype)) + tf.cast(self.bias, taps.dtype))[:, None, None, :]


@keras.saving.register_keras_serializable("oasis_vq")
class ResidualBlock(keras.layers.Layer):
    """ReLU, 1x1 to half the channels, ReLU, masked convolution of type B, ReLU, 1x1 back, and the skip.

    The condition is added before the masked convolution's ReLU.

    Args:
        num_channels: channels of input and output.
        kernel_size: side of the masked convolution.
        dropout: share of the inner channels dropped while training.

    Source: van den Oord et al. 2016, figure 5.
    """

    def __init__(self, num_channels: int, kernel_size: int, *, dropout: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.kernel_size = kernel_size
        self.dropout_rate = dropout
        half = max(1, num_channels // 2)
        self.narrow = keras.layers.Dense(half)
        self.condition = keras.layers.Dense(half, use_bias=False)
        self.masked = MaskedConv2D(half, kernel_size, mask_type="B")
        self.dropout = keras.layers.Dropout(dropout)
        self.widen = keras.layers.Dense(num_channels)

    def get_config(self) -> dict:
        own = {"num_channels": self.num_channels, "kernel_size": self.kernel_size, "dropout": self.dropout_rate}
        return {**super().get_config(), **own}

    def build(self, input_shape) -> None:
        half = (*input_shape[:-1], max(1, self.num_channels // 2))
        self.narrow.build(input_shape)
        self.condition.build(input_shape)
        self.masked.build(half)
        self.widen.build(half)

    def call(
        self,
        x: tf.Tensor,
        condition: tf.Tensor,
        convolve: Callable = lambda layer, x: layer(x),
        training: bool = False,
    ) -> tf.Tensor:
        """Transform (b, h, w, channels) under a condition that broadcasts to it; see `PixelCNN.network`."""
        hidden = self.narrow(tf.nn.relu(x)) + self.condition(condition)
        hidden = convolve(self.masked, tf.nn.relu(hidden))
        hidden = self.dropout(tf.nn.relu(hidden), training=training)
        return x + self.widen(hidden)


@keras.saving.register_keras_serializable("oasis_vq")
class PixelCNN(keras.Model):
    """Probability of code grids: of each code given those before it in raster order, and a condition.

    Args:
        config: grid, codebook size, conditions and layers.

    Call: a dictionary with `codes` (batch, h, w) int32 and, where the configuration has them, `slice_index` and
        `label` (batch,) int32 with -1 for unknown, to logits (batch, h, w, num_embeddings) float32.
    """

    def __init__(self, config: PriorConfig | dict, **kwargs):
        super().__init__(**kwargs)
        self.config = config = config if isinstance(config, PriorConfig) else PriorConfig.from_dict(config)
        self.code_embedding = keras.layers.Embedding(config.num_embeddings, config.embedding_dim)
        self.first = MaskedConv2D(config.num_channels, config.first_kernel_size, mask_type="A")
        self.blocks = [
            ResidualBlock(config.num_channels, config.kernel_size, dropout=config.dropout)
            for _ in range(config.num_residual_blocks)
        ]
        self.head = [keras.layers.Dense(config.num_channels, activation="relu") for _ in range(config.num_head_layers)]
        self.to_logits = keras.layers.Dense(config.num_embeddings, dtype="float32")
        # One row more than there are values: the last stands for "unknown".
        self.condition_embeddings = {
            name: keras.layers.Embedding(size + 1, config.num_channels, name=f"{name}_embedding")
            for name, size in self.condition_sizes.items()
        }
        self.position = self.add_weight(
            name="position",
            shape=(*config.grid_shape, config.num_channels) if config.learned_position else (1, 1, 1),
            initializer=keras.initializers.RandomNormal(stddev=0.02) if config.learned_position else "zeros",
            trainable=config.learned_position,
        )
        self.hiding = keras.random.SeedGenerator(config.seed)
        self({"codes": tf.zeros((1, *config.grid_shape), tf.int32)})  # builds every weight

    @property
    def condition_sizes(self) -> dict[str, int]:
        """How many values each condition of this prior has, by name."""
        sizes = dict(zip(CONDITIONS, (self.config.num_slices, self.config.num_labels), strict=True))
        return {name: size for name, size in sizes.items() if size}

    @property
    def first_values(self) -> dict[str, int]:
        """The lowest value of each condition, by name."""
        return dict(zip(CONDITIONS, (self.config.first_slice, 0), strict=True))

    def get_config(self) -> dict:
        return {"config": self.config.to_dict()}

    @property
    def receptive_field(self) -> tuple[int, int]:
        """How many rows up, and columns to each side, the logits of a position can see."""
        reach = self.config.first_kernel_size // 2 + self.config.num_residual_blocks * (self.config.kernel_size // 2)
        return reach, reach

    def call(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        codes = inputs["codes"]
        given = {name: inputs.get(name) for name in self.condition_sizes}
        condition = self.condition_vector(tf.shape(codes)[0], given, training=training)
        return self.network(codes, condition, self.position[None], training=training)

    def condition_vector(self, batch_size: tf.Tensor, given: dict, *, training: bool = False) -> tf.Tensor:
        """Return the sum of the embeddings of the conditions, (batch, 1, 1, num_channels).

        Args:
            batch_size: number of rows.
            given: name to (batch,) int32, -1 or None where unknown.
            training: whether a share `condition_dropout` of the rows is hidden.
        """
        total = tf.zeros((batch_size, self.config.num_channels), self.compute_dtype)
        for name, size in self.condition_sizes.items():
            values = given.get(name)
            values = tf.fill([batch_size], UNKNOWN) if values is None else tf.cast(values, tf.int32)
            if training and self.config.condition_dropout:
                hidden = keras.random.uniform((batch_size,), seed=self.hiding) < self.config.condition_dropout
                values = tf.where(hidden, UNKNOWN, values)
            places = values - self.first_values[name]
            total += self.condition_embeddings[name](tf.where(values == UNKNOWN, size, places))
        return total[:, None, None, :]

    def network(
        self,
        codes: tf.Tensor,
        condition: tf.Tensor,
        position: tf.Tensor,
        convolve: Callable[[MaskedConv2D, tf.Tensor], tf.Tensor] = lambda layer, x: layer(x),
        training: bool = False,
    ) -> tf.Tensor:
        """Return logits (batch, h, w, num_embeddings); the network, written once for training and for sampling.

        Args:
            codes: (batch, h, w) int32.
            condition: broadcasts to (batch, h, w, num_channels).
            position: as condition: the learned vectors of the grid positions.
            convolve: applies a masked convolution. The sampler passes h = w = 1 and a function that remembers
                what the layer has seen at earlier positions.
            training: whether dropout is on.
        """
        x = convolve(self.first, self.code_embedding(codes))
        x += tf.cast(position, x.dtype) + tf.cast(condition, x.dtype)
        for block in self.blocks:
            x = block(x, condition, convolve=convolve, training=training)
        x = tf.nn.relu(x)
        for layer in self.head:
            x = layer(x)
        return self.to_logits(x)

    @tf.function(reduce_retracing=True)
    def _logits(self, codes, slice_index, label) -> tf.Tensor:
        return self({"codes": codes, "slice_index": slice_index, "label": label})

    def logits(
        self, codes: np.ndarray, slice_index: np.ndarray | None = None, label: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the logits of each code given those before it.

        Args:
            codes: (n, h, w), int in [0, num_embeddings).
            slice_index: (n,) int or one int, slice position; None or -1 for unknown.
            label: (n,) int or one int, class; None or -1 for unknown.

        Returns:
            (n, h, w, num_embeddings), float32.
        """
        codes = checked_codes(codes, self.config.grid_shape, self.config.num_embeddings)
        conditions = self.checked_conditions(len(codes), slice_index=slice_index, label=label)
        return in_batches(self._logits, codes, conditions["slice_index"], conditions["label"])

    def log_prob(
        self, codes: np.ndarray, slice_index: np.ndarray | None = None, label: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the log-probability of whole grids, (n,) float32 in nats; arguments as `logits`."""
        codes = checked_codes(codes, self.config.grid_shape, self.config.num_embeddings)
        conditions = self.checked_conditions(len(codes), slice_index=slice_index, label=label)
        return in_batches(self._log_prob, codes, conditions["slice_index"], conditions["label"])

    @tf.function(reduce_retracing=True)
    def _log_prob(self, codes, slice_index, label) -> tf.Tensor:
        logits = self({"codes": codes, "slice_index": slice_index, "label": label})
        return -tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(codes, logits), axis=(1, 2))

    def checked_conditions(self, size: int, **given) -> dict[str, np.ndarray]:
        """Return every condition as (size,) int32, -1 where unknown.

        Raises:
            ValueError: if a value is out of range, or known although the prior is not conditioned on it.
        """
        checked = {}
        for name, values in given.items():
            values = np.broadcast_to(np.asarray(UNKNOWN if values is None else values, np.int32), (size,))
            count, first = self.condition_sizes.get(name, 0), self.first_values[name]
            if not ((values == UNKNOWN) | (values >= first) & (values < first + count)).all():
                known = f"in [{first}, {first + count}), or -1 for unknown"
                known = known if count else "no condition of this prior: leave it out"
                raise ValueError(f"{name} is {known}. Received: {np.unique(values).tolist()}.")
            checked[name] = values
        return checked


@keras.saving.register_keras_serializable("oasis_vq")
class BitsPerCode(keras.metrics.MeanMetricWrapper):
    """Mean cross-entropy of codes under logits, in bits."""

    def __init__(self, name: str = "bits_per_code", **kwargs):
        super().__init__(_bits, name=name, **kwargs)

    def get_config(self) -> dict:
        return {"name": self.name}


def _bits(codes: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return keras.losses.sparse_categorical_crossentropy(codes, logits, from_logits=True) / math.log(2)
