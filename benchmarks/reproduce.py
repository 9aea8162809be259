"""Train the five published systems and ours for the same time each, and write the table of what was claimed and found.

    python benchmarks/reproduce.py --data DATA                                  all of them
    OASIS_VQ_DATA=DATA make reproduce                                           the same
    python benchmarks/reproduce.py --data DATA --only bce_search                one of them
    python benchmarks/reproduce.py --data DATA --image-size 256 --without-priors --out figures/reproduction_256
    make reproduce PROFILE=quick                                                a rehearsal on few phantom slices

Rates are measured first, in turns, on a quiet machine: every network gets the passes over the slices that fit into the
time, at most those of its report, and where not one fits, fewer people. Each system's row is written as soon as it is
there, in the folder OUT, and kept: what has a row is not trained again, and a training that was interrupted goes on.
OUT.md, OUT.tex and OUT.pdf show all rows; loss curves and reconstructions with code maps are in build/reproduction.
"""

import argparse
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
from priors import grids_rate
from reconstruction import images_rate
from turns import in_turns

import oasis_vq as ovq
from oasis_vq.config import ROOT
from oasis_vq.files import write_json, write_whole
from oasis_vq.runtime import start_tensorflow

MODELS = ROOT / "build" / "reproduction"
SHARE = 0.85
"""Of the time that is for steps: the rest goes to validation and checkpoints."""
WIDEST_PRIOR = 64
"""Side of the largest code grid that a prior is trained on here: of a smaller resize where the codes are more."""
SHOWN = (0.35, 0.5, 0.65)
"""Slice positions of the figure, between the lowest and the highest."""


@dataclasses.dataclass(frozen=True)
class System:
    """What a row of the table is about."""

    name: str
    vqvae: ovq.VQVAEConfig
    prior: ovq.PriorConfig | None = None
    reported: str = ""
    """What its report claims; ours have none."""

    @property
    def under_prior(self) -> ovq.VQVAEConfig | None:
        """The VQ-VAE whose codes the prior learns: the same, or that of a smaller resize."""
        if self.prior is None:
            return None
        if max(self.vqvae.grid_shape) <= WIDEST_PRIOR:
            return self.vqvae
        return dataclasses.replace(self.vqvae, image_size=WIDEST_PRIOR * self.vqvae.downsampling)


def systems(image_size: int, *, profile: str = "full") -> dict[str, System]:
    """Return what is compared: the published systems, one of them with another loss, and ours."""

    def system(name: str, base: str, reported: str = "", *, with_prior: bool = True, **changes) -> System:
        recipe = ovq.recipe(base, profile=profile)
        vqvae = dataclasses.replace(recipe.vqvae, image_size=image_size, **changes)
        return System(name, vqvae, recipe.prior if with_prior else None, reported)

    published = [name for name in ovq.recipe_names() if ovq.recipe(name).reported]
    found = [system(name, name, ovq.recipe(name).reported) for name in published]
    found.append(system("bce_search, squared error", "bce_search", with_prior=False, loss="mse"))
    found += [
        system("ours, 8x", "default256" if image_size >= 256 else "default128"),
        system("ours, 4x, 64 codes", "fine128", num_embeddings=64),
        system("ours, 2x", "fine128", with_prior=False, downsampling=2, width=32, num_residual_blocks=1),
    ]
    return {made.name: made for made in found}


class Row:
    """A row of the table: a JSON file that grows, and a strip of pictures beside it."""

    def __init__(self, folder: Path, name: str):
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        self.file, self.strip, self.models = (
            folder / f"{slug}.json",
            folder / f"{slug}.png",
            MODELS / folder.name / slug,
        )
        self.values = json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, **values) -> None:
        """Keep what has been found."""
        self.values |= values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.values)


def plan(rows: dict[str, Row], chosen: dict[str, System], arguments: argparse.Namespace, index, device: str) -> None:
    """Measure the rates of what has no row yet, and begin its row with the trainings that fit into the time."""
    measures: dict[tuple[str, str], Callable[[], float]] = {}
    configs: dict[tuple[str, str], ovq.VQVAEConfig | ovq.PriorConfig] = {}
    for name in [name for name, row in rows.items() if "trainings" not in row.values]:
        system = chosen[name]
        parts = {"vqvae": system.vqvae, "prior": system.prior}
        if system.under_prior not in (None, system.vqvae):
            parts["under_prior"] = system.under_prior
        for part, config in parts.items():
            if isinstance(config, ovq.PriorConfig):
                config = config.matched_to(system.under_prior).conditioned_by(index)
                configs[name, part], measures[name, part] = config, grids_rate(config, num=32)
            elif config is not None:
                images = ovq.load_images(index.train[:16], image_size=config.image_size)
                configs[name, part], measures[name, part] = config, images_rate(config, images, num=64)
    rates = in_turns(measures, turns=3) if measures else {}
    for (name, part), rate in rates.items():
        config = configs[name, part]
        num_items = len(index.train) * (2 if getattr(config, "upside_down_copies", False) else 1)
        passes = 60 * arguments.minutes * SHARE * rate / num_items
        people = None
        if passes < 1:
            people = max(1, int(passes * index.train.num_subjects))
            num_items = num_items * people // index.train.num_subjects
        epochs = max(1, min(config.epochs, int(passes)))
        training = {"config": dataclasses.replace(config, epochs=epochs).to_dict(), "people": people}
        training |= {"num_items": num_items, "rate": rate}
        begun = {"name": name, "reported": chosen[name].reported, "device": device, "data": index.train.root.name,
                 "minutes": arguments.minutes}  # fmt: skip
        rows[name].add(**begun, trainings=rows[name].values.get("trainings", {}) | {part: training})


def check_same(row: Row, system: System, arguments: argparse.Namespace, index) -> None:
    """Raise ValueError if a row is of something else than what is asked for."""
    known = {part: training["config"] for part, training in row.values["trainings"].items()}
    asked = {"data": index.train.root.name, "minutes": arguments.minutes}
    same = all(row.values[name] == value for name, value in asked.items())
    vqvae = ovq.VQVAEConfig.from_dict(known["vqvae"])
    same = same and vqvae == dataclasses.replace(system.vqvae, epochs=vqvae.epochs)
    if not same or ("prior" in known) != (system.prior is not None):
        raise ValueError(f"{row.file} is of other data, another time or another configuration: remove it.")


def train(row: Row, part: str, index, vqvae: ovq.VQVAE | None = None):
    """Return the model of a part of a row, trained, or loaded if it has been."""
    training = row.values["trainings"][part]
    kind = ovq.VQVAEConfig if vqvae is None else ovq.PriorConfig
    config = kind.from_dict(training["config"])
    if training["people"]:
        index = ovq.find_slices(index.train.root, limit_train=training["people"])
    model = ovq.fit_or_load(row.models / part, config, index, vqvae=vqvae)
    history = ovq.read_history(model.folder)
    row.values["trainings"][part] |= {
        "seconds": float(history["seconds"].sum()),
        "epochs": len(history["epoch"]),
        "num_parameters": model.count_params(),
    }
    row.add()
    names = ["loss", "reconstruction_loss", "vq_loss"] if vqvae is None else ["bits_per_code", "accuracy"]
    ovq.save_figure(ovq.plot_history(history, [name for name in names if name in history]), part, folder=row.models)
    plt.close("all")
    return model


def fill(row: Row, index, *, num_samples: int) -> None:
    """Train, score and picture what a row lacks."""
    shown = three_slices(index)
    vqvae = train(row, "vqvae", index)
    images = ovq.load_images(shown, image_size=vqvae.config.image_size)
    codes = vqvae.encode(images)
    if "reconstruction" not in row.values:
        report = ovq.evaluate_reconstruction(vqvae, index.test, train=index.train)
        report.pop("positions")
        row.add(reconstruction=report)
        panels = ovq.plot_reconstructions(
            images, codes, vqvae.decode(codes), num_embeddings=vqvae.config.num_embeddings
        )  # fmt: skip
        ovq.save_figure(panels, "reconstructions", folder=row.models)
        plt.close("all")
    parts = [images, vqvae.decode(codes)]
    if "prior" in row.values["trainings"]:
        under = train(row, "under_prior", index) if "under_prior" in row.values["trainings"] else vqvae
        prior = train(row, "prior", index, under)
        if "prior" not in row.values:
            row.add(prior=ovq.evaluate_prior(prior, under, index))
        if "sampling_seconds" not in row.values:
            ovq.sample_codes(prior, 16, seed=0)  # compiles
            start = time.perf_counter()
            under.decode(ovq.sample_codes(prior, 16, seed=1))
            row.add(sampling_seconds=time.perf_counter() - start)
        if "samples" not in row.values:
            scores = ovq.evaluate_samples(prior, under, index, num=num_samples, num_repeats=2)
            scores.pop("distances")
            row.add(samples=scores)
        conditions = {name: getattr(shown, {"slice_index": "slice"}.get(name, name)) for name in prior.condition_sizes}
        drawn = under.decode(ovq.sample_codes(prior, len(shown), seed=0, **conditions))
        scale = images.shape[1] // drawn.shape[1]
        parts.append(drawn.repeat(scale, axis=1).repeat(scale, axis=2))
    strip = np.concatenate([image[..., 0] for part in parts for image in part], axis=1)
    write_whole(row.strip, iio.imwrite("<bytes>", np.round(strip * 255).astype(np.uint8), extension=".png"))


def three_slices(index) -> ovq.Slices:
    """Return slices of three test people, from the lower to the upper half of the head."""
    low, high = index.slice_range
    people = np.unique(index.test.subject)[: len(SHOWN)]
    wanted = zip(np.resize(people, len(SHOWN)), SHOWN, strict=True)
    distance = [
        np.where(index.test.subject == person, np.abs(index.test.slice - (low + share * (high - low))), np.inf)
        for person, share in wanted
    ]
    return index.test[np.argmin(distance, axis=1)]


def time_taken(training: dict) -> str:
    """Return how long a training took at the measured rate, and by the clock, with all that was beside it."""
    epochs = f"{training['epochs']} epoch" + "s" * (training["epochs"] > 1)
    people = f" of {training['people']} people" if training["people"] else ""
    steps = training["num_items"] * training["epochs"] / training["rate"]
    return f"{steps / 60:.1f} min at the measured rate ({training['seconds'] / 60:.1f} by the clock), {epochs}{people}"


def reconstruction_cells(row: dict) -> list[str]:
    """Return the cells of a row in the table of reconstructions."""
    report, training = row["reconstruction"], row["trainings"]["vqvae"]
    return [
        row["name"], row["reported"] or "-", f"{report['bits_per_image']:,.0f}",
        f"{training['num_parameters']:,}", time_taken(training),
        f"{report['ssim']:.3f}", "{:.3f} ({:.3f}-{:.3f})".format(
            report["brain_ssim"], *report["intervals"]["brain_ssim"]
        ),
        f"{report['brain_psnr']:.1f} dB", f"{report['codebook_usage']:.0%}",
    ]  # fmt: skip


def prior_cells(row: dict) -> list[str]:
    """Return the cells of a row in the table of priors."""
    report, training, samples = row["prior"], row["trainings"]["prior"], row["samples"]
    rows, columns = training["config"]["grid_shape"]
    size = row["trainings"].get("under_prior", row["trainings"]["vqvae"])["config"]["image_size"]
    ceiling, floor = (samples[name] for name in ("ceiling", "floor"))
    return [
        row["name"], f"{rows}×{columns} of {size}×{size} pixels", f"{training['num_parameters']:,}",
        time_taken(training),
        f"{report['bits_per_code']:.2f} ({report['baselines']['per_position']:.2f})",
        f"{report['bits_per_image']:,.0f}",
        f"{report['validate_accuracy']:.2f}, {report['accuracy']:.2f}",
        f"{samples['classifier_accuracy']:.2f} ({ceiling['classifier_accuracy']:.2f}, "
        f"{floor['classifier_accuracy']:.2f})",
        f"{samples['coverage']:.2f} ({ceiling['coverage']:.2f}, {floor['coverage']:.2f})",
        f"{row['sampling_seconds']:.1f} s",
    ]  # fmt: skip


RECONSTRUCTION_HEADER = [
    "system", "its report claims", "bits an image", "weights", "training", "ssim", "brain_ssim", "brain_psnr",
    "codes used",
]  # fmt: skip
PRIOR_HEADER = [
    "system", "codes", "weights", "training", "bits a test code (per position)", "bits an image",
    "accuracy: validation, test", "classifier (ceiling, floor)", "coverage (ceiling, floor)", "16 samples",
]  # fmt: skip


def verdicts(rows: list[dict]) -> list[str]:
    """Return a sentence for each system: whether it beats the baselines, and which of ours beats it with no more bits.

    The time is the same for all, so no more of it was used.
    """
    ours = [row for row in rows if not row["reported"] and row["name"].startswith("ours")]
    sentences = []
    for row in rows:
        report = row["reconstruction"]
        lost = [name.replace("_", " ") for name, scores in report["baselines"].items()
                if report["brain_ssim"] <= scores["brain_ssim"]]  # fmt: skip
        text = f"{row['name']}: " + (f"does NOT beat the {' or the '.join(lost)}" if lost else "beats the baselines")
        fair = [own for own in ours if own["reconstruction"]["bits_per_image"] <= report["bits_per_image"]]
        if row["reported"] and fair:
            best = max(fair, key=lambda own: own["reconstruction"]["brain_ssim"])
            score, bits = (best["reconstruction"][name] for name in ("brain_ssim", "bits_per_image"))
            better = "is beaten by" if score > report["brain_ssim"] else "is NOT beaten by"
            text += f"; {better} '{best['name']}' ({score:.3f} with {bits:,.0f} bits)"
        elif row["reported"]:
            text += "; none of ours takes as few bits"
        sentences.append(f"{text}.")
    return sentences


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def latex(header: list[str], lines: list[list[str]]) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([%&_#])", r"\\\1", text).replace("×", r"$\times$")

    body = [" & ".join(map(escaped, cells)) + r" \\" for cells in (header, *lines)]
    rows = "\n".join([body[0], r"\hline", *body[1:]])
    return f"\\begin{{tabular}}{{{'l' * len(header)}}}\n{rows}\n\\end{{tabular}}\n"


def summarise(out: Path) -> None:
    """Write the tables and the figure of all rows that are complete."""
    found = [(json.loads(file.read_text()), file.with_suffix(".png")) for file in sorted(out.glob("*.json"))]
    found = [(row, strip) for row, strip in found if strip.exists()]
    if not found:
        return
    order = list(systems(256))
    found.sort(key=lambda pair: order.index(pair[0]["name"]) if pair[0]["name"] in order else len(order))
    rows = [row for row, _ in found]
    first = rows[0]
    baselines = first["reconstruction"]["baselines"]
    size = first["trainings"]["vqvae"]["config"]["image_size"]
    pairs = [(RECONSTRUCTION_HEADER, [reconstruction_cells(row) for row in rows])]
    if with_prior := [row for row in rows if "samples" in row]:
        pairs.append((PRIOR_HEADER, [prior_cells(row) for row in with_prior]))
    intro = (
        f"{first['data']}, {size}×{size}, at most {first['minutes']:g} minutes for each network ({first['device']}); "
        "scores of test people. "
        + "; ".join(
            f"{name.replace('_', ' ')}: ssim {scores['ssim']:.3f}, brain_ssim {scores['brain_ssim']:.3f}"
            for name, scores in baselines.items()
        )
        + "."
    )
    told = "\n".join(f"- {text}" for text in verdicts(rows))
    text = "\n".join([intro, "", *(markdown(*pair) for pair in pairs), told, ""])
    write_whole(out.with_suffix(".md"), text.encode())
    write_whole(out.with_suffix(".tex"), "\n".join(latex(*pair) for pair in pairs).encode())
    print(text)

    figure, axes = plt.subplots(len(found), 1, figsize=(9.9, 1.2 * len(found)), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0)
    width = 3 * len(SHOWN) * size
    for axis, (row, strip) in zip(axes.flat, found, strict=True):
        picture = iio.imread(strip)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xlim=(0, width), xticks=[], yticks=[])
        axis.set_ylabel(row["name"].replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for number, text in enumerate(("test slices", "reconstructions", "samples")):
        axes[0, 0].text((number + 0.5) * width / 3, -0.08 * size, text, ha="center", fontsize=9)
    ovq.save_figure(figure, out.name, folder=out.parent)


def main() -> None:
    """Train, score, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with slices; OASIS_VQ_DATA or a phantom cohort without it")
    parser.add_argument("--profile", choices=("quick", "full"), default="full", help="quick: small networks, 64x64")
    parser.add_argument("--image-size", type=int, help="128, or 64 in the quick profile")
    parser.add_argument("--minutes", type=float, help="of training for each network: 8, or 0.2 in the quick profile")
    parser.add_argument("--only", action="append", help="a system; may be given several times")
    parser.add_argument("--without-priors", action="store_true", help="reconstructions alone")
    parser.add_argument("--out", type=Path, help="folder of the rows: figures/reproduction, or below build")
    arguments = parser.parse_args()
    quick = arguments.profile == "quick"
    size = arguments.image_size or (64 if quick else 128)
    arguments.minutes = arguments.minutes or (0.2 if quick else 8.0)
    out = arguments.out or (ROOT / "build" / "reproduction_quick" if quick else ROOT / "figures" / "reproduction")

    os.environ["OASIS_VQ_PROFILE"] = arguments.profile
    device = start_tensorflow()
    index = ovq.find_slices(arguments.data) if arguments.data else ovq.find_or_make_slices(max(size, 128))
    chosen = systems(size, profile=arguments.profile)
    if arguments.without_priors:
        chosen = {name: dataclasses.replace(system, prior=None) for name, system in chosen.items()}
    if arguments.only:
        if unknown := sorted(set(arguments.only) - set(chosen)):
            parser.error(f"a system is one of {', '.join(chosen)}. Received: {', '.join(unknown)}")
        chosen = {name: chosen[name] for name in arguments.only}
    rows = {name: Row(out, name) for name in chosen}
    plan(rows, chosen, arguments, index, device)
    for name, row in rows.items():
        try:
            check_same(row, chosen[name], arguments, index)
        except ValueError as error:
            parser.error(str(error))
        print(name, flush=True)
        fill(row, index, num_samples=64 if quick else 512)
        summarise(out)


if __name__ == "__main__":
    main()
