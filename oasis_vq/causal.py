"""Layers in which a position of the code grid sees only the positions before it in raster order.

Each computes whole grids (`call`) for training, and one position after the other (`step`) for sampling: what it has
been given at earlier positions is kept in a cache. A first layer leaves out the code of its own position; in a step it
is given that of the position before, the latest that is known.

Sources: van den Oord, Kalchbrenner and Kavukcuoglu 2016a, Pixel Recurrent Neural Networks, arXiv:1601.06759, the
residual stack of masked convolutions; van den Oord et al. 2016b, Conditional Image Generation with PixelCNN Decoders,
arXiv:1606.05328, the gated stacks; Ramachandran et al. 2017, arXiv:1704.06001, the caches.
"""

import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

Step = tuple[tf.Tensor, tf.Tensor]
"""The output of a layer at a position, and its cache."""


@keras.saving.register_keras_serializable("oasis_vq")
class MaskedConv2D(keras.layers.Layer):
    """Convolution, stride 1, that sees only positions before its own in raster order.

    Args:
        filters: channels of the output.
        kernel_size: side of the square window, odd.
        mask_type: 'A' leaves the own position out (first layer), 'B' takes it in.

    Call: (batch, h, w, channels) to (batch, h, w, filters).

    The kernel holds the rows up to the own one only; a mask multiplies it where it is used.

    Source: van den Oord et al. 2016a, section 3.4.
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

    def empty_cache(self, batch_size: int, grid_shape: tuple[int, int]) -> tf.Tensor:
        """Return zeros (radius + 1, w + 2 radius, batch, channels) for the rows up to the own one."""
        shape = (self.radius + 1, grid_shape[1] + 2 * self.radius, batch_size, self.kernel.shape[2])
        return tf.zeros(shape, self.compute_dtype)

    def next_row(self, cache: tf.Tensor) -> tf.Tensor:
        """Return the cache as a row begins."""
        return tf.concat([cache[1:], tf.zeros_like(cache[:1])], axis=0)

    def step(self, x: tf.Tensor, cache: tf.Tensor, index: tf.Tensor, column: tf.Tensor) -> Step:
        """Return the output (batch, 1, 1, filters) at a position, and the cache.

        Args:
            x: (batch, 1, 1, channels), the input at the position; at the position before for type A, zeros if none.
            cache: of the positions before.
            index, column: of the position in raster order and in its row, () int32.
        """
        width = cache.shape[1] - 2 * self.radius
        place = [self.radius, column + self.radius]
        if self.mask_type == "A":
            before_it = [self.radius - 1, width - 1 + self.radius]
            place = tf.where(column > 0, [self.radius, column - 1 + self.radius], before_it)
        cache = tf.tensor_scatter_nd_update(cache, [place], x[None, :, 0, 0])
        window = tf.slice(cache, (0, column, 0, 0), (self.radius + 1, self.kernel_size, *cache.shape[2:]))
        taps = tf.reshape(window, (-1, *cache.shape[2:]))[: self.num_taps]  # (taps, b, c)
        taps = tf.reshape(tf.transpose(taps, (1, 0, 2)), (cache.shape[2], -1))  # (b, taps * c)
        kernel = tf.cast(tf.reshape(self.kernel, (-1, self.filters))[: taps.shape[1]], taps.dtype)
        return (tf.matmul(taps, kernel) + tf.cast(self.bias, taps.dtype))[:, None, None, :], cache


@keras.saving.register_keras_serializable("oasis_vq")
class ResidualBlock(keras.layers.Layer):
    """1x1, masked convolution of type B to half the channels, 1x1 back, a ReLU after each, and the skip.

    As in the keras.io PixelCNN example, whose first 1x1 keeps all channels; a condition is added before its ReLU.

    Args:
        num_channels: channels of input and output.
        kernel_size: side of the masked convolution.
        conditioned: whether there is a condition to add.
        dropout: share of the masked convolution's channels dropped while training.

    Source: van den Oord et al. 2016a, figure 5.
    """

    def __init__(
        self, num_channels: int, kernel_size: int, *, conditioned: bool = True, dropout: float = 0.0, **kwargs
    ):
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.kernel_size = kernel_size
        self.conditioned = conditioned
        self.dropout_rate = dropout
        self.before = keras.layers.Dense(num_channels)
        self.condition = keras.layers.Dense(num_channels, use_bias=False) if conditioned else None
        self.masked = MaskedConv2D(max(1, num_channels // 2), kernel_size, mask_type="B")
        self.dropout = keras.layers.Dropout(dropout)
        self.after = keras.layers.Dense(num_channels)

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("num_channels", "kernel_size", "conditioned")}
        return {**super().get_config(), **own, "dropout": self.dropout_rate}

    def build(self, input_shape) -> None:
        for layer in (self.before, self.condition, self.masked):
            if layer is not None:
                layer.build(input_shape)
        self.after.build((*input_shape[:-1], self.masked.filters))

    def call(
        self,
        x: tf.Tensor,
        condition: tf.Tensor,
        apply: Callable = lambda layer, x: layer(x),
        training: bool = False,
    ) -> tf.Tensor:
        """Transform (b, h, w, channels) under a condition that broadcasts to it; `apply` as in `PixelCNN.network`."""
        hidden = self.before(x)
        if self.conditioned:
            hidden += self.condition(condition)
        hidden = apply(self.masked, tf.nn.relu(hidden))
        hidden = self.dropout(tf.nn.relu(hidden), training=training)
        return x + tf.nn.relu(self.after(hidden))


@keras.saving.register_keras_serializable("oasis_vq")
class CausalConv2D(keras.layers.Layer):
    """Convolution, stride 1, whose window has no future in it, so that it needs no mask.

    Args:
        filters: channels of the output.
        kernel_size: side of the square whose past half is the window, odd.
        stack: 'vertical': the rows up to the own one, columns to both sides; 'horizontal': the own row, up to the own
            column.
        first: whether the own row (vertical) or the own column (horizontal) is left out.

    Call: (batch, h, w, channels) to (batch, h, w, filters).

    Source: van den Oord et al. 2016b, section 2.2.
    """

    def __init__(self, filters: int, kernel_size: int, *, stack: str, first: bool = False, **kwargs):
        super().__init__(**kwargs)
        if stack not in ("vertical", "horizontal"):
            raise ValueError(f"stack is 'vertical' or 'horizontal'. Received: {stack}.")
        if kernel_size % 2 == 0 or (first and kernel_size == 1):
            raise ValueError(f"kernel_size is odd, and in the first layer above 1. Received: {kernel_size}.")
        self.filters = filters
        self.kernel_size = kernel_size
        self.stack = stack
        self.first = first
        self.radius = kernel_size // 2
        past = self.radius + (not first)
        self.window = (past, kernel_size) if stack == "vertical" else (1, past)

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("filters", "kernel_size", "stack", "first")}
        return {**super().get_config(), **own}

    def build(self, input_shape) -> None:
        self.kernel = self.add_weight(name="kernel", shape=(*self.window, input_shape[-1], self.filters))
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.stack == "vertical":
            padded = tf.pad(x, [(0, 0), (self.radius, 0), (self.radius, self.radius), (0, 0)])
            return self._over(padded[:, :-1] if self.first else padded)
        padded = tf.pad(x, [(0, 0), (0, 0), (self.radius, 0), (0, 0)])
        return self._over(padded[:, :, :-1] if self.first else padded)

    def _over(self, windows: tf.Tensor) -> tf.Tensor:
        # Cast: in a step there is no layer call around it that would.
        kernel, bias = (tf.cast(weight, windows.dtype) for weight in (self.kernel, self.bias))
        return tf.nn.conv2d(windows, kernel, strides=1, padding="VALID") + bias

    def empty_cache(self, batch_size: int, grid_shape: tuple[int, int]) -> tf.Tensor:
        """Return zeros (batch, rows, columns, channels) for what a window, or a row of them, covers."""
        columns = grid_shape[1] if self.stack == "vertical" else self.window[1]
        return tf.zeros((batch_size, self.window[0], columns, self.kernel.shape[2]), self.compute_dtype)

    def next_row(self, cache: tf.Tensor) -> tf.Tensor:
        """Return the cache as a row begins: what is left of it is outside the grid."""
        return cache if self.stack == "vertical" else tf.zeros_like(cache)

    def step(self, x: tf.Tensor, cache: tf.Tensor, index: tf.Tensor, column: tf.Tensor) -> Step:
        """Return the output (batch, 1, 1, filters) at a position, in the vertical stack of a row, and the cache.

        Args:
            x: (batch, 1, 1 or w, channels), the input there; of the position, or the row, before in a first layer.
            cache: of what was given before.
            index, column: as in `MaskedConv2D.step`; no matter in the vertical stack.
        """
        if self.stack == "vertical":
            cache = tf.concat([cache[:, 1:], x], axis=1)
            return self._over(tf.pad(cache, [(0, 0), (0, 0), (self.radius, self.radius), (0, 0)])), cache
        if self.first:
            x = tf.where(column > 0, x, tf.zeros_like(x))
        cache = tf.concat([cache[:, :, 1:], x], axis=2)
        kernel = tf.cast(tf.reshape(self.kernel, (-1, self.filters)), x.dtype)
        flat = tf.reshape(cache, (cache.shape[0], kernel.shape[0]))
        return (tf.matmul(flat, kernel) + tf.cast(self.bias, x.dtype))[:, None, None, :], cache


@keras.saving.register_keras_serializable("oasis_vq")
class GatedBlock(keras.layers.Layer):
    """One layer of the vertical stack, which sees the rows above, and of the horizontal one, which sees the own row.

    Both are conditioned in their gates, by a linear map of what is known of the grid and of the position.

    Args:
        num_channels: channels of both stacks, and of the skip connection.
        kernel_size: of the convolutions.
        first: whether it is the first block: the own code is left out, and there is no residual connection.
        last: whether it is the last block: of what it makes only the skip connection is used, and only that is made.
        dropout: share of the channels of the horizontal gate dropped while training.

    Source: van den Oord et al. 2016b, equation 4 and figure 2. The skip connections to the head are of van den Oord
        et al. 2016, WaveNet, arXiv:1609.03499; the vertical stack has residual connections too.
    """

    def __init__(
        self,
        num_channels: int,
        kernel_size: int,
        *,
        first: bool = False,
        last: bool = False,
        dropout: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.kernel_size = kernel_size
        self.first = first
        self.last = last
        self.dropout_rate = dropout
        inner = 2 * num_channels
        self.vertical = CausalConv2D(inner, kernel_size, stack="vertical", first=first)
        self.horizontal = CausalConv2D(inner, kernel_size, stack="horizontal", first=first)
        self.vertical_condition = None if last else keras.layers.Dense(inner, use_bias=False)
        self.horizontal_condition = keras.layers.Dense(inner, use_bias=False)
        self.vertical_to_horizontal = keras.layers.Dense(inner, use_bias=False)
        self.dropout = keras.layers.Dropout(dropout)
        self.residual = None if last else keras.layers.Dense(num_channels)
        self.skip = keras.layers.Dense(num_channels)

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in ("num_channels", "kernel_size", "first", "last")}
        return {**super().get_config(), **own, "dropout": self.dropout_rate}

    def build(self, input_shape) -> None:
        channels, inner = ((*input_shape[:-1], factor * self.num_channels) for factor in (1, 2))
        for layer in (self.vertical, self.horizontal):
            layer.build(input_shape)
        for layer in (self.vertical_condition, self.horizontal_condition, self.residual, self.skip):
            if layer is not None:
                layer.build(channels)
        self.vertical_to_horizontal.build(inner)

    def down(self, x: tf.Tensor, given: Sequence[tf.Tensor], apply: Callable) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the vertical stack (b, h, w, channels), and what the horizontal one hears of it (b, h, w, 2 channels).

        Args:
            x: (b, h, w, channels), the vertical stack so far.
            given: conditions, each broadcasts to it.
            apply: as in `PixelCNN.network`.
        """
        hidden = apply(self.vertical, x)
        heard = self.vertical_to_horizontal(hidden)
        if self.last:
            return x, heard
        hidden = _gate(hidden + sum(self.vertical_condition(values) for values in given))
        return hidden if self.first else x + hidden, heard

    def along(
        self, x: tf.Tensor, heard: tf.Tensor, given: Sequence[tf.Tensor], apply: Callable, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the horizontal stack and the skip connection, both (b, h, w, channels); arguments as `down`."""
        hidden = apply(self.horizontal, x) + heard + sum(self.horizontal_condition(values) for values in given)
        hidden = self.dropout(_gate(hidden), training=training)
        if self.last:
            return x, self.skip(hidden)
        onward = self.residual(hidden)
        return onward if self.first else x + onward, self.skip(hidden)


def _gate(x: tf.Tensor) -> tf.Tensor:
    signal, gate = tf.split(x, 2, axis=-1)
    return tf.tanh(signal) * tf.sigmoid(gate)


@keras.saving.register_keras_serializable("oasis_vq")
class CausalAttention(keras.layers.Layer):
    """Attention of each position to itself and to all before it in raster order.

    Args:
        num_channels: channels of the input, which at each position knows only its past, and of the output.
        num_heads: a divisor of num_channels.

    Call: (batch, h, w, num_channels) to the same.

    Source: Chen et al. 2018, PixelSNAIL, arXiv:1712.09763; Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def __init__(self, num_channels: int, num_heads: int, **kwargs):
        super().__init__(**kwargs)
        if num_channels % num_heads:
            raise ValueError(f"num_heads divides num_channels ({num_channels}). Received: {num_heads}.")
        self.num_channels = num_channels
        self.num_heads = num_heads
        self.to_heads = keras.layers.Dense(3 * num_channels, use_bias=False)
        self.from_heads = keras.layers.Dense(num_channels)

    def get_config(self) -> dict:
        return {**super().get_config(), "num_channels": self.num_channels, "num_heads": self.num_heads}

    def build(self, input_shape) -> None:
        self.to_heads.build(input_shape)
        self.from_heads.build(input_shape)

    def _heads(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Return queries, keys and values, each (batch, heads, positions, channels of a head)."""
        size = self.num_channels // self.num_heads
        parts = tf.reshape(self.to_heads(x), (tf.shape(x)[0], math.prod(x.shape[1:3]), 3, self.num_heads, size))
        return tf.unstack(tf.transpose(parts, (2, 0, 3, 1, 4)))

    def _attend(self, queries: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        scores = tf.matmul(queries, keys, transpose_b=True) / math.sqrt(queries.shape[-1])
        scores = tf.where(allowed, tf.cast(scores, tf.float32), -np.inf)  # (b, heads, queries, keys)
        mixed = tf.matmul(tf.cast(tf.nn.softmax(scores), values.dtype), values)
        mixed = tf.transpose(mixed, (0, 2, 1, 3))  # (b, queries, heads, channels of a head)
        return self.from_heads(tf.reshape(mixed, (tf.shape(mixed)[0], mixed.shape[1], self.num_channels)))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        places = tf.range(math.prod(x.shape[1:3]))
        return tf.reshape(self._attend(*self._heads(x), places <= places[:, None]), tf.shape(x))

    def empty_cache(self, batch_size: int, grid_shape: tuple[int, int]) -> tf.Tensor:
        """Return zeros (h * w, 2, batch, heads, channels of a head) for keys and values."""
        shape = (math.prod(grid_shape), 2, batch_size, self.num_heads, self.num_channels // self.num_heads)
        return tf.zeros(shape, self.compute_dtype)

    def next_row(self, cache: tf.Tensor) -> tf.Tensor:
        """Return the cache as a row begins."""
        return cache

    def step(self, x: tf.Tensor, cache: tf.Tensor, index: tf.Tensor, column: tf.Tensor) -> Step:
        """Return the output (batch, 1, 1, num_channels) at a position, and the cache.

        Args:
            x: (batch, 1, 1, num_channels).
            cache: of the positions before.
            index, column: as in `MaskedConv2D.step`.
        """
        queries, keys, values = self._heads(x)
        cache = tf.tensor_scatter_nd_update(cache, [[index]], tf.stack([keys, values])[None, :, :, :, 0])
        allowed = tf.range(cache.shape[0]) <= index
        known = tf.transpose(cache, (1, 2, 3, 0, 4))  # (2, b, heads, h * w, channels of a head)
        return self._attend(queries, known[0], known[1], allowed)[:, None], cache
