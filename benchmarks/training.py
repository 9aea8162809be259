"""Training steps of a VQ-VAE: ours, ours without its quantizer, and the same network in PyTorch; and of a prior.

python benchmarks/training.py is the process that measures TensorFlow; pytorch.py is the other one. Only one works at a
time, and each uses all cores: in one process their pools of threads disturb each other.
"""

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from turns import Result, in_turns, judged, serve, worker

import oasis_vq as ovq
from oasis_vq.config import VQVAEConfig, start_tensorflow

STEPS = 4
LIMIT = "ours without its quantizer (the limit)"
LEAST_SHARE = 0.85
PRIOR = "prior of default128"
ONE_HOT_PRIOR = "the same with one-hot codes in its first layer"
LEAST_SPEEDUP = 3.0


def make_config() -> VQVAEConfig:
    """Return the configuration that all networks here share."""
    sizes = {"image_size": 256, "batch_size": 16, "num_embeddings": 512, "embedding_dim": 64}
    return dataclasses.replace(ovq.recipe("keras_io").vqvae, **sizes)


def training(scratch: Path) -> Result:
    """VQ-VAE: keras_io at 256×256, batch 16, 4× downsampling, 512 codes × 64. Prior: default128's, 16×16 codes."""
    with contextlib.ExitStack() as stack:
        measures = stack.enter_context(worker("training.py"))
        has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("vector_quantize_pytorch")
        if has_torch:
            measures |= stack.enter_context(worker("pytorch.py", str(scratch)))
        rates = in_turns(measures)
    rows = []
    for name, value in rates.items():
        share = value / rates[LIMIT]
        ours = name.startswith("VQVAE")
        if name not in (PRIOR, ONE_HOT_PRIOR):
            rows.append([name, f"{value:,.1f}", judged(share, LEAST_SHARE) if ours else f"{share:.2f}"])
    if not has_torch:
        rows.append(["PyTorch: not installed (benchmarks/requirements.txt)", "", ""])
    faster = rates[PRIOR] / rates[ONE_HOT_PRIOR]
    prior_rows = [
        [PRIOR, f"{rates[PRIOR]:,.1f}", judged(faster, LEAST_SPEEDUP)],
        [ONE_HOT_PRIOR, f"{rates[ONE_HOT_PRIOR]:,.1f}", "1"],
    ]
    tables = [
        (["network", "images/s", f"share of the limit (ours must be at least {LEAST_SHARE})"], rows),
        (["network", "grids/s", f"times faster (must be at least {LEAST_SPEEDUP:g})"], prior_rows),
    ]
    return tables, {"items_per_second": rates}


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

    def measured(model: keras.Model, batch) -> Callable[[], float]:
        """Return a function that trains a compiled model on this batch for some steps and returns items a second."""
        batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
        model.make_train_function()

        def measure(steps: int = STEPS) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                logs = model.train_function(batches)
            next(iter(logs.values())).numpy()
            return steps * model.config.batch_size / (time.perf_counter() - start)

        measure(2)
        return measure

    def measured_vqvae(model: keras.Model) -> Callable[[], float]:
        model.compile(keras.optimizers.Adam(config.learning_rate))
        return measured(model, images)

    def measured_prior(model: keras.Model) -> Callable[[], float]:
        size = model.config.batch_size
        codes = tf.random.stateless_uniform(
            (size, *model.config.grid_shape), (0, 0), 0, model.config.num_embeddings, tf.int32
        )
        model.compile(
            build_optimizer(model.config, size * STEPS), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        return measured(model, ({"codes": codes, "slice_index": tf.zeros(size, tf.int32)}, codes))

    class OneHot(keras.layers.Layer):
        """Codes (...) to vectors (..., num_embeddings), in place of an embedding."""

        def call(self, codes):
            return tf.one_hot(codes, prior_config.num_embeddings)

    class OneHotPixelCNN(ovq.PixelCNN):
        """A prior whose first layer has a channel for each code."""

        def build_embedding(self):
            return OneHot()

    prior_config = dataclasses.replace(ovq.recipe("default128").prior, num_slices=32)
    one_hot_config = dataclasses.replace(prior_config, embedding_dim=prior_config.num_embeddings)
    priors = {PRIOR: ovq.PixelCNN(prior_config), ONE_HOT_PRIOR: OneHotPixelCNN(one_hot_config)}
    return {name: measured_vqvae(model) for name, model in models.items()} | {
        name: measured_prior(model) for name, model in priors.items()
    }


if __name__ == "__main__":
    start_tensorflow()
    serve(tensorflow_measures())
