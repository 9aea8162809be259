"""Train priors for the same time each on the codes of VQ-VAEs: what a code of a new person costs, and what is drawn.

    python benchmarks/generation.py --data DATA --vqvae saved_models/brain128                 all
    python benchmarks/generation.py --data DATA --vqvae saved_models/brain128 --only ours     one of them
    python benchmarks/generation.py --data DATA --vqvae saved_models/brain128 --prior saved_models/brain128-prior
                                                        none: scores a trained one, --temperatures 0.8 1 at two of them
    … --size 128                                        scores pictures averaged down to 128x128 instead of 64x64

Grids a second are measured first, in turns, on a quiet machine; the passes that fit in the time follow from them. What
has been trained is loaded, and a training that was interrupted goes on. All scores are those of validation people,
samples against one half of them with the other half as their ceiling: the test people are not asked. Results, one file
a row, are in benchmarks/results/generation, and the table of all is benchmarks/results/generation.md.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from turns import in_turns, training_rate

import oasis_vq as ovq
from oasis_vq.config import ROOT
from oasis_vq.evaluation import coarse_bits, code_baselines, code_scores
from oasis_vq.files import write_json, write_whole
from oasis_vq.preparation import build_optimizer
from oasis_vq.quality import FEATURE_SIZE, is_valid, knows_floor
from oasis_vq.runtime import start_tensorflow
from oasis_vq.tables import markdown_table

RESULTS = Path(__file__).parent / "results" / "generation"


def systems(recipe: ovq.Recipe) -> dict[str, ovq.PriorConfig]:
    """Return what is compared on the codes of a recipe's VQ-VAE."""
    own = dataclasses.replace(recipe.prior, refines=False)  # one level each
    configs = {
        "keras_io": dataclasses.replace(ovq.recipe("keras_io").prior, batch_size=own.batch_size),
        "plain": ovq.PriorConfig(batch_size=own.batch_size),
        "ours": own,
        "ours, one view": dataclasses.replace(own, num_views=1),
        "ours, attention": dataclasses.replace(own, num_attention_layers=1),
        "ours, bfloat16": dataclasses.replace(own, precision="mixed_bfloat16"),
        "ours, twice the dropout": dataclasses.replace(own, dropout=2 * own.dropout),
        "ours, no weight average": dataclasses.replace(own, weight_average=0.0),
        "ours, 5x5": dataclasses.replace(own, kernel_size=5, num_residual_blocks=5),
    }
    return {name: config.matched_to(recipe.vqvae) for name, config in configs.items()}


def grids_per_second(configs: dict[str, ovq.PriorConfig]) -> dict[str, float]:
    """Return the median rate of each configuration's training step, in turns."""
    return in_turns({name: grids_rate(config) for name, config in configs.items()})


def grids_rate(config: ovq.PriorConfig, *, num: int = 64) -> Callable[[], float]:
    """Return a function that trains a prior on about so many code grids and returns how many it took a second."""
    prior = ovq.PixelCNN(config)
    prior.compile(optimizer=build_optimizer(config, 1000))
    codes = np.random.default_rng(0).integers(0, config.num_embeddings, (config.batch_size, *config.grid_shape))
    inputs = {"codes": codes} | {key: np.zeros(len(codes), np.int32) for key in prior.condition_sizes}
    return training_rate(prior, inputs, steps=max(1, num // len(codes)))


def without_test(index: ovq.SliceIndex) -> ovq.SliceIndex:
    """Return an index in which one half of the validation people stands for the test people, who are not asked."""
    people = np.unique(index.validate.subject)
    half = np.isin(index.validate.subject, people[: len(people) // 2])
    return dataclasses.replace(index, test=index.validate[half], validate=index.validate[~half])


def scores(prior: ovq.PixelCNN, vqvae: ovq.VQVAE, index: ovq.SliceIndex) -> dict:
    """Return what a code of validation people costs, beside models that ignore the neighbours."""
    train = ovq.encode_slices(vqvae, index.train)
    validate = ovq.encode_slices(vqvae, index.validate, drafter=prior.drafter)
    bits, accuracy = code_scores(prior, validate)
    history = ovq.read_history(prior.folder)
    best = int(history["val_bits_per_code"].argmin())
    return {
        "brain_ssim": ovq.evaluate_reconstruction(vqvae, index.validate, train=index.train)["brain_ssim"],
        "validate_bits_per_code": float(bits.mean()),
        "validate_bits_per_image": float(bits[0].size * bits.mean() + coarse_bits(prior, validate).mean()),
        "validate_accuracy": float(accuracy.mean()),
        "baselines": code_baselines(train.codes, validate.codes, vqvae.config.num_embeddings),
        "best_epoch": best + 1,
        "train_bits_per_code": float(history["bits_per_code"][best]),
        "num_parameters": prior.count_params(),
        "training_seconds": float(history["seconds"].sum()),
    }


def plot_levels(prior: ovq.PixelCNN, index: ovq.SliceIndex, columns: int = 8) -> plt.Figure:
    """Show coarse samples over what a prior makes of them, and reconstructions of validation slices at the same level.

    Args:
        prior: one that refines drafts.
        index: of the slices.
        columns: of the picture, each at a slice position of its own.
    """
    positions = index.positions_at(np.linspace(0.13, 0.84, columns))
    drafter, options = prior.drafter, {"seed": 0, "slice_index": positions}
    coarse = ovq.sample_codes(drafter.prior, columns, **options)
    fine = ovq.sample_codes(prior, columns, **options, draft=drafter.of_codes(coarse))
    rows = [np.abs(index.validate.slice - position).argmin() for position in positions]
    reading = {"image_size": drafter.fine.config.image_size, "fit": drafter.fine.config.fit}
    slices = ovq.load_images(index.validate[np.array(rows)], **reading)
    images = drafter.coarse.decode(coarse), drafter.fine.decode(fine), drafter.fine.reconstruct(slices)
    titles = [f"{what}, slice {at}" for what in ("coarse", "refined") for at in positions]
    titles += [f"reconstruction, slice {at}" for at in index.validate.slice[rows]]
    return ovq.plot_slices(np.concatenate(images), titles=titles, columns=columns)


def main() -> None:
    """Train, score, and write a row for each prior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with slices")
    parser.add_argument("--vqvae", type=Path, required=True, help="folder of the VQ-VAE")
    parser.add_argument("--prior", type=Path, help="folder of a prior on its codes, which is scored; none is trained")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    parser.add_argument("--only", action="append", help="a prior; may be given several times")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="of the samples that are scored")
    parser.add_argument("--size", type=int, default=FEATURE_SIZE, help="of the pictures that samples are judged by")
    arguments = parser.parse_args()
    device = start_tensorflow()
    index, vqvae = ovq.find_slices(arguments.data), ovq.load_vqvae(arguments.vqvae)
    folder = vqvae.folder.parent if vqvae.folder.name == "vqvae" else vqvae.folder  # those of reproduce.py
    about = {"vqvae": folder.name, "device": device, "data": arguments.data.name}
    RESULTS.mkdir(parents=True, exist_ok=True)

    def row_file(text: str) -> Path:
        text = f"{arguments.data.name} {about['vqvae']} {text}"
        return RESULTS / f"{re.sub(r'[^a-z0-9.]+', '_', text.lower())}.json"

    if arguments.prior:
        prior = ovq.load_prior(arguments.prior)
        files = {prior.folder.name: row_file(prior.folder.name)}
        for name, file in files.items():
            if not file.exists():
                write_json(file, {"name": name, **about, "config": prior.config.to_dict()})
    else:
        recipe = dataclasses.replace(ovq.recipe(vqvae.config.recipe), vqvae=vqvae.config)
        chosen = systems(recipe)
        if unknown := sorted(set(arguments.only or ()) - set(chosen)):
            parser.error(f"a prior is one of {', '.join(chosen)}. Received: {', '.join(unknown)}")
        chosen = {name: chosen[name].conditioned_by(index) for name in arguments.only or chosen}
        files = {name: row_file(f"{arguments.minutes:g}min {name}") for name in chosen}
        unmeasured = {name: config for name, config in chosen.items() if not files[name].exists()}
        for name, rate in (grids_per_second(unmeasured) if unmeasured else {}).items():
            epochs = max(1, round(60 * arguments.minutes * rate / len(index.train)))
            row = {"name": name, **about, "minutes": arguments.minutes, "grids_per_second": rate}
            write_json(files[name], {**row, "config": dataclasses.replace(chosen[name], epochs=epochs).to_dict()})
    for name, file in files.items():
        row = json.loads(file.read_text())
        config = ovq.PriorConfig.from_dict(row["config"])
        if not arguments.prior:
            if differs := config.differences(dataclasses.replace(chosen[name], epochs=config.epochs)):
                parser.error(f"{file} is of another configuration ({differs}): remove it")
            folder = ROOT / "build" / "benchmarks" / file.stem
            prior = ovq.fit_or_load(folder, config, index, vqvae=vqvae)
            sixteen = ovq.plot_slices(vqvae.decode(ovq.sample_codes(prior, 16, seed=0)))
            ovq.save_figure(sixteen, "sixteen", folder=folder)
        if prior.drafter:
            ovq.save_figure(plot_levels(prior, index), file.stem, folder=RESULTS)
        row = scores(prior, vqvae, index) | {"samples": {}} | row
        print(f"{name}: {row['validate_bits_per_code']:.3f} bits per code", flush=True)
        for temperature in arguments.temperatures:
            key = f"{temperature:g}" + f" at {arguments.size}" * (arguments.size != FEATURE_SIZE)
            if key not in row["samples"]:
                options = {"temperature": temperature, "size": arguments.size}
                found = ovq.evaluate_samples(prior, vqvae, without_test(index), **options)
                row["samples"][key] = {name: found[name] for name in found if name != "distances"}
                write_json(file, row)
    summarise()


def summarise() -> None:
    """Write a table of all rows, the fewest bits first."""
    rows = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows = [row for row in rows if "validate_bits_per_code" in row]
    table = []
    rows = sorted(rows, key=lambda row: (row["vqvae"], row["validate_bits_per_image"]))
    drawn = [(row, temperature) for row in rows for temperature in sorted(row["samples"])]
    for row, temperature in drawn:
        bits, positions = row["validate_bits_per_code"], math.prod(row["config"]["grid_shape"])
        samples = row["samples"][temperature]
        ceiling = samples["ceiling"]
        told, limit = (f"{part['classifier_accuracy']:.2f}" for part in (samples, ceiling))
        whole = [f"{part['classifier_accuracy_whole']:.2f}" for part in (samples, ceiling)]
        knows = knows_floor(samples, "classifier_accuracy_whole")
        histogram_bits = positions * row["baselines"]["per_position"]
        table.append({
            "codes of": row["vqvae"],
            "their brain_ssim": f"{row['brain_ssim']:.3f}",
            "prior": row["name"],
            "temperature, size": temperature,
            "minutes": f"{row['training_seconds'] / 60:.0f}",
            "weights": f"{row['num_parameters']:,}",
            "bits per code": f"{bits:.3f}",
            "bits an image of per position": f"{row['validate_bits_per_image'] / histogram_bits:.3f}",
            "in training": f"{row['train_bits_per_code']:.3f}",
            "bits an image": f"{row['validate_bits_per_image']:,.0f}",
            "classifier (ceiling)": f"{told} ({limit})" + ", void" * (not is_valid(samples)),
            "against slices": f"{whole[0]} ({whole[1]})" + ", void" * (not knows),
            "density": f"{samples['density']:.2f} ({ceiling['density']:.2f})",
            "coverage": f"{samples['coverage']:.2f} ({ceiling['coverage']:.2f})",
        })  # fmt: skip
    text = markdown_table(table)
    write_whole(RESULTS.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
