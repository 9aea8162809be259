"""Measure the speed of the library on this machine and print a Markdown table.

    python benchmarks/run.py data        reading slices: PNG files, the cache, and what training takes of them
    python benchmarks/run.py quantizer   the quantizers alone against the one-hot formulation: time and peak memory
    python benchmarks/run.py training    training steps: a VQ-VAE, without its quantizer, in PyTorch; a prior
    python benchmarks/run.py sampling    drawing code grids: ours, and model.predict at every position

Each benchmark also writes benchmarks/results/<name>.json, with the machine it ran on. Timings are noisy: what is
compared is measured in turns, and the median of the turns is given. A number that must hold and does not says so.
"""

import argparse
import importlib
import platform
import sys
import tempfile
from pathlib import Path

from oasis_vq.files import write_json
from oasis_vq.runtime import start_tensorflow

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("data", "quantizer", "training", "sampling")
"""Modules of this folder, each with a function of its name from a scratch folder to a `turns.Result`."""


def machine() -> dict:
    """Return what the numbers depend on."""
    devices = start_tensorflow()
    from oasis_vq.reports import commit

    about = {"python": platform.python_version(), "system": platform.platform(terse=True), "commit": commit()}
    return {"devices": devices, **about}


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
        benchmark = getattr(importlib.import_module(name), name)
        with tempfile.TemporaryDirectory() as scratch:
            tables, values = benchmark(Path(scratch))
        write_json(RESULTS / f"{name}.json", {**about, **values})
        print(f"\n### {name}: {about['devices']}\n\n{benchmark.__doc__}\n")
        for header, rows in tables:
            for cells in (header, ["---"] * len(header), *rows):
                print(f"| {' | '.join(cells)} |")
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
