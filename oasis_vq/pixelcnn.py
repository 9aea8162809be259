"""The PixelCNN prior: an autoregressive model of code grids in raster order.

Source: van den Oord et al. 2016b, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from oasis_vq.causal import CausalAttention, GatedBlock, MaskedConv2D, ResidualBlock
from oasis_vq.config import PriorConfig
from oasis_vq.devices import reported, shares_of_mean
from oasis_vq.runtime import in_precision
from oasis_vq.vqvae import VERB_BATCH_SIZE, VQVAE, checked_codes, in_batches

CONDITIONS = ("slice_index", "label")
INPUTS = ("codes", *CONDITIONS, "draft")
UNKNOWN = -1
"""Value of a condition that is not known."""
MOST_VALUES = 2**25
"""Values of a layer that are computed at once: 128 MB of them."""


@keras.saving.register_keras_serializable("oasis_vq")
class PixelCNN(keras.Model):
    """Probability of code grids: of each code given those before it in raster order, and a condition.

    Args:
        config: grid, codebook size, conditions and layers.

    Call: a dictionary with `codes` (batch, h, w) int32 and, where the configuration has them, `slice_index` and
        `label` (batch,) int32 with -1 for unknown, and `draft` (batch, h, w) int32 where the prior refines drafts,
        to logits (batch, h, w, num_embeddings) float32.
    """

    score = "bits_per_code"
    """What is to fall in validation."""
    drafter: "Drafter | None" = None
    """What makes the drafts, if the prior refines some; set where it is loaded or trained."""

    def __init__(self, config: PriorConfig | dict, **kwargs):
        config = config if isinstance(config, PriorConfig) else PriorConfig.from_dict(config)
        super().__init__(**{**kwargs, "dtype": config.precision})
        self.config = config
        with in_precision(config.precision):
            self._build_layers()
        self.hiding = keras.random.SeedGenerator(config.seed)
        self._bits = keras.metrics.Mean("bits_per_code")
        self._accuracy = keras.metrics.SparseCategoricalAccuracy("accuracy")
        self(dict.fromkeys(("codes", "draft"), tf.zeros((1, *config.grid_shape), tf.int32)))  # builds every weight

    def build(self, input_shape=None) -> None:
        """Do nothing: every weight is built where the model is made. Keras would trace the whole network for it."""

    def _build_layers(self) -> None:
        config = self.config
        self.code_embedding = self.build_embedding()
        channels, dropout = config.num_channels, {"dropout": config.dropout}
        if config.architecture == "gated":
            kernels = [config.first_kernel_size, *[config.kernel_size] * config.num_residual_blocks]
            self.blocks = [
                GatedBlock(channels, kernel, first=number == 0, last=number == len(kernels) - 1, **dropout)
                for number, kernel in enumerate(kernels)
            ]
            for block in self.blocks:  # they are not called as layers
                block.build((None, *config.grid_shape, config.embedding_dim if block.first else channels))
        else:
            self.first = MaskedConv2D(channels, config.first_kernel_size, mask_type="A")
            self.blocks = [
                ResidualBlock(channels, config.kernel_size, conditioned=bool(self.condition_sizes), **dropout)
                for _ in range(config.num_residual_blocks)
            ]
        # Spread among the blocks, none at either end.
        places = np.linspace(0, len(self.blocks), config.num_attention_layers + 2)[1:-1].round().astype(int)
        self.attention = {int(place): CausalAttention(channels, config.num_attention_heads) for place in places}
        self.head = [keras.layers.Dense(channels, activation="relu") for _ in range(config.num_head_layers)]
        self.to_logits = keras.layers.Dense(config.num_embeddings, dtype="float32")
        if config.refines:
            self.of_draft = keras.Sequential([
                keras.Input(config.grid_shape, dtype="int32"),
                keras.layers.Embedding(config.num_embeddings, channels, keras.initializers.RandomNormal(stddev=1.0)),
                keras.layers.Conv2D(channels, 5, padding="same", activation="relu"),
                keras.layers.Conv2D(channels, 3, padding="same"),
            ])  # fmt: skip
        # One row more than there are values: the last stands for "unknown".
        self.condition_embeddings = {
            name: keras.layers.Embedding(size + 1, config.num_channels, name=f"{name}_embedding")
            for name, size in self.condition_sizes.items()
        }
        self.position = self.add_weight(
            name="position",
            shape=(*(config.grid_shape if config.learned_position else (1, 1)), config.num_channels),
            initializer=keras.initializers.RandomNormal(stddev=0.02) if config.learned_position else "zeros",
            trainable=config.learned_position,
        )

    def build_embedding(self) -> keras.layers.Layer:
        """Return the layer from codes (...) to vectors (..., embedding_dim); the place for an experiment."""
        return keras.layers.Embedding(self.config.num_embeddings, self.config.embedding_dim)

    @property
    def condition_sizes(self) -> dict[str, int]:
        """How many values each condition of this prior has, by name."""
        sizes = dict(zip(CONDITIONS, (self.config.num_slices, self.config.num_labels), strict=True))
        return {name: size for name, size in sizes.items() if size}

    @property
    def first_values(self) -> dict[str, int]:
        """The lowest value of each condition, by name."""
        return dict(zip(CONDITIONS, (self.config.first_slice, 0), strict=True))

    @property
    def known_values(self) -> dict[str, np.ndarray]:
        """The values of each condition that this prior was trained with, rising, by name."""
        values = {name: self.first_values[name] + np.arange(size) for name, size in self.condition_sizes.items()}
        if "slice_index" in values:
            values["slice_index"] = np.setdiff1d(values["slice_index"], self.config.skipped_slices)
        return values

    def get_config(self) -> dict:
        return {"config": self.config.to_dict()}

    @property
    def receptive_field(self) -> tuple[int, int]:
        """How many rows up, and columns to each side, the logits of a position can see.

        With attention that is all that the positions before it have seen: the grid, but for the last code of the row
        above where that is out of sight of the convolutions.
        """
        return self.config.grid_shape if self.attention else (self._reach, self._reach)

    @property
    def _reach(self) -> int:
        return self.config.first_kernel_size // 2 + self.config.num_residual_blocks * (self.config.kernel_size // 2)

    @property
    def has_blind_spot(self) -> bool:
        """Whether codes to the upper right are out of sight however far the network sees: in one masked stack."""
        first = self.config.first_kernel_size // 2
        return self.config.architecture == "residual" and not self.attention and first < max(self.config.grid_shape) - 1

    @property
    def sees_all(self) -> bool:
        """Whether the receptive field reaches over the whole grid, without a blind spot."""
        (up, aside), (rows, columns) = self.receptive_field, self.config.grid_shape
        return up >= rows - 1 and aside >= columns - 1 and not self.has_blind_spot

    @property
    def sight(self) -> str:
        """A sentence that compares the receptive field with the grid."""
        (up, aside), (rows, columns) = self.receptive_field, self.config.grid_shape
        text = f"A position sees {up} rows up and {aside} columns to each side; the grid is {rows}x{columns}"
        if self.has_blind_spot:
            text += ", and to the upper right is a blind spot: gated stacks or attention have none"
        elif self.sees_all:
            unseen = f", but for the last code of the row above where that is over {self._reach} columns away"
            return f"{text}: all of it{unseen if self._reach < columns - 1 else ''}."
        return f"{text}. Larger kernels, more blocks or attention see further."

    def summary(self, *args, print_fn: Callable[[str], object] = print, **kwargs) -> None:
        """Print the layers as Keras does, and how far the network sees."""
        super().summary(*args, print_fn=print_fn, **kwargs)
        print_fn(self.sight)

    @property
    def layers_with_memory(self) -> list[keras.layers.Layer]:
        """The layers in which positions meet, each with a `step`."""
        if self.config.architecture == "gated":
            layers = [layer for block in self.blocks for layer in (block.vertical, block.horizontal)]
        else:
            layers = [self.first, *(block.masked for block in self.blocks)]
        return [*layers, *self.attention.values()]

    def call(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        codes = inputs["codes"]
        given = {name: inputs.get(name) for name in self.condition_sizes}
        condition = self.condition_vector(tf.shape(codes)[0], given, training=training)
        return self.network(codes, condition, self.places(inputs.get("draft")), training=training)

    def places(self, draft: tf.Tensor | None = None) -> tf.Tensor:
        """Return vectors of the positions, (1, h, w, num_channels), or (b, h, w, num_channels) of those of drafts.

        Args:
            draft: (b, h, w) int32, if the prior refines drafts.
        """
        shape = (*self.config.grid_shape, self.config.num_channels)
        places = tf.cast(tf.broadcast_to(self.position, shape), self.compute_dtype)[None]
        return places + self.of_draft(draft) if self.config.refines else places

    def condition_vector(self, batch_size: tf.Tensor, given: dict, *, training: bool = False) -> tf.Tensor:
        """Return the sum of the embeddings of the conditions, (batch, 1, 1, num_channels).

        Args:
            batch_size: number of rows.
            given: name to (batch,) int32, -1 or None where unknown.
            training: whether a share `condition_dropout` of the rows is hidden.
        """
        total = tf.zeros((batch_size, self.config.num_channels), self.compute_dtype)
        share, count = self.config.condition_dropout, len(self.condition_sizes)
        hides = training and share and count
        draw = self._draw_whom_to_hide(batch_size) / share if hides else None  # hidden where below 1
        for number, (name, size) in enumerate(self.condition_sizes.items()):
            values = given.get(name)
            values = tf.fill([batch_size], UNKNOWN) if values is None else tf.cast(values, tf.int32)
            if hides:
                own = (draw >= 0.5 + number / count / 2) & (draw < 0.5 + (number + 1) / count / 2)
                values = tf.where((draw < 0.5) | own, UNKNOWN, values)
            places = values - self.first_values[name]
            total += self.condition_embeddings[name](tf.where(values == UNKNOWN, size, places))
        return total[:, None, None, :]

    def _draw_whom_to_hide(self, batch_size: int | tf.Tensor) -> tf.Tensor:
        """Return numbers (batch,) in [0, 1), of those for all devices the part for the batch of this one."""
        replicas = tf.distribute.get_replica_context()
        drawn = keras.random.uniform((replicas.num_replicas_in_sync * batch_size,), seed=self.hiding)
        return drawn[replicas.replica_id_in_sync_group * batch_size :][:batch_size]

    def network(self, codes: tf.Tensor, condition: tf.Tensor, position: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return logits (batch, h, w, num_embeddings) of whole grids; see `down` and `along`."""
        embedded = self.code_embedding(codes)
        heard = self.down(embedded, condition, position)
        return self.along(embedded, heard, condition, position, training=training)

    def down(
        self,
        embedded: tf.Tensor,
        condition: tf.Tensor,
        position: tf.Tensor,
        apply: Callable[[keras.layers.Layer, tf.Tensor], tf.Tensor] = lambda layer, x: layer(x),
    ) -> list[tf.Tensor]:
        """Return what each gated block's horizontal stack hears of the rows above, (batch, h, w, 2 num_channels).

        The network is written once for training and for sampling. The sampler passes one row to `down`, one position
        to `along`, and an `apply` that remembers what a layer has been given there before.

        Args:
            embedded: (batch, h, w, embedding_dim), vectors of the codes.
            condition: broadcasts to (batch, h, w, num_channels).
            position: as condition: the learned vectors of the grid positions.
            apply: applies a layer in which positions meet.
        """
        if self.config.architecture == "residual":
            return []
        x, heard = embedded, []
        for block in self.blocks:
            x, told = block.down(x, (condition, position), apply)
            heard.append(told)
        return heard

    def along(
        self,
        embedded: tf.Tensor,
        heard: list[tf.Tensor],
        condition: tf.Tensor,
        position: tf.Tensor,
        apply: Callable[[keras.layers.Layer, tf.Tensor], tf.Tensor] = lambda layer, x: layer(x),
        training: bool = False,
    ) -> tf.Tensor:
        """Return logits (batch, h, w, num_embeddings), given what `down` returned; arguments as there.

        In the residual architecture, which has one stack, this is the whole network.
        """
        gated = self.config.architecture == "gated"
        x = embedded
        if not gated:
            x = tf.nn.relu(apply(self.first, x) + tf.cast(position, self.compute_dtype) + condition)
        skips = 0
        for number, block in enumerate(self.blocks):
            if number in self.attention:
                x += apply(self.attention[number], x)
            if gated:
                x, skip = block.along(x, heard[number], (condition, position), apply, training)
                skips += skip
            else:
                x = block(x, condition, apply=apply, training=training)
        x = tf.nn.relu(skips if gated else x)
        for layer in self.head:
            x = layer(x)
        return self.to_logits(x)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None) -> None:
        """Do nothing: the network is built. Keras' own builds it from a batch, and among workers no dict is one."""

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return [self._bits, self._accuracy]

    def train_step(self, data) -> dict[str, tf.Tensor]:
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            logits, nats = self._logits_and_nats(inputs, training=True)
            scaled = self.optimizer.scale_loss(tf.reduce_mean(nats))
        gradients = shares_of_mean(tape.gradient(scaled, self.trainable_variables))
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self._record(inputs["codes"], logits, nats)

    def test_step(self, data) -> dict[str, tf.Tensor]:
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self._record(inputs["codes"], *self._logits_and_nats(inputs, training=False))

    def _logits_and_nats(self, inputs: dict[str, tf.Tensor], *, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the logits (b, h, w, k), and what each code costs (b, h, w) in nats."""
        logits = self(inputs, training=training)
        return logits, tf.nn.sparse_softmax_cross_entropy_with_logits(inputs["codes"], logits)

    def _record(self, codes: tf.Tensor, logits: tf.Tensor, nats: tf.Tensor) -> dict[str, tf.Tensor]:
        self._bits.update_state(nats / math.log(2))
        self._accuracy.update_state(codes, logits)
        return reported({metric.name: metric.result() for metric in self.metrics})

    @property
    def verb_batch_size(self) -> int:
        """How many grids the verbs put through the network at once."""
        positions = math.prod(self.config.grid_shape)
        widest = max(self.config.num_embeddings, self.config.num_channels, len(self.attention) and positions)
        return max(1, min(VERB_BATCH_SIZE, MOST_VALUES // (positions * widest)))

    @tf.function(reduce_retracing=True, autograph=False)
    def _logits(self, *inputs: tf.Tensor) -> tf.Tensor:
        return self(dict(zip(INPUTS, inputs, strict=True)))

    def logits(
        self,
        codes: np.ndarray,
        slice_index: np.ndarray | None = None,
        label: np.ndarray | None = None,
        draft: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the logits of each code given those before it.

        Args:
            codes: (n, h, w), int in [0, num_embeddings).
            slice_index: (n,) int or one int, slice position; None or -1 for unknown.
            label: (n,) int or one int, class; None or -1 for unknown.
            draft: (n, h, w), int, if the prior refines drafts.

        Returns:
            (n, h, w, num_embeddings), float32.
        """
        return self._in_batches(self._logits, codes, draft, slice_index=slice_index, label=label)

    def log_prob(
        self,
        codes: np.ndarray,
        slice_index: np.ndarray | None = None,
        label: np.ndarray | None = None,
        draft: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the log-probability of whole grids, (n,) float32 in nats; arguments as `logits`."""
        return self._in_batches(self._log_prob, codes, draft, slice_index=slice_index, label=label)

    @tf.function(reduce_retracing=True, autograph=False)
    def _log_prob(self, *inputs: tf.Tensor) -> tf.Tensor:
        _, nats = self._logits_and_nats(dict(zip(INPUTS, inputs, strict=True)), training=False)
        return -tf.reduce_sum(nats, axis=(1, 2))

    def _in_batches(self, function: Callable, codes: np.ndarray, draft: np.ndarray | None, **given) -> np.ndarray:
        codes = checked_codes(codes, self.config.grid_shape, self.config.num_embeddings)
        draft, conditions = self.checked_draft(len(codes), draft), self.checked_conditions(len(codes), **given)
        arrays = (codes, *(conditions[name] for name in CONDITIONS), draft)
        return in_batches(function, *arrays, batch_size=self.verb_batch_size)

    def checked_draft(self, size: int, draft: np.ndarray | None) -> np.ndarray | None:
        """Return drafts (size, h, w) int32, None if the prior does not refine any.

        Raises:
            ValueError: if they are not grids of codes, or missing, or given although the prior does not refine any.
        """
        if self.config.refines != (draft is not None):
            wanted = "refines a draft" if self.config.refines else "is of codes alone, without a draft"
            raise ValueError(f"This prior {wanted}. Received: draft {'None' if draft is None else np.shape(draft)}.")
        if draft is None:
            return None
        draft = checked_codes(draft, self.config.grid_shape, self.config.num_embeddings)
        if len(draft) != size:
            raise ValueError(f"There is a draft for each of {size} grids. Received: {len(draft)} drafts.")
        return draft

    def known_conditions(self, slice_index: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
        """Return these conditions (n,) by name, -1 where this prior does not know the value: what it can be told."""
        values = zip(CONDITIONS, (slice_index, label), strict=True)
        return {name: np.where(np.isin(of, self.known_values.get(name, ())), of, UNKNOWN) for name, of in values}

    def checked_conditions(self, size: int, **given) -> dict[str, np.ndarray]:
        """Return every condition as (size,) int32, -1 where unknown.

        Raises:
            ValueError: if a value is no whole number or out of range, or known although the prior is not conditioned
                on it, or unknown although in training it never was.
        """
        checked = {}
        for name, values in given.items():
            values = np.asarray(UNKNOWN if values is None else values)
            if not np.issubdtype(values.dtype, np.integer) or values.shape not in ((), (1,), (size,)):
                received = f"{values.shape} {values.dtype}"
                raise ValueError(f"{name} is a whole number, or ({size},) of them. Received: {received}.")
            count, first = self.condition_sizes.get(name, 0), self.first_values[name]
            if not np.isin(values, [UNKNOWN, *self.known_values.get(name, ())]).all():
                skipped = list(self.config.skipped_slices) if name == "slice_index" else []
                known = f"in [{first}, {first + count}){f' without {skipped}' if skipped else ''}, or -1 for unknown"
                known = known if count else "no condition of this prior: leave it out"
                raise ValueError(f"{name} is {known}. Received: {np.unique(values).tolist()}.")
            if count and not self.config.condition_dropout and (values == UNKNOWN).any():
                raise ValueError(
                    f"{name} is told to this prior, which was never without it in training (condition_dropout=0). "
                    "Received: None or -1."
                )
            checked[name] = np.broadcast_to(values.astype(np.int32), (size,))
        return checked


@dataclass(frozen=True)
class Drafter:
    """Makes the drafts that a prior refines: what is coarse is decoded, and encoded with finer codes.

    Attributes:
        prior: draws coarse grids.
        coarse: the VQ-VAE of these grids.
        fine: the VQ-VAE of the drafts.
    """

    prior: PixelCNN
    coarse: VQVAE
    fine: VQVAE

    def of_codes(self, codes: np.ndarray) -> np.ndarray:
        """Return the drafts (n, h, w) int32 of coarse grids (n, H, W)."""
        return self.fine.encode(self.coarse.decode(codes))

    def of_images(self, images: np.ndarray) -> np.ndarray:
        """Return the drafts (n, h, w) int32 of images (n, size, size, 1)."""
        return self.of_codes(self.coarse.encode(images))
