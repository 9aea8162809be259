"""The data guard: what is wrong with a folder of slices, said before a long job starts.

An error makes the data unusable, a note is something to know. Every file is decoded once, as training will.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from oasis_vq.slices import LABELS, UNKNOWN, Finding, SliceIndex, Slices, scan

PUBLISHED_COUNTS = {"OASIS": (9664, 1120, 544), "ADNI": (21520, 9000)}
"""Slices of each split in the published sets; ADNI's first number is train and validate together."""
FEW_SUBJECTS = 10
"""Fewer subjects to train on than this are noted."""
DARK = 64
"""An image without a pixel this bright, of 255, was probably scaled wrongly."""
PNG = b"\x89PNG\r\n\x1a\n"
BLACK = 12
"""Pixels up to this, of 255, count as background: 0.05, as in brain_ssim."""
LABEL_PIXELS = 64
"""An image with fewer pixels beside its background is too empty to be taken for a map of labels."""
LABEL_EVENNESS = {1: 0.5, 4: 0.15}
"""Share of the pixels beside the background that equal their right neighbour, in the image and in every fourth row and
column of it, beyond which it is taken for a map of labels. Measured at 2 mm: maps of 4 to 145 labels have at least 0.62
and 0.18, IXI brains at most 0.25 and 0.07; brains enlarged by repeating pixels 0.75 and 0.13."""


@dataclass(frozen=True)
class _Image:
    """What one file holds; `fault` says why it cannot be used at all."""

    fault: str = ""
    shape: tuple[int, int] = (0, 0)
    in_colour: bool = False
    bits: int = 8
    maximum: int = 0
    background: float = 1.0
    is_labels: bool = False
    digest: bytes = b""


class _Rule(NamedTuple):
    kind: str
    is_error: bool
    applies: Callable[[_Image], bool]
    text: str
    remedy: str


_RULES = (
    _Rule(
        "unreadable", True, lambda image: image.fault == "unreadable",
        "it cannot be decoded",
        "Replace the file or remove it, or go on without it: --skip-unreadable.",
    ),
    _Rule(
        "closed", True, lambda image: image.fault == "closed",
        "it cannot be opened: no permission, or a link to nowhere",
        "Make it readable, or get what the link leads to, or go on without it: --skip-unreadable.",
    ),
    _Rule(
        "pointer", True, lambda image: image.fault == "pointer",
        "it is a Git LFS pointer, a text that stands for the image",
        "Run 'git lfs pull' where it comes from, or download the images again.",
    ),
    _Rule(
        "labels", True, lambda image: image.is_labels,
        "it looks like a map of segmentation labels: even patches",
        "Put the image in its place; maps belong into keras_png_slices_seg_train and the like.",
    ),
    _Rule(
        "colour", False, lambda image: image.in_colour,
        "it is in colour, and read as grey",
        "Nothing to do if its brightness is what counts.",
    ),
    _Rule(
        "bits", False, lambda image: image.bits != 8,
        "it has not 8 bits a pixel, and is read as if it had",
        "Look at a batch: is there contrast?",
    ),
    _Rule(
        "range", False, lambda image: 0 < image.maximum < DARK,
        f"no pixel is as bright as {DARK} of 255",
        "Scale the images so that they use the range from 0 to 255.",
    ),
    _Rule(
        "background", False, lambda image: image.background < 0.05,
        "the background is not black, and scores over the brain take what is above 0.05 for brain",
        "Strip the skull, or set the background to 0.",
    ),
    _Rule(
        "blank", False, lambda image: not image.fault and image.maximum == 0,
        "it is all black",
        "Remove it, unless an empty slice is wanted.",
    ),
    _Rule(
        "shape", False, lambda image: image.shape[0] != image.shape[1],
        "it is not square: black borders are added",
        "Choose --fit stretch to change its shape instead.",
    ),
)  # fmt: skip


def _examine(path: str) -> _Image:
    try:
        data = Path(path).read_bytes()
    except OSError:
        return _Image(fault="closed")
    if data.startswith(b"version https://git-lfs"):
        return _Image(fault="pointer")
    try:
        image = tf.io.decode_image(data, channels=1, expand_animations=False)  # (height, width, 1) uint8, as training
    except tf.errors.OpError:
        return _Image(fault="unreadable")
    grey = image.numpy()[..., 0]
    counts = np.bincount(grey.ravel(), minlength=256)
    background = counts.argmax()  # the commonest value
    return _Image(
        shape=grey.shape,
        in_colour=_is_in_colour(data),
        bits=data[24] if data.startswith(PNG) else 8,  # in the PNG header
        maximum=int(grey.max()),
        background=float(counts[: BLACK + 1].sum() / grey.size),
        is_labels=grey.size - counts[background] >= LABEL_PIXELS
        and all(_evenness(grey[::step, ::step], background) > share for step, share in LABEL_EVENNESS.items()),
        digest=hashlib.blake2b(grey.tobytes(), digest_size=16).digest() if counts[background] < grey.size else b"",
    )


def _is_in_colour(data: bytes) -> bool:
    if data.startswith(PNG):
        return data[25] not in (0, 4)  # grey, grey with transparency
    return bool(data.startswith(b"\xff\xd8") and tf.io.extract_jpeg_shape(data)[-1] != 1)


def _evenness(grey: np.ndarray, background: int) -> float:
    """Return the share of the pixels beside the background that equal their right neighbour."""
    content = grey != background
    return (content[:, :-1] & (grey[:, :-1] == grey[:, 1:])).sum() / max(content.sum(), 1)


def _examine_all(slices: Slices) -> list[_Image]:
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(_examine, slices.path), "checking", len(slices), leave=False, mininterval=0.5))


def check_folder(folder: str | Path) -> tuple[SliceIndex, list[Finding]]:
    """Return the slices of a data folder and everything that the guard finds, errors first."""
    index, errors = scan(folder)
    parts = {split: part for split, part in index.splits().items() if len(part)}
    findings = [*errors, *check_slices(parts), *_notes(index)]
    return index, sorted(findings, key=lambda finding: not finding.is_error)


def check_slices(parts: dict[str, Slices]) -> list[Finding]:
    """Decode every slice of the splits, given by name, and return what is to be said of their contents."""
    images = {split: _examine_all(part) for split, part in parts.items()}
    paths = [str(path) for part in parts.values() for path in part.path]
    everything = [image for split in images for image in images[split]]
    return [*_contents(paths, everything), *_duplicates(parts, images)]


def checked(index: SliceIndex) -> list[Finding]:
    """Return all notes on the slices of an index, for a training to say before it starts.

    Raises:
        ValueError: if there is an error among the findings.
    """
    findings = [*check_slices(index.splits()), *_notes(index)]
    refuse_errors(findings, index.root)
    return findings


def check_readable(*parts: Slices) -> None:
    """Raise ValueError if the slices of a part cannot be used."""
    for part in parts:
        refuse_errors(check_slices({"": part}), part.root)


def refuse_errors(findings: list[Finding], root: Path) -> None:
    """Raise ValueError with the first error among the findings, if there is one."""
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        raise ValueError(f"{errors[0]} Everything that is wrong: python -m oasis_vq check {root}")


def without_unreadable(index: SliceIndex) -> tuple[SliceIndex, list[str]]:
    """Return the index without the slices that cannot be decoded, and the paths of those.

    Raises:
        FileNotFoundError: if nothing is left of a split.
    """
    kept, dropped = {}, []
    for split, part in index.splits().items():
        faulty = np.array([bool(image.fault) for image in _examine_all(part)])
        kept[split] = part[~faulty]
        if faulty.all():
            raise FileNotFoundError(f"Not one of the {len(part)} slices to {split} in {index.root} can be decoded.")
        dropped += part.path[faulty].tolist()
    return replace(index, **kept), dropped


def _contents(paths: list[str], images: list[_Image]) -> Iterator[Finding]:
    """Yield what the rules say of single images, and whether the sizes are mixed."""
    for rule in _RULES:
        chosen = tuple(path for path, image in zip(paths, images, strict=True) if rule.applies(image))
        if chosen:
            yield Finding(rule.kind, rule.is_error, rule.text, rule.remedy, chosen)
    sizes = Counter(image.shape for image in images if not image.fault)
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        others = [path for path, image in zip(paths, images, strict=True) if image.shape not in (usual, (0, 0))]
        listed = ", ".join(f"{height}x{width}: {count}" for (height, width), count in sizes.most_common(5))
        remedy = "All are brought to one size; see that a pixel is the same number of millimetres in all."
        yield Finding("sizes", False, f"the sizes are mixed ({listed})", remedy, tuple(others))


def _duplicates(parts: dict[str, Slices], images: dict[str, list[_Image]]) -> Iterator[Finding]:
    places: dict[bytes, list[tuple[str, str]]] = {}
    for split, part in parts.items():
        for path, image in zip(part.path, images[split], strict=True):
            if image.digest:  # all-black slices are equal and mean nothing
                places.setdefault(image.digest, []).append((split, str(path)))
    same, leaks = [], []
    for copies in places.values():
        if len(copies) > 1:
            across = len({split for split, _ in copies}) > 1
            (leaks if across else same).append(" = ".join(path for _, path in copies))
    if leaks:
        text = "the same pixels stand in two splits"
        yield Finding("leak", True, text, "Keep them in one of the two and remove the other.", tuple(leaks))
    if same:
        text = "the same pixels under two names"
        yield Finding("duplicates", False, text, "Remove one of them, unless it is meant.", tuple(same))


def _notes(index: SliceIndex) -> Iterator[Finding]:
    """Yield notes on who and how much there is."""
    yield from index.notes
    sizes = {split: len(part) for split, part in index.splits().items()}
    if not all(sizes.values()):
        return
    if index.train.num_subjects < FEW_SUBJECTS:
        text = f"{index.train.num_subjects} subjects to train on are few"
        yield Finding("few", False, text, "Expect a model that knows these people by heart.", (str(index.root),))
    is_adni = bool((index.train.label != UNKNOWN).any())
    for part in index.splits().values():
        rows = list(zip(part.subject.tolist(), part.slice.tolist(), strict=True))
        counts = Counter(rows)
        twice = tuple(path for path, row in zip(part.path.tolist(), rows, strict=True) if counts[row] > 1)
        if twice and not is_adni:  # where people have several images
            text = "another file is of the same subject and position"
            yield Finding("twice", False, text, "Remove one of them, or rename it.", twice)
        subjects, counts = np.unique(part.subject, return_counts=True)
        usual = Counter(counts.tolist()).most_common(1)[0][0]
        short = [f"{name} ({count})" for name, count in zip(subjects, counts, strict=True) if count < usual]
        if short:
            text = f"fewer slices than the {usual} that most subjects of the split have"
            yield Finding("incomplete", False, text, "See whether files are missing.", tuple(short))
    if unseen := index.skipped_slices:
        text = f"no training slice is at position {', '.join(map(str, unseen[:8]))}{' …' * (len(unseen) > 8)}"
        yield Finding("gap", False, text, "A prior is told positions: it draws none of these.", ())
    counts = (sizes["train"] + sizes["validate"], sizes["test"]) if is_adni else tuple(sizes.values())
    name = "ADNI" if is_adni else "OASIS"
    if counts != PUBLISHED_COUNTS[name]:
        here, published = (" / ".join(f"{count:,}" for count in of) for of in (counts, PUBLISHED_COUNTS[name]))
        text = f"{here} slices, where the published {name} set has {published}"
        yield Finding("counts", False, text, "Nothing to do if these are other data or a part.", (str(index.root),))
    for label, name in enumerate(LABELS if is_adni else ()):
        without = [split for split, part in index.splits().items() if label not in part.label]
        if without:
            text = f"there is no {name} to {' and to '.join(without)}"
            remedy = "A prior is told of classes only if it can learn both."
            yield Finding("classes", False, text, remedy, (str(index.root),))
