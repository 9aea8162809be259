"""The quantizers alone, forward and backward, against the formulation with explicit distances and a one-hot matrix."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from turns import Result, in_its_own_process, in_turns, judged, memory_rise

import oasis_vq as ovq

SHAPE = (16, 64, 64, 64)
"""Latents: what a batch of 16 images of 256x256 becomes at 4x downsampling."""
NUM_EMBEDDINGS = 512
CALLS = 5
LEAST_SPEEDUP, MOST_MEMORY = 2.0, 0.5


class OneHotQuantizer(keras.layers.Layer):
    """The peer: all distances in one matrix (n, k), and the lookup as the product of a one-hot matrix (n, k).

    Source: the formulation of the keras.io example "Vector-Quantized Variational Autoencoders".
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, commitment_cost: float = 0.25):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.codebook = self.add_weight(name="codebook", shape=(num_embeddings, embedding_dim))

    def call(self, latents: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        codebook = tf.convert_to_tensor(self.codebook)
        num_embeddings, embedding_dim = codebook.shape
        flat = tf.reshape(latents, (-1, embedding_dim))  # (n, d)
        distances = (
            tf.reduce_sum(flat**2, axis=1, keepdims=True)
            + tf.reduce_sum(codebook**2, axis=1)
            - 2 * tf.matmul(flat, codebook, transpose_b=True)
        )  # (n, k)
        codes = tf.argmin(distances, axis=1)
        vectors = tf.reshape(tf.matmul(tf.one_hot(codes, num_embeddings), codebook), tf.shape(latents))
        commitment_term = tf.reduce_mean((tf.stop_gradient(vectors) - latents) ** 2)
        codebook_term = tf.reduce_mean((vectors - tf.stop_gradient(latents)) ** 2)
        loss = codebook_term + self.commitment_cost * commitment_term
        return latents + tf.stop_gradient(vectors - latents), tf.reshape(codes, tf.shape(latents)[:-1]), loss


PEER = "one-hot formulation"
QUANTIZERS = {
    PEER: OneHotQuantizer,
    "VectorQuantizer": ovq.VectorQuantizer,
    "EMAVectorQuantizer": ovq.EMAVectorQuantizer,
}


def make_inputs(shape: tuple[int, ...], num_embeddings: int) -> tuple[tf.Tensor, tf.Tensor, np.ndarray]:
    """Return latents and the gradient that comes from above, both of this shape, and a codebook (k, d).

    The latents lie around the vectors of the codebook: no two vectors are so equally near that rounding decides.
    """
    generator = np.random.default_rng(0)
    codebook = generator.normal(size=(num_embeddings, shape[-1])).astype(np.float32)
    noise, upstream = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    latents = codebook[generator.integers(num_embeddings, size=shape[:-1])] + 0.3 * noise
    return tf.constant(latents), tf.constant(upstream), codebook


def make_step(name: str, codebook: np.ndarray) -> Callable:
    """Return a compiled training step of a quantizer with this codebook: forward and backward.

    It takes latents (..., d) and the gradient with respect to the quantized latents, and returns the gradients with
    respect to the latents and, where it learns by gradient, to the codebook (k, d). The loss counts as many times as
    latents have elements: what it adds to the gradients is as large as what comes from above, and errors in it show.
    """
    quantizer = QUANTIZERS[name](*codebook.shape)
    quantizer.build((None, codebook.shape[1]))
    quantizer.codebook.assign(codebook)

    @tf.function
    def step(latents: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(latents)
            quantized, _, loss = quantizer(latents, training=True)
        size = tf.cast(tf.size(latents), tf.float32)
        gradients = tape.gradient([quantized, loss], [latents, *quantizer.trainable_variables], [upstream, size])
        return [tf.convert_to_tensor(gradient) for gradient in gradients]  # dense, as an optimizer needs them

    return step


def check_equal(ours: list[tf.Tensor], theirs: list[tf.Tensor]) -> None:
    """Raise AssertionError unless gradients are equal, to 1e-5 of the largest of each."""
    for found, expected in zip(ours, theirs, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def peak_memory(name: str) -> float | None:
    """Return by how many MB three steps raise the memory of this process.

    The inputs are there before, and TensorFlow has run the same step on a few latents.
    """
    latents, upstream, codebook = make_inputs(SHAPE, NUM_EMBEDDINGS)
    step = make_step(name, codebook)
    step(latents[:1, :1], upstream[:1, :1])
    whole = step.get_concrete_function(latents, upstream)

    def run() -> None:
        for _ in range(3):
            whole(latents, upstream)

    return memory_rise(run)


def quantizer(scratch: Path) -> Result:
    """Quantizer alone, forward and backward: 65,536 latents × 64, 512 codes."""
    latents, upstream, codebook = make_inputs(SHAPE, NUM_EMBEDDINGS)
    steps = {name: make_step(name, codebook) for name in QUANTIZERS}
    gradients = {name: step(latents, upstream) for name, step in steps.items()}
    check_equal(gradients["VectorQuantizer"], gradients[PEER])

    def measure(step: Callable) -> float:
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            step(latents, upstream)[0].numpy()
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    milliseconds = in_turns({name: lambda step=step: measure(step) for name, step in steps.items()})
    megabytes = {name: in_its_own_process("quantizer", name) for name in QUANTIZERS}
    rows, values = [], {}
    for name, own in milliseconds.items():
        values[name] = {"milliseconds": own, "peak_megabytes": megabytes[name]}
        cells = [name, f"{own:,.1f}", "1" if name == PEER else judged(milliseconds[PEER] / own, LEAST_SPEEDUP)]
        if megabytes[name] is None:
            cells += ["not measured here"] * 2
        else:
            share = megabytes[name] / megabytes[PEER]
            cells += [f"{megabytes[name]:,.0f}", "1" if name == PEER else judged(share, MOST_MEMORY, at_most=True)]
        rows.append(cells)
    header = [
        "quantizer", "ms a step", f"times faster (must be at least {LEAST_SPEEDUP:g})",
        "peak memory, MB", f"share of it (must be at most {MOST_MEMORY:g})",
    ]  # fmt: skip
    return [(header, rows)], values
