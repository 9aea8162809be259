"""Train the five published systems and ours for the same time each, and write the table of what was claimed and found.

    python benchmarks/reproduce.py --data DATA                                  all of them
    OASIS_VQ_DATA=DATA make reproduce                                           the same
    python benchmarks/reproduce.py --data DATA --only bce_search                one of them
    python benchmarks/reproduce.py --data DATA --image-size 256 --without-priors --out figures/reproduction_256
    make reproduce PROFILE=quick                                                a rehearsal on few phantom slices

First of all the rates of all networks are measured, in turns, on a quiet machine, and OUT/plan.json is written: every
network gets the passes over the slices that fit into the time, at most those of its report; where the time would end
within a pass, some people are left out. Then come all VQ-VAEs and after them all priors; the row of a system, a file in
OUT, is written as soon as there is something to say. What is in it is not trained again, and a training that was
interrupted goes on. A training that fails leaves a row that says why, and the others go on. To begin anew, remove OUT
and build/reproduction; for one row, its file in OUT and its folder there.
OUT is figures/reproduction as long as what is asked for is the table that is there, and for other data or minutes
build/figures/reproduction_DATA. OUT.md, OUT.tex and OUT.pdf show all rows, OUT_rate_distortion.pdf brain_ssim against
bits; loss curves and reconstructions with code maps are in build/reproduction.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import matplotlib.pyplot as plt
import numpy as np
from generation import grids_rate
from reconstruction import images_rate
from turns import in_turns

import oasis_vq as ovq
from oasis_vq.config import ROOT, Paths
from oasis_vq.files import write_json, write_whole
from oasis_vq.quality import is_valid
from oasis_vq.runtime import start_tensorflow
from oasis_vq.tables import escaped, latex_table, markdown_table

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
    within: str = ""
    """Name of a system before it, which may end before the time does, with its epochs: no part of this takes longer."""

    def parts(self, index: ovq.SliceIndex) -> dict[str, ovq.VQVAEConfig | ovq.PriorConfig]:
        """Return what is trained: `vqvae`; `prior`; `under_prior`, the VQ-VAE of its codes, if that is another one."""
        if self.prior is None:
            return {"vqvae": self.vqvae}
        under = self.vqvae
        if max(under.grid_shape) > WIDEST_PRIOR:
            under = dataclasses.replace(under, image_size=WIDEST_PRIOR * under.downsampling)
        prior = dataclasses.replace(self.prior, refines=False).matched_to(under).conditioned_by(index)
        return {"vqvae": self.vqvae, **({} if under == self.vqvae else {"under_prior": under}), "prior": prior}


def systems(image_size: int, *, profile: str = "full", with_priors: bool = True) -> dict[str, System]:
    """Return what is compared: the published systems, one of them with another loss, the keras.io one, and ours."""
    one_level = dataclasses.replace(ovq.recipe("default128", profile=profile).prior, batch_size=16)

    def system(
        name: str, base: str, reported: str = "", *, within: str = "", with_prior: bool = True, **changes
    ) -> System:
        recipe = ovq.recipe(base, profile=profile)
        vqvae = dataclasses.replace(recipe.vqvae, image_size=image_size, **changes)
        prior = dataclasses.replace(one_level, recipe=base) if recipe.coarse else recipe.prior  # refines nothing here
        return System(name, vqvae, prior if with_prior and with_priors else None, reported, within)

    published = [name for name in ovq.recipe_names() if ovq.recipe(name).reported]
    found = [system(name, name, ovq.recipe(name).reported) for name in published]
    found.append(system("bce_search, squared error", "bce_search", with_prior=False, loss="mse"))
    found += [
        system("keras_io", "keras_io", with_prior=False),
        system("ours, 8x", "default256" if image_size >= 256 else "default128"),
        system("ours, 4x", "fine128", with_prior=False),
        # batchnorm_tanh ends with its fifteen epochs, the earliest: what is held against all of them takes no longer.
        system("ours, 4x, 64 codes", "fine128", within="batchnorm_tanh", num_embeddings=64),
        system("ours, 2x", "fine128", with_prior=False, downsampling=2, width=32, num_residual_blocks=1),
    ]
    return {made.name: made for made in found}


def network(config: ovq.VQVAEConfig | ovq.PriorConfig) -> str:
    """Return a text that is the same for configurations that take the same time for a step."""
    left_out = {"recipe": "", "epochs": 1} | ({"loss": "mse"} if isinstance(config, ovq.VQVAEConfig) else {})
    return json.dumps(dataclasses.replace(config, **left_out).to_dict())


def make_plan(chosen: dict[str, System], index: ovq.SliceIndex, minutes: float, device: str) -> dict:
    """Measure the rates of all networks, and return the trainings that fit into the time."""
    configs = {(name, part): config for name, system in chosen.items() for part, config in system.parts(index).items()}
    measures = {}
    for key in dict.fromkeys(map(network, configs.values())):
        config = next(config for config in configs.values() if network(config) == key)
        if isinstance(config, ovq.PriorConfig):
            measures[key] = grids_rate(config)
        else:
            measures[key] = images_rate(config, ovq.load_images(index.train[:16], image_size=config.image_size))
    rates = in_turns(measures, turns=3)
    plan = {**identity(index, minutes), "device": device, "systems": {name: {} for name in chosen}}
    for (name, part), config in configs.items():
        seconds = 60 * minutes * SHARE
        shorter = plan["systems"].get(chosen[name].within, {}).get(part)
        if shorter:
            seconds = min(seconds, shorter["seconds"])
        plan["systems"][name][part] = planned(config, seconds, rates[network(config)], index.train)
    return plan


def planned(config: ovq.VQVAEConfig | ovq.PriorConfig, seconds: float, rate: float, train: ovq.Slices) -> dict:
    """Return the training that fits into so many seconds at a rate, in items a second."""
    copies, all_people = 2 if getattr(config, "upside_down_copies", False) else 1, train.num_subjects
    passes = seconds * rate / (copies * len(train))
    epochs = min(config.epochs, max(1, math.ceil(passes)))
    people = min(all_people, max(1, int(all_people * passes / epochs)))
    return {
        "config": dataclasses.replace(config, epochs=epochs).to_dict(),
        "people": people,
        "rate": rate,
        "seconds": epochs * copies * len(train) * people / all_people / rate,
    }


def identity(index: ovq.SliceIndex, minutes: float) -> dict:
    """Return what all rows of a table have in common."""
    return {"data": index.train.root.name, "splits": index.fingerprints(), "minutes": minutes}


def disagreement(plan: dict, chosen: dict[str, System], index: ovq.SliceIndex, minutes: float) -> str:
    """Return in what a plan is not what is asked for, or ''."""
    for name, value in identity(index, minutes).items():
        if plan[name] != value:
            return name
    for name, system in chosen.items():
        for part, config in system.parts(index).items():
            known = plan["systems"].get(name, {}).get(part)
            if known is None or type(config).from_dict({**known["config"], "epochs": config.epochs}) != config:
                return f"{name}, {part}"
        if set(plan["systems"][name]) != set(system.parts(index)):
            return name
    return ""


class Row:
    """A row of the table: a JSON file that grows, and a strip of pictures beside it."""

    def __init__(self, folder: Path, name: str):
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        self.name, self.file, self.strip = name, folder / f"{slug}.json", folder / f"{slug}.png"
        self.models = MODELS / folder.name / slug
        self.values: dict = json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, **values) -> None:
        """Keep what has been found."""
        self.values |= values
        write_json(self.file, self.values)

    def draw(self, parts: list[np.ndarray]) -> None:
        """Write the strip: images (n, size, size, 1) of each part beside each other."""
        strip = np.concatenate([image[..., 0] for part in parts for image in part], axis=1)
        write_whole(self.strip, iio.imwrite("<bytes>", np.round(strip * 255).astype(np.uint8), extension=".png"))

    @property
    def failure(self) -> str:
        """Why a training of this row came to nothing, or ''."""
        return self.values.get("failure", "")

    @property
    def has_reconstruction(self) -> bool:
        """Whether the VQ-VAE has been scored and pictured."""
        return "reconstruction" in self.values and self.strip.exists()

    @property
    def has_prior(self) -> bool:
        """Whether the prior has been scored."""
        return {"prior", "samples", "sampling_seconds"} <= set(self.values)


def twin(name: str, plan: dict) -> str | None:
    """Return the system before this one whose plan is the same but for the recipe's name, if there is one."""

    def bare(system: dict) -> dict:
        return {part: {**training, "config": {**training["config"], "recipe": ""}} for part, training in system.items()}

    names = list(plan["systems"])
    earlier = names[: names.index(name)]
    return next((other for other in earlier if bare(plan["systems"][other]) == bare(plan["systems"][name])), None)


def is_copied(row: Row, out: Path, plan: dict, wanted: str) -> bool:
    """Copy into a row what its twin has, if there is one that has what is wanted, and return whether."""
    other = twin(row.name, plan)
    source = Row(out, other) if other else None
    if source is None or not getattr(source, wanted):
        return False
    row.add(**source.values | {"name": row.name})
    shutil.copyfile(source.strip, row.strip)
    return True


def train(row: Row, plan: dict, part: str, index: ovq.SliceIndex, vqvae: ovq.VQVAE | None = None):
    """Return the model of a part of a row, trained, or loaded if it has been."""
    kind = ovq.VQVAEConfig if vqvae is None else ovq.PriorConfig
    if plan[part]["people"] < index.train.num_subjects:
        index = ovq.find_slices(index.train.root, limit_train=plan[part]["people"])
    model = ovq.fit_or_load(row.models / part, kind.from_dict(plan[part]["config"]), index, vqvae=vqvae)
    history = ovq.read_history(model.folder)
    weights = sum(math.prod(weight.shape) for weight in model.trainable_variables)
    if vqvae is None and model.config.quantizer == "ema":  # its codebook is not trained by gradient
        weights += model.config.num_embeddings * model.config.embedding_dim
    found = {"seconds": float(history["seconds"].sum()), "epochs": len(history["epoch"]), "weights": weights}
    row.add(trainings={**row.values.get("trainings", {}), part: found})
    names = ["total_loss", "reconstruction_loss", "vq_loss"] if vqvae is None else ["bits_per_code", "accuracy"]
    ovq.save_figure(ovq.plot_history(history, names), part, folder=row.models)
    plt.close("all")
    return model


@contextlib.contextmanager
def failing_alone(row: Row) -> Iterator[None]:
    """Keep in a row why its training came to nothing, so that the other systems get their turn."""
    try:
        yield
    except (FloatingPointError, MemoryError) as error:
        print(error, flush=True)
        row.add(failure=str(error))


def fill_reconstruction(row: Row, plan: dict, index: ovq.SliceIndex, device: str) -> None:
    """Train, score and picture the VQ-VAE of a row."""
    row.values = {}  # what there is may be of models that are lost
    row.add(name=row.name, device=device)
    vqvae = train(row, plan, "vqvae", index)
    images = ovq.load_images(three_slices(index), image_size=vqvae.config.image_size)
    codes = vqvae.encode(images)
    again = vqvae.decode(codes)
    panels = ovq.plot_reconstructions(images, codes, again, num_embeddings=vqvae.config.num_embeddings)
    ovq.save_figure(panels, "reconstructions", folder=row.models)
    plt.close("all")
    row.draw([images, again])
    report = ovq.evaluate_reconstruction(vqvae, index.test, train=index.train)
    row.add(reconstruction={name: value for name, value in report.items() if name != "positions"})


def fill_prior(row: Row, plan: dict, index: ovq.SliceIndex, device: str, *, num_samples: int) -> None:
    """Train, score and picture the prior of a row; first its VQ-VAE, if that is lost."""
    if not (row.models / "vqvae").exists():
        fill_reconstruction(row, plan, index, device)
    vqvae = train(row, plan, "vqvae", index)
    under = train(row, plan, "under_prior", index) if "under_prior" in plan else vqvae
    prior = train(row, plan, "prior", index, under)
    if "prior" not in row.values:
        row.add(prior=ovq.evaluate_prior(prior, under, index))
    if "sampling_seconds" not in row.values:
        under.decode(ovq.sample_codes(prior, 16, seed=0))  # compiles
        start = time.perf_counter()
        under.decode(ovq.sample_codes(prior, 16, seed=1))
        row.add(sampling_seconds=time.perf_counter() - start)
    shown = three_slices(index)
    images = ovq.load_images(shown, image_size=vqvae.config.image_size)
    of = {"slice_index": shown.slice, "label": shown.label}
    drawn = under.decode(ovq.sample_codes(prior, len(shown), **{name: of[name] for name in prior.condition_sizes}))
    scale = images.shape[1] // drawn.shape[1]
    row.draw([images, vqvae.reconstruct(images), drawn.repeat(scale, axis=1).repeat(scale, axis=2)])
    if "samples" not in row.values:
        scores = ovq.evaluate_samples(prior, under, index, num=num_samples, num_repeats=2)
        row.add(samples={name: value for name, value in scores.items() if name != "distances"})


def three_slices(index: ovq.SliceIndex) -> ovq.Slices:
    """Return slices of three test people, from the lower to the upper half of the head."""
    low, high = index.slice_range
    people = np.resize(np.unique(index.test.subject)[: len(SHOWN)], len(SHOWN))
    rows = []
    for person, share in zip(people, SHOWN, strict=True):
        own = np.flatnonzero(index.test.subject == person)
        rows.append(own[np.argmin(np.abs(index.test.slice[own] - (low + share * (high - low))))])
    return index.test[np.array(rows)]


def number(value: float | None, form: str) -> str:
    """Return a score as text, '-' if it is none."""
    return "-" if value is None else format(value, form)


def between(samples: dict, score: str) -> str:
    """Return a score of samples with those of the ceiling and the floor."""
    form = ".0f" if score == "frechet_distance" else ".2f"
    own, ceiling, floor = (number(part[score], form) for part in (samples, samples["ceiling"], samples["floor"]))
    void = score == "classifier_accuracy" and not is_valid(samples)
    return f"{own} ({ceiling}, {floor})" + ", void" * void


def duration(plan: dict, row: dict, part: str, of: int, all_people: int) -> str:
    """Return how long a training took at the measured rate, and by the clock, and how many of its epochs it had."""
    found, training = row["trainings"][part], plan[part]
    people = f" on {training['people']} people" if training["people"] < all_people else ""
    return f"{training['seconds'] / 60:.1f} min ({found['seconds'] / 60:.1f}), {found['epochs']} of {of} epochs{people}"


def reconstruction_cells(system: System, plan: dict, row: dict, all_people: int) -> dict[str, str]:
    """Return the cells of a row in the table of reconstructions, by column."""
    report = row["reconstruction"]
    low, high = report["intervals"]["brain_ssim"]
    entropy = math.prod(system.vqvae.grid_shape) * math.log2(report["perplexity"])
    return {
        "system": system.name,
        "its report claims": system.reported or "-",
        "bits an image, entropy of its codes": f"{report['bits_per_image']:,.0f}, {entropy:,.0f}",
        "weights": f"{row['trainings']['vqvae']['weights']:,}",
        "training (by the clock)": duration(plan, row, "vqvae", system.vqvae.epochs, all_people),
        "ssim": number(report["ssim"], ".3f"),
        "brain_ssim": f"{number(report['brain_ssim'], '.3f')} ({number(low, '.3f')}-{number(high, '.3f')})",
        "brain_psnr": f"{number(report['brain_psnr'], '.1f')} dB",
        "codes used": f"{report['codebook_usage']:.0%}",
    }


def prior_cells(system: System, plan: dict, row: dict, all_people: int) -> dict[str, str]:
    """Return the cells of a row in the table of priors, by column."""
    report, under = row["prior"], "under_prior" if "under_prior" in plan else "vqvae"
    (height, width), size = plan["prior"]["config"]["grid_shape"], plan[under]["config"]["image_size"]
    time_taken = duration(plan, row, "prior", system.prior.epochs, all_people)
    if under == "under_prior":
        time_taken += f"; its VQ-VAE {duration(plan, row, under, system.vqvae.epochs, all_people)}"
    return {
        "system": system.name,
        "codes": f"{height}×{width} of {size}×{size} pixels",
        "weights": f"{row['trainings']['prior']['weights']:,}",
        "training (by the clock)": time_taken,
        "bits a test code (per position)": f"{report['bits_per_code']:.2f} ({report['baselines']['per_position']:.2f})",
        "bits an image with it": f"{report['bits_per_image']:,.0f}",
        "accuracy in validation, test": f"{report['validate_accuracy']:.2f}, {report['accuracy']:.2f}",
        "classifier (ceiling, floor)": between(row["samples"], "classifier_accuracy"),
        "coverage (ceiling, floor)": between(row["samples"], "coverage"),
        "Fréchet distance (ceiling, floor)": between(row["samples"], "frechet_distance"),
        "16 samples": f"{row['sampling_seconds']:.1f} s",
    }


def verdicts(found: dict[str, dict], chosen: dict[str, System], plan: dict) -> list[str]:
    """Return a sentence for each system: whether it beats the baselines, and which of ours is to be held against it.

    That is the one with the most bits among those that take no more bits and no more time, and for samples have a
    prior. Of time nothing is closer than the slices of one of the other's people, by which a plan ends early.
    """
    sentences = []
    for name, row in found.items():
        report, used = row["reconstruction"], row["reconstruction"]["codebook_usage"]
        lost = [kind.replace("_", " ") for kind in report["baselines"] if loses_to(report, kind)]
        text = f"{name}: beats the baselines"
        if lost:
            epochs = f"{row['trainings']['vqvae']['epochs']} of {chosen[name].vqvae.epochs} epochs"
            text = f"{name}: does NOT beat the {' and the '.join(lost)} ({epochs}, {used:.0%} of its codes in use)"
        if chosen[name].reported:
            text += f"; {answer(name, found, chosen, plan)}"
        sentences.append(f"{text}.")
    return sentences


def answer(name: str, found: dict[str, dict], chosen: dict[str, System], plan: dict) -> str:
    """Return what ours do with no more bits and time than a published system."""
    theirs = found[name]
    best, reason = held_against(name, ("vqvae",), found, chosen, plan)
    if reason:
        return reason
    own = found[best]["reconstruction"]
    score, bits = own["brain_ssim"], own["bits_per_image"]
    better = "is beaten by" if score > theirs["reconstruction"]["brain_ssim"] else "is NOT beaten by"
    text = f"{better} '{best}' ({score:.3f} with {bits:,.0f} bits)"
    if "samples" not in theirs:
        return text
    if loses_to(theirs["reconstruction"], "mean_slice"):
        return f"{text}; its samples are not judged: they are held against reconstructions that lose to the mean slice"
    best, reason = held_against(name, ("vqvae", "prior"), found, chosen, plan)
    return f"{text}; {reason or samples_answer(theirs['samples'], found[best]['samples'], best)}"


def held_against(
    name: str, parts: tuple[str, ...], found: dict[str, dict], chosen: dict[str, System], plan: dict
) -> tuple[str, str]:
    """Return which of ours is to be held against a system in some parts, and why it cannot be; one of them is empty."""
    given = [plan["systems"][name][part] for part in parts]
    fair = [
        own
        for own in chosen
        if own.startswith("ours")
        and chosen[own].vqvae.bits_per_image <= chosen[name].vqvae.bits_per_image
        and all(
            plan["systems"][own].get(part, {}).get("seconds", math.inf) <= other["seconds"] * (1 + 1 / other["people"])
            for part, other in zip(parts, given, strict=True)
        )
    ]
    if not fair:
        return "", "none of ours takes as few bits in as little time"
    best = max(fair, key=lambda own: chosen[own].vqvae.bits_per_image)
    if best not in found or ("prior" in parts and "samples" not in found[best]):
        state = "came to nothing" if "failure" in found.get(best, {}) else "is not trained yet"
        return "", f"'{best}', which is to be held against it, {state}"
    return best, ""


def loses_to(report: dict, baseline: str) -> bool:
    """Return whether reconstructions have no more brain_ssim than a baseline of the report."""
    return not (report["brain_ssim"] or 0) > (report["baselines"][baseline]["brain_ssim"] or 0)


def samples_answer(theirs: dict, ours: dict, name: str) -> str:
    """Return whose samples are better: nearer to reconstructions of test slices, and covering more of them.

    Each is held against reconstructions by its own VQ-VAE. One that draws everything alike has samples without fault.
    """
    distances = [math.inf if part["frechet_distance"] is None else part["frechet_distance"] for part in (theirs, ours)]
    coverages = [part["coverage"] or 0.0 for part in (theirs, ours)]
    beaten = distances[1] < distances[0] and coverages[1] > coverages[0]
    told = [number(part["classifier_accuracy"], ".2f") for part in (theirs, ours)]
    void = sum(not is_valid(part) for part in (theirs, ours))
    return (
        f"its samples are {'beaten' if beaten else 'NOT beaten'} by those of '{name}': Fréchet distance "
        f"{distances[0]:.0f}, of ours {distances[1]:.0f}; coverage {coverages[0]:.2f} and {coverages[1]:.2f}; "
        f"told with {told[0]} and {told[1]}" + ("", ", of which one is void", ", both void")[void]
    )


def summarise(out: Path, chosen: dict[str, System], plan: dict, all_people: int) -> str:
    """Write the tables and the figures of what there is, and return the tables."""
    found, strips, failures = {}, [], []
    for name in chosen:
        row = Row(out, name)
        if row.failure:
            failures.append(f"{name}: a training came to nothing. {row.failure}")
        if row.has_reconstruction:
            found[name] = row.values
            strips.append(row.strip)
    if not found:
        return ""
    size = next(iter(chosen.values())).vqvae.image_size
    baselines = next(iter(found.values()))["reconstruction"]["baselines"]
    scores = "; ".join(
        f"{name.replace('_', ' ')}: ssim {number(part['ssim'], '.3f')}, brain_ssim {number(part['brain_ssim'], '.3f')}"
        for name, part in baselines.items()
    )
    intro = (
        f"{plan['data']}, {size}×{size}, at most {plan['minutes']:g} minutes for each network, at rates measured on: "
        f"{plan['device']}. Scores of test people. {scores}. Bits: of a fixed length for each code, and "
        "the entropy of all test codes, as if each were drawn by itself. Samples are compared at 64×64 at most."
    )
    cells = [
        [make(chosen[name], plan["systems"][name], row, all_people) for name, row in found.items() if part in row]
        for make, part in ((reconstruction_cells, "reconstruction"), (prior_cells, "samples"))
    ]
    tables = [rows for rows in cells if rows]
    told = verdicts(found, chosen, plan) + failures
    told += [f"{name}: here the same as {other}." for name in found if (other := twin(name, plan))]
    text = "\n".join([intro, "", *map(markdown_table, tables), *(f"- {sentence}" for sentence in told), ""])
    write_whole(out.with_suffix(".md"), text.encode())
    items = "\n".join(rf"\item {escaped(sentence)}" for sentence in told)
    written = [latex_table(rows, widths={"its report claims": "6cm"}) for rows in tables]
    parts = [escaped(intro) + "\n", *written, f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}\n"]
    write_whole(out.with_suffix(".tex"), "\n".join(parts).encode())

    scored = {name: row["reconstruction"] for name, row in found.items()}
    points = {name: (report["bits_per_image"], report["brain_ssim"]) for name, report in scored.items()}
    lines = {"mean training slice": baselines["mean_slice"]["brain_ssim"]}
    title = f"{plan['data']}, {size}×{size}, test: at most {plan['minutes']:g} minutes of training each"
    ovq.save_figure(
        ovq.plot_rate_distortion(points, baselines=lines, title=title), f"{out.name}_rate_distortion", folder=out.parent
    )

    headings = ["test slices", "reconstructions", *["samples"] * any("samples" in row for row in found.values())]
    sides = (0.9 + 3 * len(headings), 1.2 * len(found))
    figure, axes = plt.subplots(len(found), 1, figsize=sides, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0)
    width = len(headings) * len(SHOWN) * size
    for axis, name, strip in zip(axes.flat, found, strips, strict=True):
        axis.imshow(iio.imread(strip), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xlim=(0, width), xticks=[], yticks=[])
        axis.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for column, heading in enumerate(headings):
        axes[0, 0].text((column + 0.5) * width / len(headings), -0.08 * size, heading, ha="center", fontsize=9)
    ovq.save_figure(figure, out.name, folder=out.parent)
    plt.close("all")
    return text


def default_out(chosen: dict[str, System], index: ovq.SliceIndex, minutes: float, *, quick: bool) -> Path:
    """Return where the rows go if nobody says so: not into a table of something else."""
    if quick:
        return ROOT / "build" / "reproduction_quick"
    out = ROOT / "figures" / "reproduction"
    plan = out / "plan.json"
    if plan.exists() and (differs := disagreement(json.loads(plan.read_text()), chosen, index, minutes)):
        other = Paths().figures / f"reproduction_{index.train.root.resolve().name}"
        print(f"The table in {out} is of something else ({differs}): this one is {other}.md", flush=True)
        return other
    return out


def main() -> None:
    """Plan, train, score, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with slices; OASIS_VQ_DATA or a phantom cohort without it")
    parser.add_argument("--profile", choices=("quick", "full"), default="full", help="quick: small networks, 64x64")
    parser.add_argument("--image-size", type=int, choices=(64, 128, 256), help="128, or 64 in the quick profile")
    parser.add_argument("--minutes", type=float, help="of training for each network: 8, or 0.1 in the quick profile")
    parser.add_argument("--only", action="append", help="a system; may be given several times")
    parser.add_argument("--without-priors", action="store_true", help="reconstructions alone")
    parser.add_argument("--out", type=Path, help="folder of the rows: figures/reproduction, or below build; see above")
    arguments = parser.parse_args()
    quick = arguments.profile == "quick"
    size, minutes = arguments.image_size or (64 if quick else 128), arguments.minutes or (0.1 if quick else 8.0)
    chosen = systems(size, profile=arguments.profile, with_priors=not arguments.without_priors)
    wanted = arguments.only or list(chosen)
    if unknown := sorted(set(wanted) - set(chosen)):
        parser.error(f"a system is one of {', '.join(chosen)}. Received: {', '.join(unknown)}")

    os.environ["OASIS_VQ_PROFILE"] = arguments.profile
    device = start_tensorflow()
    index = ovq.find_slices(arguments.data) if arguments.data else ovq.find_or_make_slices(max(size, 128))
    out = arguments.out or default_out(chosen, index, minutes, quick=quick)
    out.mkdir(parents=True, exist_ok=True)
    file, all_people = out / "plan.json", index.train.num_subjects
    if not file.exists():
        print("measuring the rates of all networks", flush=True)
        write_json(file, make_plan(chosen, index, minutes, device))
    plan = json.loads(file.read_text())
    if differs := disagreement(plan, chosen, index, minutes):
        parser.error(
            f"{file} is of something else ({differs}): take another OUT, or remove {out} and {MODELS / out.name}"
        )
    wanted = [name for name in chosen if name in wanted]  # in their order: a twin comes after the other
    for name in wanted:
        row = Row(out, name)
        if not row.failure and not row.has_reconstruction and not is_copied(row, out, plan, "has_reconstruction"):
            print(name, flush=True)
            with failing_alone(row):
                fill_reconstruction(row, plan["systems"][name], index, device)
            summarise(out, chosen, plan, all_people)
    for name in [name for name in wanted if "prior" in plan["systems"][name]]:
        row = Row(out, name)
        if not row.failure and not row.has_prior and not is_copied(row, out, plan, "has_prior"):
            print(f"{name}, prior", flush=True)
            with failing_alone(row):
                fill_prior(row, plan["systems"][name], index, device, num_samples=64 if quick else 512)
            summarise(out, chosen, plan, all_people)
    print(summarise(out, chosen, plan, all_people))


if __name__ == "__main__":
    main()
