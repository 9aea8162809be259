"""Measure the speed of the library on this machine and print a Markdown table.

    python benchmarks/run.py data        reading slices: PNG files, the cache, and what training takes of them

Each benchmark also writes benchmarks/results/<name>.json, with the machine it ran on. Timings are noisy: what is
compared is measured in turns, and the median of the turns is given.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import oasis_vq as ovq
from oasis_vq.config import ROOT, start_tensorflow, write_json

RESULTS = Path(__file__).parent / "results"
TURNS = 5


def rate(dataset: Iterable, count: int) -> float:
    """Return how many of `count` items a second come out of a pass over a dataset."""
    start = time.perf_counter()
    for _ in dataset:
        pass
    return count / (time.perf_counter() - start)


def in_turns(measures: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median of each measure over turns in which each runs once."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(TURNS):
        for name, measure in measures.items():
            values[name].append(measure())
    return {name: statistics.median(found) for name, found in values.items()}


def data(scratch: Path) -> tuple[list[str], list[list[str]], dict]:
    """Read a cohort at 256x256: slices a second of each way, and how many times the rate of a training that is."""
    from oasis_vq.training import _train_vqvae

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

    training = _train_vqvae(config, index, cache=False)
    training.model.fit(training.stream(0).take(3), verbose=0)  # traces the step
    steps = 12

    def train() -> float:
        start = time.perf_counter()
        training.model.fit(training.stream(0).take(steps), verbose=0)
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
    return ["way", "slices/s at 256x256", "times what training takes"], rows, rates


BENCHMARKS = {"data": data}


def machine() -> dict:
    """Return what the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "devices": start_tensorflow(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"a benchmark is one of {', '.join(BENCHMARKS)}. Received: {', '.join(unknown)}")
    RESULTS.mkdir(exist_ok=True)
    about = machine()
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            header, rows, values = BENCHMARKS[name](Path(scratch))
        write_json(RESULTS / f"{name}.json", {**about, **values})
        print(f"\n### {name}: {about['devices']}\n")
        for cells in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
