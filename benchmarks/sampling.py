"""Sampling from a prior: ours against the same network called by `model.predict` once a position, as keras.io does."""

import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from turns import Result, in_its_own_process, judged, memory_rise

import oasis_vq as ovq
from oasis_vq import sampling as sampler

BATCH_SIZE = 16
LEAST_SPEEDUP = {32: 300.0, 64: 1000.0}
"""Side of the code grid to how many times faster ours must be there."""
SIDES = (16, 32, 64)
BATCH_SIZES = (1, 4, 16, 64)
NUM_PREDICTED = 3
"""Positions that `model.predict` is timed at; the others take as long."""


def make_prior(side: int) -> ovq.PixelCNN:
    """Return an untrained prior of default128 for grids of this side: time does not depend on its weights."""
    config = dataclasses.replace(ovq.recipe("default128").prior, grid_shape=(side, side), num_slices=32)
    return ovq.PixelCNN(config)


def seconds_of_ours(prior: ovq.PixelCNN, size: int, turns: int = 3) -> float:
    """Return the median time of drawing so many samples in one batch, once compiled."""
    known = tf.zeros((size, *prior.config.grid_shape), tf.int32)
    conditions = {name: tf.zeros(size, tf.int32) for name in prior.condition_sizes}
    times = []
    for turn in range(turns + 1):
        start = time.perf_counter()
        draws = (tf.constant(0), tf.constant([turn, 0]), tf.constant(1.0), None, True)
        rows, caches = tf.constant((0, known.shape[1])), sampler.empty_caches(prior, size)
        sampler._sample_band(prior, rows, known, caches, known, conditions, *draws)[0].numpy()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def seconds_of_predict(prior: ovq.PixelCNN) -> float:
    """Return how long keras.io's loop takes for a batch: the whole network at each position, and a draw from it."""
    side = prior.config.grid_shape[0]
    codes = np.zeros((BATCH_SIZE, side, side), np.int32)
    inputs = {"codes": codes, "slice_index": np.zeros(BATCH_SIZE, np.int32)}
    prior.predict(inputs, batch_size=BATCH_SIZE, verbose=0)
    times = []
    for position in range(NUM_PREDICTED):
        start = time.perf_counter()
        logits = prior.predict(inputs, batch_size=BATCH_SIZE, verbose=0)[:, 0, position]
        codes[:, 0, position] = tf.random.stateless_categorical(logits, 1, (0, position))[:, 0]
        times.append(time.perf_counter() - start)
    return statistics.median(times) * side * side


def peak_memory(side: str) -> float | None:
    """Return by how many MB compiling the sampler and drawing a batch raise the memory of this process."""
    prior = make_prior(int(side))
    return memory_rise(lambda: seconds_of_ours(prior, BATCH_SIZE, turns=1))


def sampling(scratch: Path) -> Result:
    """Prior of default128, 512 codes: seconds for 16 grids, and milliseconds a grid by the size of the batch."""
    rows, values = [], {}
    for side in SIDES:
        prior = make_prior(side)
        seconds = {size: seconds_of_ours(prior, size) for size in BATCH_SIZES}
        predicted = seconds_of_predict(prior)
        speedup = predicted / seconds[BATCH_SIZE]
        memory = in_its_own_process("sampling", str(side))
        values[f"{side}x{side}"] = {
            "seconds_by_batch_size": seconds,
            "seconds_of_predict": predicted,
            "times_faster": speedup,
            "peak_megabytes": memory,
        }
        rows.append([
            f"{side}×{side}", f"{seconds[BATCH_SIZE]:.2f}", f"{predicted:,.0f}",
            judged(speedup, LEAST_SPEEDUP[side]) if side in LEAST_SPEEDUP else f"{speedup:,.0f}",
            "not measured here" if memory is None else f"{memory:,.0f}",
            *(f"{1000 * seconds[size] / size:,.1f}" for size in BATCH_SIZES),
        ])  # fmt: skip
    header = [
        "code grid", "ours, s", f"model.predict at each position, s ({NUM_PREDICTED} timed, scaled)",
        "times faster", "peak memory, MB",
        *(f"ms a grid, {size} at once in the compiled loop" for size in BATCH_SIZES),
    ]  # fmt: skip
    return [(header, rows)], values
