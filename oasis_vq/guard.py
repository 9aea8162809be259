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

from oasis_vq.slices import UNKNOWN, Finding, SliceIndex, Slices, scan

PUBLISHED_COUNTS = {"OASIS": (9664, 1120, 544), "ADNI": (21520, 9000)}
"""Slices of each split in the published sets; ADNI's first number is train and validate together."""
FEW_SUBJECTS = 10
"""Fewer subjects to train on than this are noted."""
DARK = 64
"""An image without a pixel this bright, of 255, was probably scaled wrongly."""
BLACK = 12
"""Pixels up to this, of 255, count as background: 0.05, as in brain_ssim."""
LABEL_PIXELS = 64
"""An image with fewer pixels beside its background is too empty to be taken for a map of labels."""
LABEL_EVENNESS = 0.5
"""Share of the pixels beside the background that equal their right neighbour beyond which an image is taken for a map
of labels: brains have up to 0.25 (IXI at 2 mm), maps of 4 to 145 labels from 0.62 on."""


@dataclass(frozen=True)
class _Image:
    """What one file holds; `fault` says why it cannot be used at all."""

    fault: str = ""
    shape: tuple[int, int] = (0, 0)
    channels: int = 1
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
        "colour", False, lambda image: image.channels > 1,
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
    data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        return _Image(fault="pointer")
    try:
        image = tf.io.decode_image(data, expand_animations=False).numpy()  # (height, width, channels) uint8
    except tf.errors.OpError:
        return _Image(fault="unreadable")
    grey = image[..., 0]
    counts = np.bincount(grey.ravel(), minlength=256)
    content = grey != counts.argmax()  # the commonest value is the background's
    even = int((content[:, :-1] & (grey[:, :-1] == grey[:, 1:])).sum())
    return _Image(
        shape=grey.shape,
        channels=image.shape[-1],
        bits=data[24] if data.startswith(b"\x89PNG") else 8,  # in the PNG header
        maximum=int(grey.max()),
        background=float(counts[: BLACK + 1].sum() / grey.size),
        is_labels=bool(content.sum() >= LABEL_PIXELS and even > LABEL_EVENNESS * content.sum()),
        digest=hashlib.blake2b(image.tobytes(), digest_size=16).digest() if counts[0] < grey.size else b"",
    )


def _examine_all(slices: Slices) -> list[_Image]:
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(_examine, slices.path), "checking", len(slices), leave=False, mininterval=0.5))


def check_folder(folder: str | Path) -> tuple[SliceIndex, list[Finding]]:
    """Return the slices of a data folder and everything that the guard finds, errors first."""
    index, findings = scan(folder)
    found = [*findings, *check_slices(index.splits()), *_notes(index)]
    return index, sorted(found, key=lambda finding: not finding.is_error)


def check_slices(parts: dict[str, Slices]) -> list[Finding]:
    """Decode every slice of the splits, given by name, and return what is to be said of their contents."""
    images = {split: _examine_all(part) for split, part in parts.items()}
    paths = [str(path) for part in parts.values() for path in part.path]
    everything = [image for split in images for image in images[split]]
    return [*_contents(paths, everything), *_duplicates(parts, images)]


def checked(index: SliceIndex) -> list[Finding]:
    """Return the notes on the slices of an index, for a training to say before it starts.

    Raises:
        ValueError: if there is an error among the findings.
    """
    findings = check_slices(index.splits())
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
    """Return the index without the slices that cannot be decoded, and the paths of those."""
    kept, dropped = {}, []
    for split, part in index.splits().items():
        faulty = np.array([bool(image.fault) for image in _examine_all(part)])
        kept[split] = part[~faulty]
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
    sizes = {split: len(part) for split, part in index.splits().items()}
    if not all(sizes.values()):
        return
    if index.train.num_subjects < FEW_SUBJECTS:
        text = f"{index.train.num_subjects} subjects to train on are few"
        yield Finding("few", False, text, "Expect a model that knows these people by heart.", (str(index.root),))
    for part in index.splits().values():
        subjects, counts = np.unique(part.subject, return_counts=True)
        usual = Counter(counts.tolist()).most_common(1)[0][0]
        short = [f"{name} ({count})" for name, count in zip(subjects, counts, strict=True) if count < usual]
        if short:
            text = f"fewer slices than the {usual} that most subjects of the split have"
            yield Finding("incomplete", False, text, "See whether files are missing.", tuple(short))
    is_adni = bool((index.train.label != UNKNOWN).any())
    if is_adni and all(subject.isdigit() for subject in np.unique(index.test.subject)):
        text = "ids are those of images: one person, imaged twice, may stand in two splits"
        remedy = (
            "Download the table of the image collection from ADNI (columns 'Image Data ID' and 'Subject') and put it "
            "here as CSV: then people are told apart."
        )
        yield Finding("image ids", False, text, remedy, (str(index.root),))
    counts = (sizes["train"] + sizes["validate"], sizes["test"]) if is_adni else tuple(sizes.values())
    name = "ADNI" if is_adni else "OASIS"
    if counts != PUBLISHED_COUNTS[name]:
        here, published = (" / ".join(f"{count:,}" for count in of) for of in (counts, PUBLISHED_COUNTS[name]))
        text = f"{here} slices, where the published {name} set has {published}"
        yield Finding("counts", False, text, "Nothing, if these are other data or a part.", (str(index.root),))
