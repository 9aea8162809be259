"""Training steps of a VQ-VAE: ours, ours without its quantizer, and the same network in PyTorch; and of a prior.

python benchmarks/training.py is the process that measures TensorFlow; pytorch.py is the other one. Only one works at a
time, and each uses all cores: in one process their pools of threads disturb each other.
"""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from turns import Result, in_turns, judged, serve, training_rate, worker

import oasis_vq as ovq
from oasis_vq.config import VQVAEConfig
from oasis_vq.runtime import start_tensorflow

STEPS, TURNS = 2, 15
"""Of each network in a turn, and turns: single steps scatter by a quarter where others use the machine."""
LIMIT = "ours without its quantizer (the limit)"
LEAST_SHARE = 0.85
PRIORS = ("default128", "keras_io")
"""Recipes whose priors are measured, for 16×16 codes of 512, batch 32."""
ONE_HOT = ", one-hot codes in its first layer"
MASKED = ONE_HOT + ", whole window times a mask as in the keras.io example"
LEAST_SPEEDUP = 3.0


def make_config() -> VQVAEConfig:
    """Return the configuration that all networks here share."""
    sizes = {"image_size": 256, "batch_size": 16, "num_embeddings": 512, "embedding_dim": 64}
    return dataclasses.replace(ovq.recipe("keras_io").vqvae, **sizes)


def training(scratch: Path) -> Result:
    """VQ-VAE: keras_io at 256×256, batch 16, 4× downsampling, 512 codes × 64. Priors: 16×16 codes, batch 32."""
    with contextlib.ExitStack() as stack:
        measures = stack.enter_context(worker("training.py"))
        has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("vector_quantize_pytorch")
        if has_torch:
            measures |= stack.enter_context(worker("pytorch.py", str(scratch)))
        rates = in_turns(measures, TURNS)
    rows = []
    priors = {name: rates.pop(name) for name in list(rates) if name.startswith("prior of ")}
    for name, value in rates.items():
        share = value / rates[LIMIT]
        ours = name.startswith("VQVAE")
        rows.append([name, f"{value:,.1f}", judged(share, LEAST_SHARE) if ours else f"{share:.2f}"])
    if not has_torch:
        rows.append(["PyTorch: not installed (benchmarks/requirements.txt)", "", ""])
    prior_rows = []
    for name, value in priors.items():
        peers = [priors.get(name + peer) for peer in (MASKED, ONE_HOT)]
        judgements = [judged(value / peers[0], LEAST_SPEEDUP), f"{value / peers[1]:.2f}"] if all(peers) else ["", ""]
        prior_rows.append([name, f"{value:,.1f}", *judgements])
    tables = [
        (["network", "images/s", f"share of the limit (ours must be at least {LEAST_SHARE})"], rows),
        (
            [
                "network",
                "grids/s",
                f"times faster than its one-hot twin with a mask (must be at least {LEAST_SPEEDUP:g})",
                "than that without the part behind the mask",
            ],
            prior_rows,
        ),
    ]
    return tables, {"items_per_second": rates | priors}


def tensorflow_measures() -> dict[str, Callable[[], float]]:
    """Return functions that train for a few steps on images in memory and return images a second."""
    import keras
    import tensorflow as tf

    from oasis_vq.causal import GatedBlock
    from oasis_vq.preparation import build_optimizer
    from oasis_vq.vqvae import build_decoder, build_encoder, pixel_loss

    class WithoutQuantizer(keras.Model):
        """Encoder and decoder of a VQ-VAE, trained with the same pixel loss."""

        def __init__(self, config: VQVAEConfig):
            super().__init__()
            self.config = config
            self.encoder, self.decoder = build_encoder(config), build_decoder(config)
            self.mean_loss = keras.metrics.Mean("reconstruction_loss")

        def call(self, images, training=False):
            return self.decoder(self.encoder(images, training=training), training=training)

        def train_step(self, images):
            with tf.GradientTape() as tape:
                loss = pixel_loss(self.config.loss, images, self(images, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            self.mean_loss.update_state(loss)
            return {"reconstruction_loss": self.mean_loss.result()}

    config = make_config()
    size = config.image_size
    images = tf.random.stateless_uniform((config.batch_size, size, size, 1), seed=(0, 0))
    models = {
        LIMIT: WithoutQuantizer(config),
        "VQVAE, codebook by gradient": ovq.VQVAE(config),
        "VQVAE, codebook by moving averages": ovq.VQVAE(dataclasses.replace(config, quantizer="ema")),
    }

    def measured_vqvae(model: keras.Model) -> Callable[[], float]:
        model.compile(keras.optimizers.Adam(config.learning_rate))
        return training_rate(model, images, steps=STEPS)

    def measured_prior(model: keras.Model) -> Callable[[], float]:
        size = model.config.batch_size
        codes = tf.random.stateless_uniform(
            (size, *model.config.grid_shape), (0, 0), 0, model.config.num_embeddings, tf.int32
        )
        model.compile(build_optimizer(model.config, size * STEPS))
        return training_rate(model, {"codes": codes, "slice_index": tf.zeros(size, tf.int32)}, steps=STEPS)

    class OneHot(keras.layers.Layer):
        """Codes (...) to vectors (..., num_embeddings), in place of an embedding."""

        def call(self, codes):
            return tf.one_hot(codes, config.num_embeddings)

    class OneHotPixelCNN(ovq.PixelCNN):
        """A prior whose first layer has a channel for each code."""

        def build_embedding(self):
            return OneHot()

    class WholeWindow(keras.layers.Layer):
        """Convolution whose window, (rows, columns), is centred and multiplied by a mask that hides its future."""

        def __init__(self, filters: int, window: tuple[int, int], past: int):
            super().__init__()
            self.filters, self.window = filters, window
            visible = np.arange(math.prod(window)) < past  # in raster order
            self.mask = visible.reshape(*window, 1, 1).astype(np.float32)

        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=(*self.window, input_shape[-1], self.filters))
            self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

        def call(self, x):
            return tf.nn.conv2d(x, self.kernel * self.mask, strides=1, padding="SAME") + self.bias

    class MaskedGatedBlock(GatedBlock):
        """The same block, with such windows if it is the first."""

        def __init__(self, num_channels, kernel_size, **kwargs):
            super().__init__(num_channels, kernel_size, **kwargs)
            if self.first:
                side, before = kernel_size, kernel_size // 2
                self.vertical = WholeWindow(2 * num_channels, (side, side), before * side)
                self.horizontal = WholeWindow(2 * num_channels, (1, side), before)

    class MaskedOneHotPixelCNN(OneHotPixelCNN):
        """The same with windows in its first layer as published systems have them: whole, times a mask."""

        def _build_layers(self):
            with mock.patch("oasis_vq.pixelcnn.GatedBlock", MaskedGatedBlock):
                super()._build_layers()
            if self.config.architecture == "residual":
                side, before = self.config.first_kernel_size, self.config.first_kernel_size // 2
                self.first = WholeWindow(self.config.num_channels, (side, side), before * side + before)

    measures = {name: measured_vqvae(model) for name, model in models.items()}
    for recipe in PRIORS:
        prior_config = dataclasses.replace(
            ovq.recipe(recipe).prior, grid_shape=(16, 16), num_embeddings=config.num_embeddings, batch_size=32
        )
        one_hot_config = dataclasses.replace(prior_config, embedding_dim=prior_config.num_embeddings)
        measures[f"prior of {recipe}"] = measured_prior(ovq.PixelCNN(prior_config))
        measures[f"prior of {recipe}{ONE_HOT}"] = measured_prior(OneHotPixelCNN(one_hot_config))
        measures[f"prior of {recipe}{MASKED}"] = measured_prior(MaskedOneHotPixelCNN(one_hot_config))
    return measures


if __name__ == "__main__":
    start_tensorflow()
    serve(tensorflow_measures())
