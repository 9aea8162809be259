"""How good samples are: beside held-out slices, between a floor and a ceiling; and whether they are copies.

Samples are compared with *reconstructions* of held-out slices, which have the same decoder's blur: what is left is the
prior's doing. The ceiling is another set of held-out slices, of other people: one finite set, which samples can be
closer than. The floor draws each code from the histogram of its grid position; a blurred mean lies where brains are
dense, so that the floor's density, alone of its scores, can be above the ceiling's.
"""

import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from tqdm import tqdm

from oasis_vq.codes import Codes, encode_slices
from oasis_vq.guard import check_readable
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.sampling import sample_codes
from oasis_vq.slices import SliceIndex, Slices
from oasis_vq.streams import load_images, make_dataset
from oasis_vq.vqvae import VQVAE, in_batches

NUM_FEATURES = 64
"""Principal components of training slices in which distances are taken."""
NUM_NEIGHBOURS = 5
"""k of density and coverage."""
FEATURE_SIZE = 64
"""Side to which images are averaged down, if they are larger, for all but diversity, if none is given."""
MOST_COPIES = 0.9
"""Share of reconstructed training slices that are as near to a training slice as what is called copy-like."""
NUM_PASSES = 15
"""Passes over its training images that a classifier is trained for. So it knew the floor on IXI validation slices."""


def evaluate_samples(
    prior: PixelCNN,
    vqvae: VQVAE,
    index: SliceIndex,
    *,
    num: int = 512,
    seed: int = 0,
    temperature: float = 1.0,
    size: int = FEATURE_SIZE,
    num_repeats: int = 4,
) -> dict:
    """Score samples of a prior beside test slices, at their slice positions and of their classes.

    Args:
        prior: draws the codes.
        vqvae: decodes them.
        index: train for the features, the histogram and the copies; validate for the ceiling; test to compare with.
        num: samples, and as many test and validation slices, of whole people; fewer if there are fewer.
        seed: of the samples, the people and the classifier.
        temperature: of the samples.
        size: side to which images are averaged down, if they are larger, for all but diversity.
        num_repeats: classifiers that are trained for each accuracy.

    Returns:
        classifier_accuracy: of a two-sample test against the reconstructed test slices, 0.5 if they cannot be told
            apart; void unless the ceiling has 0.45 to 0.55 and the floor at least 0.95. The ceiling's is
            `ceiling_accuracy` of the people of test and validate;
        classifier_accuracy_whole: the same against the test slices themselves: also the decoder's blur tells;
        frechet_distance, density, coverage: from and of the reconstructed test slices, in the whitened principal
            components of training slices;
        diversity: 1 - MS-SSIM of pairs at the same slice position;
        nearest_training_distance: median over images of the root mean squared difference from the most similar
            training slice. Not smaller than that of the test slices: few copies at most. Smaller: copies, or smoother;
        copy_like: share of images that are as near to a training slice as nine of ten reconstructed training slices
            are: what a copy of codes would be. Some people are alike: compare it with that of `test`;
        all float. The same of `ceiling` (reconstructions of validate) and `floor` (codes from the histogram of each
        grid position); the last three of `test`, its reconstructions; nearest_training_distance of `copies`, the
        reconstructed training slices; `distances`: nearest_training_distance of each image, under these five names.
    """
    check_readable(*index.splits().values())
    generator = np.random.default_rng(seed)
    most = min(num, len(index.test), len(index.validate))
    chosen = {name: index.splits()[name][_whole_people(index.splits()[name], most, generator)]
              for name in ("test", "validate")}  # fmt: skip
    codes = {split: encode_slices(vqvae, part) for split, part in chosen.items()}
    test = codes["test"]
    conditions = prior.known_conditions(test.slice_index, test.label)
    grids = {
        "samples": sample_codes(prior, len(test), seed=seed, temperature=temperature, **conditions),
        "floor": histogram_samples(encode_slices(vqvae, index.train).codes, len(test), generator),
        "ceiling": codes["validate"].codes,
        "test": test.codes,
    }
    images = {name: vqvae.decode(part) for name, part in grids.items()}
    # Whose an image is: people are never in both halves. A sample is of nobody in test, one for each slice there.
    nobody = dataclasses.replace(test, subject=np.array([f"sample {name}" for name in test.subject]))
    owners = {"samples": nobody, "floor": nobody, "ceiling": codes["validate"], "test": test}

    reading = {"image_size": vqvae.config.image_size, "fit": vqvae.config.fit}
    train = _read_flat(index.train, **reading, size=size)
    num_features = max(1, min(NUM_FEATURES, len(train) // 4))
    components = PCA(num_features, whiten=True, svd_solver="randomized", random_state=seed)
    components.fit(train)
    flat = {name: _flat(part, size) for name, part in images.items()}
    features = {name: components.transform(part) for name, part in flat.items()}
    copied = index.train[np.sort(np.random.default_rng(seed).permutation(len(index.train))[: len(test)])]
    flat["copies"] = _flat(vqvae.reconstruct(load_images(copied, **reading)), size)
    distances = {name: _nearest(part, train)[1] for name, part in flat.items()}
    near = np.quantile(distances["copies"], MOST_COPIES)
    decoded = np.concatenate([images["test"], images["ceiling"]])
    whole = np.concatenate([load_images(part, **reading) for part in chosen.values()])  # test, then validate, as well
    people = np.concatenate([test.subject, owners["ceiling"].subject])
    options = {"seed": seed, "size": size, "num_repeats": num_repeats}
    scores: dict = {"test": {}}
    for name in tqdm(("samples", "ceiling", "floor"), "scoring samples", unit="set", leave=False):
        density, coverage = density_and_coverage(features["test"], features[name], test.subject)
        scores[name] = {}
        for kind, shown in (("classifier_accuracy", decoded), ("classifier_accuracy_whole", whole)):
            pair = (shown, decoded, people) if name == "ceiling" else (
                shown[: len(test)], images[name], test.subject, owners[name].subject
            )  # fmt: skip
            measure = ceiling_accuracy if name == "ceiling" else two_sample_accuracy
            scores[name][kind] = measure(*pair, **options)
        scores[name] |= {
            "frechet_distance": frechet_distance(features["test"], features[name]),
            "density": density,
            "coverage": coverage,
        }
    for name, owner in owners.items():
        scores[name]["diversity"] = diversity(images[name], owner, generator)
        scores[name]["nearest_training_distance"] = float(np.median(distances[name]))
        scores[name]["copy_like"] = float((distances[name] <= near).mean())
    scores["copies"] = {"nearest_training_distance": float(np.median(distances["copies"]))}
    return {
        **scores.pop("samples"),
        **scores,
        "distances": {name: values.tolist() for name, values in distances.items()},
    }


def _whole_people(slices: Slices, most: int, generator: np.random.Generator) -> np.ndarray:
    """Return rows of at most so many slices, person after person in random order; of the last one not all."""
    rows = [np.flatnonzero(slices.subject == person) for person in generator.permutation(np.unique(slices.subject))]
    return np.sort(np.concatenate(rows)[:most])


def sample_table(report: dict) -> str:
    """Return a report of `evaluate_samples` as a text table."""
    others = [name for name in ("ceiling", "floor", "test", "copies") if name in report]
    lines = [f"{'':<28}{'samples':>10}" + "".join(f"{name:>10}" for name in others)]
    for name in report["ceiling"]:
        cells = (report[other].get(name) for other in others)
        own = f"{name:<28}{'-' if report[name] is None else format(report[name], '.3f'):>10}"
        lines.append(own + "".join(f"{'' if cell is None else format(cell, '.3f'):>10}" for cell in cells).rstrip())
    if not is_valid(report):
        lines.append("The classifier's accuracy is void: the ceiling must have 0.45 to 0.55, the floor at least 0.95.")
    return "\n".join(lines)


def is_valid(report: dict) -> bool:
    """Return whether the classifier of an `evaluate_samples` report knows the floor, and does not know the ceiling."""
    ceiling = report["ceiling"]["classifier_accuracy"]
    return ceiling is not None and 0.45 <= ceiling <= 0.55 and knows_floor(report, "classifier_accuracy")


def knows_floor(report: dict, score: str) -> bool:
    """Return whether `classifier_accuracy` of an `evaluate_samples` report, or that with `_whole`, tells the floor."""
    floor = report["floor"][score]
    return floor is not None and floor >= 0.95


def histogram_samples(train: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """Return codes (n, h, w), each drawn from those that training grids (m, h, w) have at its position."""
    rows = generator.integers(0, len(train), (n, *train.shape[1:]))
    return np.take_along_axis(train, rows, axis=0)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Fréchet distance between the normal distributions of two sets of features (n, d); NaN if n is 1.

    Source: Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    if min(len(first), len(second)) < 2:
        return float("nan")
    means = [features.mean(axis=0) for features in (first, second)]
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def density_and_coverage(
    real: np.ndarray, features: np.ndarray, owners: np.ndarray, k: int = NUM_NEIGHBOURS
) -> tuple[float, float]:
    """Return how densely features (m, d) lie where the real ones (n, d) do, and the share of the real ones near one.

    The neighbourhood of a real one reaches to the k-th nearest real one of other people: slices of one person are
    much nearer to each other than people are.

    Args:
        real: (n, d).
        features: (m, d).
        owners: (n,) str, whose the real ones are.
        k: neighbours.

    Returns:
        density, coverage, both float; NaN if a real one has fewer than k of other people.

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3.
    """
    among = _distances(real, real)
    among[owners[:, None] == owners] = np.inf
    if (np.isfinite(among).sum(axis=1) < k).any():
        return float("nan"), float("nan")
    radius = np.sort(among, axis=1)[:, k - 1]
    inside = _distances(real, features) <= radius[:, None]  # (n, m)
    return float(inside.sum() / (k * len(features))), float(inside.any(axis=1).mean())


def nearest_slices(images: np.ndarray, slices: Slices, *, fit: str = "pad") -> tuple[np.ndarray, np.ndarray]:
    """Return which slice is most similar to each image, and how far it is.

    Args:
        images: (n, size, size, 1), float32 in [0, 1].
        slices: where to look, usually the training split.
        fit: what becomes of a slice that is not square, as in `make_dataset`.

    Returns:
        The numbers of the slices (n,), and the root mean squared differences from them (n,), of images averaged down to
        `FEATURE_SIZE`.
    """
    others = _read_flat(slices, image_size=images.shape[1], fit=fit, size=FEATURE_SIZE)
    return _nearest(_flat(images, FEATURE_SIZE), others)


def _nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the others each image (n, pixels) is nearest to, and their root mean squared difference."""
    distances = _distances(images, others) / np.sqrt(images.shape[1])  # (n, others)
    return distances.argmin(axis=1), distances.min(axis=1)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0))


def diversity(images: np.ndarray, of: Codes, generator: np.random.Generator, num_pairs: int = 200) -> float:
    """Return 1 - MS-SSIM, mean over pairs of images (n, size, size, 1) at the same slice position, of other people.

    NaN without such a pair, and for images below its window of 11 pixels.

    Source: Wang et al. 2003; as a measure of diversity Odena et al. 2017, arXiv:1610.09585.
    """
    pairs = []
    for one in generator.permutation(len(images)):
        others = np.flatnonzero((of.slice_index == of.slice_index[one]) & (of.subject != of.subject[one]))
        if len(others):
            pairs.append((one, generator.choice(others)))
    if not pairs or images.shape[1] < 11:
        return float("nan")
    one, other = np.array(pairs[:num_pairs]).T
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    scales = int(min(5, np.log2(images.shape[1] / 11) + 1))  # the coarsest must hold a window of 11
    similarity = tf.image.ssim_multiscale(
        tf.constant(images[one]),
        tf.constant(images[other]),
        1.0,
        power_factors=weights[:scales] / weights[:scales].sum(),
    )
    return float(1 - np.nanmean(similarity))


def two_sample_accuracy(
    first: np.ndarray,
    second: np.ndarray,
    first_owners: np.ndarray,
    second_owners: np.ndarray,
    *,
    seed: int = 0,
    size: int = FEATURE_SIZE,
    num_repeats: int = 4,
) -> float:
    """Return how often a small CNN says rightly from which of two sets an image is.

    It is trained on the images of half of the people and scored on those of the others, as many from either set; NaN if
    one of the sets has nobody in one of the halves.

    Args:
        first, second: (n, size, size, 1) and (m, size, size, 1) in [0, 1].
        first_owners, second_owners: (n,) and (m,) str, whose they are.
        seed: of the halves and of the classifier.
        size: side to which images are averaged down, if they are larger.
        num_repeats: other halves each time; the mean is returned.

    Source: Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv:1610.06545.
    """
    common = np.intersect1d(first_owners, second_owners)
    generator = np.random.default_rng(seed)
    first, second = _averaged_down(first, size), _averaged_down(second, size)
    classifier = _compiled_classifier(first.shape[1:])
    accuracies = []
    for repeat in range(num_repeats):
        halves: tuple[list, list] = ([], [])
        learned = []
        for people in (common, np.setdiff1d(first_owners, common), np.setdiff1d(second_owners, common)):
            learned += generator.permutation(people)[: len(people) // 2].tolist()
        for label, (images, owners) in enumerate(((first, first_owners), (second, second_owners))):
            chosen = np.isin(owners, learned)
            for half, rows in zip(halves, (chosen, ~chosen), strict=True):
                half.append((images[rows], np.full(rows.sum(), label, np.float32)))
        if not all(len(labels) for half in halves for _, labels in half):
            return float("nan")
        (images, labels), (score, truth) = (_balanced(half, generator) for half in halves)
        classifier.set_weights(_classifier(first.shape[1:], seed + repeat).get_weights())
        for variable in classifier.optimizer.variables:
            if variable is not classifier.optimizer.learning_rate:
                variable.assign(np.zeros(variable.shape))
        mean, deviation = images.mean(), images.std()
        for _ in range(NUM_PASSES):
            order = generator.permutation(len(images))
            for start in range(0, len(order), 32):
                rows = order[start : start + 32]
                classifier.train_on_batch((images[rows] - mean) / deviation, labels[rows])
        logits = in_batches(classifier, (score - mean) / deviation)  # `predict` would warn of so many models
        accuracies.append(float(((logits[:, 0] > 0) == truth).mean()))
    return float(np.mean(accuracies))


def ceiling_accuracy(
    images: np.ndarray,
    others: np.ndarray,
    owners: np.ndarray,
    *,
    seed: int = 0,
    size: int = FEATURE_SIZE,
    num_repeats: int = 4,
) -> float:
    """Return `two_sample_accuracy` of images of some people against others of the other people: no one could tell them.

    Who is on which side is drawn anew each time. Of two fixed sets of few people that are alike by chance, the halves
    that are learned from and scored differ in opposite ways, and the accuracy comes out below 0.5.

    Args:
        images, others: (n, side, side, 1) in [0, 1], in the same order: slices, and their reconstructions.
        owners: (n,) str, whose they are.
        seed: of who is where, and of the classifiers.
        size: as `two_sample_accuracy`.
        num_repeats: twice as many pairs of sides are drawn; the mean is returned.
    """
    generator = np.random.default_rng(seed)
    people, accuracies = np.unique(owners), []
    for repeat in range(2 * num_repeats):
        side = np.isin(owners, generator.permutation(people)[: len(people) // 2])
        sides = images[side], others[~side], owners[side], owners[~side]
        accuracies.append(two_sample_accuracy(*sides, seed=seed + repeat, size=size, num_repeats=1))
    return float(np.mean(accuracies))


def _flat(images: np.ndarray, size: int) -> np.ndarray:
    """Return images (n, side, side, 1) averaged down, flat (n, pixels)."""
    return _averaged_down(images, size).reshape(len(images), -1)


def _read_flat(slices: Slices, *, size: int, **reading) -> np.ndarray:
    """Return slices as `_flat` images (n, pixels)."""
    dataset = make_dataset(slices, **reading, batch_size=64)
    batches = tqdm(dataset.as_numpy_iterator(), "reading", len(dataset), unit="batch", leave=False)
    return np.concatenate([_flat(part, size) for part in batches])


def _averaged_down(images: np.ndarray, size: int) -> np.ndarray:
    """Return images (n, side, side, 1) averaged down to at most this size."""
    factor = -(-images.shape[1] // size)
    return tf.nn.avg_pool2d(images, factor, factor, "VALID").numpy()


def _balanced(sets: list, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = min(len(images) for images, _ in sets)
    rows = [generator.permutation(len(images))[:count] for images, _ in sets]
    return tuple(
        np.concatenate([part[place][chosen] for part, chosen in zip(sets, rows, strict=True)]) for place in (0, 1)
    )


def _classifier(shape: tuple[int, ...], seed: int) -> keras.Model:
    """Return an untrained CNN from images of mean 0 and deviation 1 to one logit."""
    seeds = iter(range(10 * seed, 10 * seed + 10))
    layers: list = [keras.Input(shape)]
    for channels in (16, 32, 64, 64):
        weights = keras.initializers.HeNormal(seed=next(seeds))
        layers += [
            keras.layers.Conv2D(channels, 3, strides=2, padding="same", kernel_initializer=weights),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    weights = keras.initializers.GlorotUniform(seed=next(seeds))
    return keras.Sequential(
        [*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1, kernel_initializer=weights)]
    )


@functools.lru_cache(maxsize=1)
def _compiled_classifier(shape: tuple[int, ...]) -> keras.Model:
    """Return a classifier to train: always the same one, as compiling it anew takes longer than training it."""
    model = _classifier(shape, 0)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model
