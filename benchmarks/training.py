"""Training steps of a VQ-VAE: ours, ours without its quantizer, and the same network in PyTorch; and of a prior.

python benchmarks/training.py is the process that measures TensorFlow; pytorch.py is the other one. Only one works at a
time, and each uses all cores: in one process their pools of threads disturb each other.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

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
        one_hot = priors.get(name + ONE_HOT)
        prior_rows.append([name, f"{value:,.1f}", judged(value / one_hot, LEAST_SPEEDUP) if one_hot else "1"])
    tables = [
        (["network", "images/s", f"share of the limit (ours must be at least {LEAST_SHARE})"], rows),
        (["network", "grids/s", f"times faster (must be at least {LEAST_SPEEDUP:g})"], prior_rows),
    ]
    return tables, {"items_per_second": rates | priors}


def tensorflow_measures() -> dict[str, Callable[[], float]]:
    """Return functions that train for a few steps on images in memory and return images a second."""
    import keras
    import tensorflow as tf

    from oasis_vq.training import build_optimizer
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

    measures = {name: measured_vqvae(model) for name, model in models.items()}
    for recipe in PRIORS:
        prior_config = dataclasses.replace(
            ovq.recipe(recipe).prior, grid_shape=(16, 16), num_embeddings=config.num_embeddings, batch_size=32
        )
        one_hot_config = dataclasses.replace(prior_config, embedding_dim=prior_config.num_embeddings)
        measures[f"prior of {recipe}"] = measured_prior(ovq.PixelCNN(prior_config))
        measures[f"prior of {recipe}{ONE_HOT}"] = measured_prior(OneHotPixelCNN(one_hot_config))
    return measures


if __name__ == "__main__":
    start_tensorflow()
    serve(tensorflow_measures())
