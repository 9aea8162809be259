"""Reading slices: PNG files, the cache, and what training takes of them."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import tensorflow as tf
from turns import Result, in_turns

import oasis_vq as ovq
from oasis_vq.config import ROOT


def rate(dataset: Iterable, count: int) -> float:
    """Return how many of `count` items a second come out of a pass over a dataset."""
    start = time.perf_counter()
    for _ in dataset:
        pass
    return count / (time.perf_counter() - start)


def data(scratch: Path) -> Result:
    """Read a cohort at 256x256: slices a second of each way, and how many times the rate of a training that is."""
    from oasis_vq.preparation import prepare_vqvae

    os.environ["OASIS_VQ_CACHE"] = str(scratch / "cache")
    folder = ovq.make_cohort(ROOT / "data" / "phantom256-60", num_subjects=60)
    index = ovq.find_slices(folder)
    slices, config = index.train, ovq.recipe("default256").vqvae
    reading = {"image_size": 256, "batch_size": config.batch_size, "shuffle": True}
    count = len(slices)

    def making_the_cache() -> float:
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        start = time.perf_counter()
        ovq.cached_images(slices, image_size=256)
        return count / (time.perf_counter() - start)

    def tensorflow_cache() -> Callable[[], float]:
        stored = ovq.make_dataset(slices, image_size=256, batch_size=config.batch_size).cache(str(scratch / "tf"))
        rate(stored, count)
        return lambda: rate(stored, count)

    training = prepare_vqvae(config, index, scratch, cache=False, strategy=tf.distribute.get_strategy())
    stream = training.stream(0, config.batch_size, None)
    training.model.fit(stream.take(3), verbose=0)  # traces the step
    steps = 12

    def train() -> float:
        start = time.perf_counter()
        training.model.fit(stream.take(steps), verbose=0)
        return steps * config.batch_size / (time.perf_counter() - start)

    cached = {**reading, "cache": True}
    augmentation = ovq.Augmentation(upside_down_copies=True, flip_left_right=True, max_shift=4)
    measures = {
        "PNG files": lambda: rate(ovq.make_dataset(slices, **reading), count),
        "first pass with the cache: making it": making_the_cache,
        "later passes: the cache": lambda: rate(ovq.make_dataset(slices, **cached), count),
        "the cache, augmented": lambda: rate(ovq.make_dataset(slices, **cached, augmentation=augmentation), 2 * count),
        "for comparison: tf.data's cache file, unshuffled": tensorflow_cache(),
        "VQ-VAE training (default256), from PNG files": train,
    }
    rates = in_turns(measures)
    consumed = rates["VQ-VAE training (default256), from PNG files"]
    rows = [[name, f"{value:,.0f}", f"{value / consumed:,.1f}"] for name, value in rates.items()]
    return [(["way", "slices/s at 256x256", "times what training takes"], rows)], rates
