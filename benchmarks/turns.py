"""Measuring in turns, also in processes of their own: what is compared runs under the same load of the machine."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

TURNS = 5
Result = tuple[list[tuple[list[str], list[list[str]]]], dict]
"""Of a benchmark: tables, each a header and rows of cells, and the values for the JSON file."""


def in_turns(measures: dict[str, Callable[[], float]], turns: int = TURNS) -> dict[str, float]:
    """Return the median of each measure over turns in which each runs once."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(turns):
        for name, measure in measures.items():
            values[name].append(measure())
    return {name: statistics.median(found) for name, found in values.items()}


def training_rate(model: "keras.Model", batch: object, *, steps: int) -> Callable[[], float]:
    """Return a function that trains a compiled model on this batch for some steps and returns items a second."""
    import tensorflow as tf

    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.make_train_function()

    def measure(steps: int = steps) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            logs = model.train_function(batches)
        next(iter(logs.values())).numpy()
        return steps * model.config.batch_size / (time.perf_counter() - start)

    measure(2)
    return measure


@contextlib.contextmanager
def worker(script: str, *arguments: str) -> Iterator[dict[str, Callable[[], float]]]:
    """Run a script of this folder that calls `serve`; give its measures, which wait for it, and end it afterwards."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer():
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{script} ended with exit code {process.wait()}; its error is printed above.")
        return json.loads(line)

    def ask(name: str) -> float:
        print(name, file=process.stdin, flush=True)
        return answer()

    try:
        yield {name: lambda name=name: ask(name) for name in answer()}
    finally:
        process.stdin.close()
        process.wait()


def serve(measures: dict[str, Callable[[], float]]) -> None:
    """Answer the process that started this one: the names of the measures, then a value for each name it writes."""
    print(json.dumps(list(measures)), flush=True)
    for line in sys.stdin:
        print(json.dumps(measures[line.strip()]()), flush=True)


def memory_rise(run: Callable[[], object]) -> float | None:
    """Return by how many MB (10^6 bytes) a call raises the memory of this process, or None if it does not tell."""
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return None

    def resident(key: str) -> int:
        lines = (process / "status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    before = resident("VmRSS:")
    (process / "clear_refs").write_text("5")  # forgets the peak
    run()
    return (resident("VmHWM:") - before) / 1e6


def in_its_own_process(module: str, argument: str) -> float | None:
    """Return what `peak_memory(argument)` of a module of this folder returns in a fresh process."""
    code = (
        "import sys; from oasis_vq.runtime import start_tensorflow; start_tensorflow();"
        f"import {module}; print({module}.peak_memory(sys.argv[1]))"
    )
    command, folder = [sys.executable, "-c", code, argument], Path(__file__).parent
    printed = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return None if printed == "None" else float(printed)


def judged(value: float, limit: float, *, at_most: bool = False) -> str:
    """Return the value as text, with what must hold of it if it does not."""
    holds = value <= limit if at_most else value >= limit
    return f"{value:.2f}" if holds else f"{value:.2f} (must be {'at most' if at_most else 'at least'} {limit})"
