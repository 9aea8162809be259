"""Train recipes for the same time each and compare their reconstructions: brain_ssim for the bits they take.

    python benchmarks/reconstruction.py --data DATA                      ours, the keras.io VQ-VAE, and ablations
    python benchmarks/reconstruction.py --data DATA --only fine128       one of them
    python benchmarks/reconstruction.py --data DATA --split test         the scores for the record, once

Images a second are measured first, in turns, on a quiet machine; the passes over the slices that fit in the time
follow from them. What has been trained is loaded, and a training that was interrupted goes on. Results, one file a
row, table and figure are in benchmarks/results/reconstruction. The published systems are in reproduce.py.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from turns import in_turns, training_rate

import oasis_vq as ovq
from oasis_vq.config import ROOT
from oasis_vq.files import write_json, write_whole
from oasis_vq.runtime import start_tensorflow
from oasis_vq.tables import markdown_table

RESULTS = Path(__file__).parent / "results" / "reconstruction"


def systems(image_size: int) -> dict[str, ovq.VQVAEConfig]:
    """Return what is compared at an image size: our recipes for it, the keras.io one, and what each lacks."""
    names = ("default256" if image_size >= 256 else "default128", "fine128", "keras_io")
    configs = {name: dataclasses.replace(ovq.recipe(name).vqvae, image_size=image_size) for name in names}
    configs["keras_io, 512 codes"] = dataclasses.replace(configs["keras_io"], num_embeddings=512)
    configs["fine128, squared error alone"] = dataclasses.replace(configs["fine128"], ssim_weight=0.0)
    return configs


def images_per_second(configs: dict[str, ovq.VQVAEConfig], images: np.ndarray) -> dict[str, float]:
    """Return the median rate of each configuration's training step, in turns."""
    return in_turns({name: images_rate(config, images) for name, config in configs.items()})


def images_rate(config: ovq.VQVAEConfig, images: np.ndarray, *, num: int = 320) -> Callable[[], float]:
    """Return a function that trains a network on images and returns how many it took a second.

    Args:
        num: images of 128x128 that have about as many pixels as those of a measurement.
    """
    model = ovq.VQVAE(config)
    model.compile(optimizer="adam")
    batch = np.resize(images, (config.batch_size, *images.shape[1:]))
    return training_rate(model, batch, steps=max(1, round(num * (128 / config.image_size) ** 2 / len(batch))))


def row_file(arguments: argparse.Namespace, name: str) -> Path:
    """Return the file of a row: data, size, minutes and seed are in its name."""
    seed = f", seed {arguments.seed}" if arguments.seed else ""
    text = f"{arguments.data.name} {arguments.image_size} {arguments.minutes:g}min {name}{seed}"
    return RESULTS / f"{re.sub(r'[^a-z0-9.]+', '_', text.lower())}.json"


def summarise(split: str) -> None:
    """Write a table of all rows that are scored on a split, and a rate-distortion figure for each comparison."""
    rows = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows = sorted((row for row in rows if split in row), key=lambda row: -row[split]["brain_ssim"])
    table = []
    for row in rows:
        report, config = row[split], row["config"]
        low, high = report["intervals"]["brain_ssim"]
        table.append({
            "data": f"{row['data']} {config['image_size']}",
            "system": row["name"] + f", seed {config['seed']}" * bool(config["seed"]),
            "bits": f"{report['bits_per_image']:,.0f}",
            "minutes": f"{row['training_seconds'] / 60:.0f}",
            "brain_ssim": f"{report['brain_ssim']:.3f} ({low:.3f}-{high:.3f})",
            "ssim": f"{report['ssim']:.3f}",
            "brain_psnr": f"{report['brain_psnr']:.2f}",
            "codes used": f"{report['codebook_usage']:.0%}",
            "perplexity": f"{report['perplexity']:.0f}",
        })  # fmt: skip
    text = markdown_table(table)
    write_whole(RESULTS / f"{split}.md", text.encode())
    print(text)
    comparisons: dict[tuple, list] = {}
    for row in rows:
        if row["config"]["seed"] == 0:
            comparisons.setdefault((row["data"], row["config"]["image_size"], row["minutes"]), []).append(row)
    for (data, size, minutes), own in comparisons.items():
        points = {row["name"]: (row[split]["bits_per_image"], row[split]["brain_ssim"]) for row in own}
        baselines = {"mean training slice": own[0][split]["baselines"]["mean_slice"]["brain_ssim"]}
        title = f"{data}, {size}×{size}, {split}: {minutes:g} minutes of training each"
        figure = ovq.plot_rate_distortion(points, baselines=baselines, title=title)
        ovq.save_figure(figure, f"{data}_{size}_{minutes:g}min_{split}", folder=RESULTS)


def main() -> None:
    """Train, score, and write a row for each system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with slices")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each")
    parser.add_argument("--only", action="append", help="a system; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("validate", "test"), default="validate")
    arguments = parser.parse_args()
    device = start_tensorflow()
    chosen = systems(arguments.image_size)
    if arguments.only:
        if unknown := sorted(set(arguments.only) - set(chosen)):
            parser.error(f"a system is one of {', '.join(chosen)}. Received: {', '.join(unknown)}")
        chosen = {name: chosen[name] for name in arguments.only}
    index = ovq.find_slices(arguments.data)
    RESULTS.mkdir(parents=True, exist_ok=True)
    files = {name: row_file(arguments, name) for name in chosen}

    unmeasured = {name: config for name, config in chosen.items() if not files[name].exists()}
    if unmeasured:
        rates = images_per_second(unmeasured, ovq.load_images(index.train[:16], image_size=arguments.image_size))
        for name, rate in rates.items():
            epochs = max(1, round(60 * arguments.minutes * rate / len(index.train)))
            config = dataclasses.replace(chosen[name], seed=arguments.seed, epochs=epochs)
            row = {
                "name": name,
                "device": device,
                "data": arguments.data.name,
                "minutes": arguments.minutes,
                "images_per_second": rate,
            }
            write_json(files[name], {**row, "config": config.to_dict()})
    for name, file in files.items():
        row = json.loads(file.read_text())
        config = ovq.VQVAEConfig.from_dict(row["config"])
        asked = dataclasses.replace(chosen[name], seed=arguments.seed, epochs=config.epochs)
        if config != asked:
            parser.error(f"{file} is of another configuration ({config.differences(asked)}): remove it")
        if arguments.split == "test" and "test" in row:
            print(f"{name}: scored on test before, which is done once")
            continue
        vqvae = ovq.fit_or_load(ROOT / "build" / "benchmarks" / file.stem, config, index)
        seconds = json.loads((vqvae.folder / "metrics.json").read_text())["training_seconds"]
        report = ovq.evaluate_reconstruction(vqvae, index.splits()[arguments.split], train=index.train)
        write_json(file, {**row, "training_seconds": seconds, arguments.split: report})
        print(f"{row['name']}: brain_ssim {report['brain_ssim']:.3f} on {arguments.split}, {seconds:.0f} s", flush=True)
    summarise(arguments.split)


if __name__ == "__main__":
    main()
