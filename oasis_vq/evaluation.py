"""Reports on a VQ-VAE and on a prior, each beside the trivial baselines that it has to beat."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.codes import Codes, encode_slices
from oasis_vq.guard import check_readable
from oasis_vq.metrics import decibels, squared_errors, ssim_per_image
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.quantizer import perplexity
from oasis_vq.slices import SliceIndex, Slices, find_slices
from oasis_vq.streams import make_dataset
from oasis_vq.vqvae import VQVAE

COURSEWORK_SSIM = 0.6
"""The coursework's criterion for the mean SSIM on the test set."""
NUM_RESAMPLES = 1000


class _Scores:
    """Scores of a growing set of images against their references, kept by image."""

    def __init__(self):
        self.parts: list[tuple] = []

    def add(self, references: np.ndarray, images: np.ndarray) -> None:
        """Add images (n, size, size, 1) in [0, 1]."""
        self.parts.append((*ssim_per_image(references, images), *squared_errors(references, images)))

    def of(self, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """Return the scores over some of the images."""
        whole, brain, errors, sums, counts = (np.concatenate(part)[rows] for part in zip(*self.parts, strict=True))
        with_brain = np.isfinite(brain)
        return {
            "ssim": float(whole.mean()),
            "brain_ssim": float(brain[with_brain].mean()) if with_brain.any() else float("nan"),
            "psnr": decibels(errors.mean()),
            "brain_psnr": decibels(sums.sum() / counts.sum()) if counts.sum() else float("nan"),
        }


def mean_slices(train: Slices, *, image_size: int, fit: str = "pad") -> dict[int, np.ndarray]:
    """Return the mean training image (size, size, 1) at each slice position, and over all of them under -1."""
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    start = 0
    for images in make_dataset(train, image_size=image_size, fit=fit, batch_size=64).as_numpy_iterator():
        for image, position in zip(images, train.slice[start : start + len(images)], strict=True):
            for key in (int(position), -1):
                sums[key] = sums.get(key, 0.0) + image.astype(np.float64)
                counts[key] = counts.get(key, 0) + 1
        start += len(images)
    return {key: (total / counts[key]).astype(np.float32) for key, total in sums.items()}


def evaluate_reconstruction(vqvae: VQVAE, slices: Slices, *, train: Slices | None = None, seed: int = 0) -> dict:
    """Score the reconstructions of slices, usually the test split.

    Args:
        vqvae: the model.
        slices: what to reconstruct; streamed, never all in memory.
        train: training slices for the mean-slice baseline; None for those in the same data folder.
        seed: of the bootstrap.

    Returns:
        ssim, brain_ssim, psnr, brain_psnr, bits_per_image, perplexity, codebook_usage, num_images, num_subjects,
        all float; `baselines`: the scores of an all-black image and of the mean training slice at the same position;
        `intervals`: for each score the 95 % bootstrap interval over subjects; `positions`: the slice positions under
        `slice`, and at each of them the ssim and brain_ssim of `model` and of each baseline (NaN without any brain).
    """
    train = find_slices(slices.root).train if train is None else train
    check_readable(slices, train)
    reading = {"image_size": vqvae.config.image_size, "fit": vqvae.config.fit}
    means = mean_slices(train, **reading)
    scores = {name: _Scores() for name in ("model", "black", "mean_slice")}
    codes, start = [], 0
    dataset = make_dataset(slices, **reading, batch_size=64)
    for images in tqdm(dataset.as_numpy_iterator(), "scoring", len(dataset), unit="batch", leave=False):
        codes.append(vqvae.encode(images))
        positions = slices.slice[start : start + len(images)]
        scores["model"].add(images, vqvae.decode(codes[-1]))
        scores["black"].add(images, np.zeros_like(images))
        scores["mean_slice"].add(images, np.stack([means.get(int(at), means[-1]) for at in positions]))
        start += len(images)

    counts = np.bincount(np.concatenate(codes).ravel(), minlength=vqvae.config.num_embeddings)
    return {
        **scores["model"].of(),
        "bits_per_image": vqvae.config.bits_per_image,
        "perplexity": perplexity(np.concatenate(codes), vqvae.config.num_embeddings),
        "codebook_usage": float((counts > 0).mean()),
        "num_images": float(len(slices)),
        "num_subjects": float(slices.num_subjects),
        "baselines": {name: scores[name].of() for name in ("black", "mean_slice")},
        "intervals": _bootstrap(scores["model"].of, slices.subject, seed),
        "positions": _by_position(scores, slices.slice),
    }


def _by_position(scores: dict[str, _Scores], positions: np.ndarray) -> dict:
    """Return the distinct positions (n,), and ssim and brain_ssim of each set of scores at each of them."""
    distinct = np.unique(positions)
    curves: dict = {"slice": [int(position) for position in distinct]}
    for name, part in scores.items():
        found = [part.of(np.flatnonzero(positions == position)) for position in distinct]
        curves[name] = {score: [values[score] for values in found] for score in ("ssim", "brain_ssim")}
    return curves


def _bootstrap(of: Callable, subjects: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Return the 2.5 and 97.5 percentiles over resampled subjects (n,) of the scores that `of` gives for some rows.

    Of one subject nothing can be said: NaN.
    """
    generator = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(subjects == subject) for subject in np.unique(subjects)]
    if len(rows_of) < 2:
        return {name: [math.nan, math.nan] for name in of(slice(None))}
    drawn = []
    for _ in range(NUM_RESAMPLES):
        chosen = generator.integers(0, len(rows_of), len(rows_of))
        drawn.append(of(np.concatenate([rows_of[number] for number in chosen])))
    return {
        name: [float(value) for value in np.percentile([scores[name] for scores in drawn], (2.5, 97.5))]
        for name in drawn[0]
    }


def evaluate_prior(prior: PixelCNN, vqvae: VQVAE, index: SliceIndex) -> dict:
    """Score how well a prior predicts the codes of held-out slices.

    Returns:
        bits_per_code, accuracy (teacher-forced) and bits_per_image on the test codes, and coarse_bits_per_image, those
            of them that the coarse grid takes, if there is one; the same with the prefix `validate_` and `train_` (of
            as many training slices as there are validation slices);
        train_validate_gap: how many bits more a validation code costs than a training code;
        unconditional_bits_per_code: of test codes without slice position and class, if the prior knows them; all float;
        `intervals`: for each score but these two the 95 % bootstrap interval over subjects;
        `baselines`: bits per test code of `uniform` (log2 K), `unigram` (one histogram) and `per_position` (one
        histogram at each grid position), both of the training codes with add-one smoothing; `validate_baselines`: the
        same of the validation codes.
    """
    check_readable(*index.splits().values())
    codes = {split: encode_slices(vqvae, part, drafter=prior.drafter) for split, part in index.splits().items()}
    if "slice_index" in prior.condition_sizes:
        positions = np.unique(np.concatenate([part.slice_index for part in codes.values()]))
        unknown = np.setdiff1d(positions, prior.known_values["slice_index"])
        if len(unknown):
            print(f"note: the prior was trained on no slices at {unknown.tolist()}, and is not told where these are")
    chosen = np.random.default_rng(0).permutation(len(codes["train"]))[: len(codes["validate"])]
    report, intervals = {}, {}
    for split, part in (("", codes["test"]), ("validate_", codes["validate"]), ("train_", codes["train"][chosen])):
        bits, hits = (values.mean(axis=(1, 2)) for values in code_scores(prior, part))
        coarse = coarse_bits(prior, part)
        values = {"bits_per_code": bits, "bits_per_image": bits * math.prod(prior.config.grid_shape) + coarse}
        values |= {"accuracy": hits, **({"coarse_bits_per_image": coarse} if prior.drafter else {})}
        means = partial(_means, {f"{split}{name}": of_images for name, of_images in values.items()})
        report |= means()
        intervals |= _bootstrap(means, part.subject)
    report["train_validate_gap"] = report["validate_bits_per_code"] - report["train_bits_per_code"]
    if prior.condition_sizes and prior.config.condition_dropout:
        report["unconditional_bits_per_code"] = float(code_scores(prior, codes["test"], conditioned=False)[0].mean())
    for split, prefix in (("test", ""), ("validate", "validate_")):
        known = codes["train"].codes, codes[split].codes, prior.config.num_embeddings
        report[f"{prefix}baselines"] = code_baselines(*known)
    return report | {"intervals": intervals}


def _means(values: dict[str, np.ndarray], rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Return the means of values (n,) over some rows, by name."""
    return {name: float(of_images[rows].mean()) for name, of_images in values.items()}


def coarse_bits(prior: PixelCNN, codes: Codes) -> np.ndarray:
    """Return the bits (n,) of the coarse grids of codes under the prior that draws them; 0 if there are none."""
    if prior.drafter is None:
        return np.zeros(len(codes))
    bits, _ = code_scores(prior.drafter.prior, replace(codes, codes=codes.coarse, coarse=None, draft=None))
    return bits.sum(axis=(1, 2))


def code_scores(prior: PixelCNN, codes: Codes, *, conditioned: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits (n, h, w) each code costs under the prior, and whether it was the most likely (n, h, w).

    Args:
        prior: the model.
        codes: what is scored.
        conditioned: whether the prior is told slice position and class, where it knows them.
    """
    known = prior.known_conditions(codes.slice_index, codes.label)
    bits, hits = [], []
    size = prior.verb_batch_size  # logits are K times as large as codes: never all at once
    for start in range(0, len(codes), size):
        part = codes[start : start + size]
        given = {name: values[start : start + size] for name, values in known.items()} if conditioned else {}
        logits = prior.logits(part.codes, draft=part.draft, **given)
        nats = tf.nn.sparse_softmax_cross_entropy_with_logits(part.codes.astype(np.int32), logits).numpy()
        bits.append(nats / math.log(2))
        hits.append(logits.argmax(axis=-1) == part.codes)
    return np.concatenate(bits), np.concatenate(hits)


def code_baselines(train: np.ndarray, test: np.ndarray, num_embeddings: int) -> dict[str, float]:
    """Return the bits per test code of trivial models of the training codes, both (n, h, w) int."""
    positions = np.arange(train[0].size)
    counts = np.ones((len(positions), num_embeddings))  # add-one smoothing
    for grid in train:  # one at a time: there are 65,536 positions at full resolution
        counts[positions, grid.ravel()] += 1
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    unigram = np.bincount(train.ravel(), minlength=num_embeddings) + 1.0
    return {
        "uniform": math.log2(num_embeddings),
        "unigram": float(-np.log2(unigram / unigram.sum())[test].mean()),
        "per_position": float(np.mean([bits[positions, grid.ravel()].mean() for grid in test])),
    }


def _number(value: float | None) -> str:
    """Return a score as text; '-' if there is none, which a JSON file tells by null."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def table(report: dict) -> str:
    """Return a report as a text table: a line for each number, with its interval and the same of the baselines."""
    baselines, intervals = report.get("baselines", {}), report.get("intervals", {})
    lines = [f"{'':<28}{'model':>10}{'95 % interval':>20}" + "".join(f"{name:>14}" for name in baselines)]
    for name, value in report.items():
        if isinstance(value, dict):
            continue
        low_high = f"  {' to '.join(map(_number, intervals[name]))}" if name in intervals else ""
        others: list = [part.get(name) if isinstance(part, dict) else None for part in baselines.values()]
        split = name.removesuffix("bits_per_code").removesuffix("bits_per_image")
        coarse = report.get(f"{split}coarse_bits_per_image")
        if name.endswith("bits_per_code") and coarse is None:
            others = list(report.get(f"{split}baselines", {}).values())
        elif name == f"{split}bits_per_image" and coarse is not None:  # the baselines do without the coarse grid
            positions = (value - coarse) / (report[f"{split}bits_per_code"] or math.nan)
            others = [positions * bits for bits in report.get(f"{split}baselines", {}).values()]
        cells = "".join(f"{'' if other is None else format(other, '.3f'):>14}" for other in others)
        lines.append(f"{name:<28}{_number(value):>10}{low_high:>20}{cells}".rstrip())
    if "ssim" in report:
        verdict, black = "met" if report["ssim"] >= COURSEWORK_SSIM else "not met", baselines["black"]
        lines.append(
            f"The coursework asks for a mean SSIM of {COURSEWORK_SSIM}: {verdict}. "
            f"An all-black image scores {black['ssim']:.3f} there, and {_number(black['brain_ssim'])} in brain_ssim."
        )
    if "positions" in report:
        pairs = zip(report["positions"]["model"]["brain_ssim"], report["positions"]["slice"], strict=True)
        with_brain = [pair for pair in pairs if _number(pair[0]) != "-"]
        if len(with_brain) > 1:
            (low, worst), (high, best) = min(with_brain), max(with_brain)
            lines.append(
                f"By slice position, brain_ssim goes from {low:.3f} (slice {worst}) to {high:.3f} (slice {best})."
            )
    return "\n".join(lines)
