"""Slices on disk: the two layouts, whose slices they are, and which split they belong to.

OASIS: `keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png`.
ADNI: `{train,test}/{AD,NC}/<id>_<slice>.jpeg`; validation is cut from train, by id.
"""

import contextlib
import csv
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validate", "test")
LABELS = ("NC", "AD")
"""Classes of the ADNI layout: normal control is label 0, Alzheimer's disease 1."""
_CLASS_FOLDERS = {"NC": 0, "CN": 0, "AD": 1}  # ADNI itself says CN
OASIS_SUBJECTS = {"train": 302, "validate": 35, "test": 17}
"""Subjects in the OASIS PNG set."""
UNKNOWN = -1
"""The label of a slice whose class is not known."""
VALIDATE_SHARE = 0.1
"""Share of the training subjects of each class that the ADNI layout gives to validation."""
_OASIS_NAME = re.compile(r"case_(\d+)_slice_(\d{1,6})(\.nii)?\.png", re.IGNORECASE)
_ADNI_NAME = re.compile(r"(\w+)_(\d{1,6})\.(jpe?g|png)", re.IGNORECASE)
_ADNI_PERSON = re.compile(r"(?<!\d)\d{3}_S_\d{4,5}(?!\d)")  # in a longer id, of one of this person's images
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff"}
_EXPECTED = "keras_png_slices_train/case_001_slice_0.nii.png, or train/AD/1001_80.jpeg, and the like"


@dataclass(frozen=True)
class Finding:
    """One thing to say of a data folder.

    Attributes:
        kind: a word or two: "leak", "unreadable" and so on.
        is_error: whether the data cannot be used as they are; otherwise it is a note.
        text: what is the matter.
        remedy: what to do.
        paths: the files or folders it is about.
    """

    kind: str
    is_error: bool
    text: str
    remedy: str
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.told(most=3)

    def told(self, *, most: int) -> str:
        """Return the finding in one line that names at most so many files."""
        files = ", ".join(self.paths[:most])
        more = f" and {len(self.paths) - most} more" if len(self.paths) > most else ""
        return f"{files}{more}{': ' if files else ''}{self.text}. {self.remedy}"


@dataclass(frozen=True)
class Slices:
    """A table of slices, one row each, as parallel arrays of length n; rows are taken as from an array.

    Attributes:
        root: the data folder.
        path: (n,) str, the files.
        subject: (n,) str, who is shown.
        slice: (n,) int32, the number in the file's name: position from inferior to superior.
        label: (n,) int32, place of the class in `LABELS`, -1 where unknown.
    """

    root: Path
    path: np.ndarray
    subject: np.ndarray
    slice: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows) -> "Slices":
        """Return the rows of a slice object, an index array or a boolean mask."""
        return Slices(self.root, self.path[rows], self.subject[rows], self.slice[rows], self.label[rows])

    @property
    def num_subjects(self) -> int:
        """How many subjects there are."""
        return len(np.unique(self.subject))

    def fingerprint(self, *, modified: bool = False) -> str:
        """Return a hash of the files' names, sizes and labels, wherever the data folder is; no file is read.

        Args:
            modified: whether the times of the last changes count too: for what must not outlive a change.
        """
        lines = []
        for path, label in zip(self.path, self.label.tolist(), strict=True):
            found = Path(path).stat() if Path(path).exists() else None  # else a link to nowhere: the guard says so
            parts = [Path(path).name, found.st_size if found else -1]
            parts += [label] if label != UNKNOWN else []
            parts += [found.st_mtime_ns] if found and modified else []
            lines.append(" ".join(map(str, parts)))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class SliceIndex:
    """The slices of a data folder by split, and what their names and places give reason to note.

    `limit_train` is the number of training subjects that were asked for at most, None for all.
    """

    root: Path
    train: Slices
    validate: Slices
    test: Slices
    notes: tuple[Finding, ...] = ()
    limit_train: int | None = None

    def __str__(self) -> str:
        counts = (f"{split} {len(part)} of {part.num_subjects} subjects" for split, part in self.splits().items())
        return f"{self.root.name}: slices: " + ", ".join(counts)

    def splits(self) -> dict[str, Slices]:
        """Return the three splits by name."""
        return {split: getattr(self, split) for split in SPLITS}

    def fingerprints(self) -> dict[str, str]:
        """Return the `Slices.fingerprint` of each split by name."""
        return {split: part.fingerprint() for split, part in self.splits().items()}

    @property
    def slice_range(self) -> tuple[int, int]:
        """The lowest and the highest slice number of all splits."""
        numbers = np.concatenate([part.slice for part in self.splits().values()])
        return int(numbers.min()), int(numbers.max())

    @property
    def skipped_slices(self) -> tuple[int, ...]:
        """The slice numbers within that range that no training slice has, rising."""
        lowest, highest = self.slice_range
        return tuple(np.setdiff1d(np.arange(lowest, highest + 1), self.train.slice).tolist())

    def positions_at(self, shares: float | Sequence[float]) -> np.ndarray | int:
        """Return the slice positions at these shares of the way from the lowest, 0, to the highest, 1.

        They are among those of the training slices, whatever their numbers are: 0 to 31 in OASIS, from 78 on in ADNI.
        """
        positions = np.unique(self.train.slice)
        found = positions[np.round(np.multiply(shares, len(positions) - 1)).astype(int)]
        return found if np.ndim(shares) else int(found)

    @property
    def num_labels(self) -> int:
        """How many classes there are to tell apart; 0 unless training slices of all `LABELS` are there."""
        return len(LABELS) if set(range(len(LABELS))) <= set(self.train.label.tolist()) else 0


def find_slices(folder: str | Path, *, limit_train: int | None = None, seed: int = 0) -> SliceIndex:
    """List the slices of a data folder, sorted by subject and slice position; nothing is decoded.

    Args:
        folder: a folder in one of the two layouts, or one that holds such a folder.
        limit_train: if given, at most so many training subjects, of all classes in turn; with a larger number these
            are among them.
        seed: of that choice, and of the subjects that the ADNI layout gives to validation.

    Raises:
        FileNotFoundError: if there are no slices for a split.
        ValueError: if a file is named outside the layout, or a subject is in two splits.
    """
    index, errors = scan(folder, seed=seed)
    for error in errors:
        raise (FileNotFoundError if error.kind == "nothing found" else ValueError)(str(error))
    if limit_train is None:
        return index
    if limit_train < 1:
        raise ValueError(f"limit_train is at least 1. Received: {limit_train}.")
    label_of = dict(zip(index.train.subject.tolist(), index.train.label.tolist(), strict=True))
    by_class = [[s for s in ranked(label_of, seed) if label_of[s] == label] for label in sorted(set(label_of.values()))]
    in_turn = [subject for turn in itertools.zip_longest(*by_class) for subject in turn if subject is not None]
    chosen = in_turn[:limit_train]
    return replace(index, train=index.train[np.isin(index.train.subject, chosen)], limit_train=limit_train)


def ranked(subjects: Iterable[str], seed: int) -> list[str]:
    """Return subjects in a random order in which two of them never change places when others come or go."""
    return sorted(map(str, subjects), key=lambda subject: hashlib.sha256(f"{seed} {subject}".encode()).digest())


class _Row(NamedTuple):
    split: str
    subject: str
    slice: int
    label: int
    path: str


def scan(folder: str | Path, *, seed: int = 0) -> tuple[SliceIndex, list[Finding]]:
    """Return the slices of a data folder, and the errors in their names and places, which `find_slices` raises."""
    root, folders, findings = _layout(Path(folder))
    is_adni = any(label != UNKNOWN for _, label in folders.values())
    rows, misnamed = [], []
    for place, (split, label) in folders.items():
        for file in sorted(place.iterdir()) if _is_folder(place) else ():
            if file.name.startswith(".") or file.suffix.lower() not in _IMAGE_SUFFIXES or file.is_dir():
                continue
            match = (_ADNI_NAME if is_adni else _OASIS_NAME).fullmatch(file.name)
            if match:
                person = _ADNI_PERSON.search(match[1]) if is_adni else None
                subject = person[0] if person else match[1] if is_adni else f"{int(match[1]):03d}"  # case 1 is case 001
                rows.append(_Row(split, subject, int(match[2]), label, str(file)))
            else:
                misnamed.append(str(file))
    if misnamed:
        example = "1001_80.jpeg" if is_adni else "case_001_slice_0.nii.png"
        text = f"it is named outside the layout. Expected a name like {example}"
        findings.append(Finding("name", True, text, "Rename it or move it away.", tuple(misnamed)))
    if is_adni:
        rows, said = _with_people(rows, root)
        rows = _with_validation(rows, seed)
        findings += [*said, *_other_classes(root)]
    findings += [*_missing(folders, rows), *_leaks(rows)]
    tables = (_table(root, [row for row in rows if row.split == split]) for split in SPLITS)
    notes = tuple(finding for finding in findings if not finding.is_error)
    return SliceIndex(root, *tables, notes), [finding for finding in findings if finding.is_error]


def _layout(folder: Path) -> tuple[Path, dict[Path, tuple[str, int]], list[Finding]]:
    """Return where the layout begins, in the folder or one deeper, and the split and label of its subfolders."""
    deeper = sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    # What is hidden or not complete is not taken for data by the way.
    deeper = [place for place in deeper if not (place.name.startswith(".") or place.suffix == ".partial")]
    found = _layouts(folder) or [pair for place in deeper for pair in _layouts(place)]
    if len(found) == 1 and folder.suffix != ".partial":
        return *found[0], []
    text = f"No PNG slices in {folder}" if folder.is_dir() else f"There is no folder {folder}"
    remedy = f"Expected {_EXPECTED} (README, 'Data'), or run: python -m oasis_vq phantom --out data/phantom256"
    if folder.suffix == ".partial":
        text, remedy = f"{folder} is not complete", "Give the command that makes it again: it goes on."
    elif found:
        text = " and ".join(f"{root} in the {_name(folders)} layout" for root, folders in found) + " hold slices"
        remedy = "Name one of them, or move one away."
    elif any(folder in (*folders, *(place.parent for place in folders)) for _, folders in _layouts(folder.parent)):
        text, remedy = f"{folder} is one part of a data folder", f"Name the whole: {folder.parent}"
    return folder, {}, [Finding("nothing found", True, text, remedy)]


def _layouts(root: Path) -> list[tuple[Path, dict[Path, tuple[str, int]]]]:
    """Return the folder with the subfolders of each layout that it has, and their split and label."""
    oasis = {root / f"keras_png_slices_{split}": (split, UNKNOWN) for split in SPLITS}
    adni = {
        root / split / name: (split, label) for split in ("train", "test") for name, label in _CLASS_FOLDERS.items()
    }
    return [(root, folders) for folders in (oasis, adni) if any(map(_is_folder, folders))]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # what may not be entered is as good as none
        return False


def _name(folders: dict[Path, tuple[str, int]]) -> str:
    return "OASIS" if any(label == UNKNOWN for _, label in folders.values()) else "ADNI"


def _other_classes(root: Path) -> Iterator[Finding]:
    others = [
        str(place)
        for split in ("train", "test")
        if (root / split).is_dir()
        for place in sorted((root / split).iterdir())
        if place.is_dir() and place.name not in _CLASS_FOLDERS and not place.name.startswith(".")
    ]
    if others:
        text = f"it is none of the classes {', '.join(_CLASS_FOLDERS)}, and is not read"
        yield Finding("classes", False, text, "Rename it if it is meant as one of them.", tuple(others))
    own = [str(root / name) for name in ("validate", "validation", "valid", "val") if _is_folder(root / name)]
    if own:
        text = "it is not read: validation is cut from train in this layout"
        yield Finding("validation", False, text, "Move its slices to train, or leave it.", tuple(own))


def _with_people(rows: list[_Row], root: Path) -> tuple[list[_Row], list[Finding]]:
    """Return the rows with people for image ids, as far as the folder has ADNI's table of both (data/README.md)."""
    people, others = {}, []
    for file in sorted(root.glob("*.csv")):
        found = {}
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as table, contextlib.suppress(csv.Error):
            header = table.readline()
            table.seek(0)
            for row in csv.DictReader(table, delimiter=max(",;\t", key=header.count)):
                if row.get("Image Data ID") and row.get("Subject"):
                    found[row["Image Data ID"].strip().lstrip("I")] = row["Subject"].strip()
        people |= found
        others += [] if found else [file.name]
    ids = {row.subject for row in rows}
    unknown = sorted(name for name in ids if name.lstrip("I").isdigit() and name.lstrip("I") not in people)
    findings = []
    if unknown:
        text = (
            f"{len(unknown)} of {len(ids)} ids are those of images, and nothing says of whom: "
            "somebody who was imaged twice may stand in two splits"
        )
        remedy = (
            "Put the table of the image collection, which ADNI offers with a download, into the folder as CSV with the "
            "columns 'Image Data ID' and 'Subject': then people are told apart."
        )
        if others:
            remedy += f" What is there has no such columns: {', '.join(others)}."
        findings.append(Finding("image ids", False, text, remedy, (str(root),)))
    return [row._replace(subject=people.get(row.subject.lstrip("I"), row.subject)) for row in rows], findings


def _with_validation(rows: list[_Row], seed: int) -> list[_Row]:
    """Return the rows with a share of the training subjects of each class given to validation."""
    label_of = {row.subject: row.label for row in rows if row.split == "train"}
    chosen: set[str] = set()
    for label in sorted(set(label_of.values())):
        subjects = ranked((subject for subject in label_of if label_of[subject] == label), seed)
        chosen |= set(subjects[: max(1, round(VALIDATE_SHARE * len(subjects)))] if len(subjects) > 1 else ())
    return [row._replace(split="validate") if row.split == "train" and row.subject in chosen else row for row in rows]


def _missing(folders: dict[Path, tuple[str, int]], rows: list[_Row]) -> Iterator[Finding]:
    for split in SPLITS if folders else ():
        if all(row.split != split for row in rows):
            # Validation has no folder of its own in the ADNI layout: it is cut from the subjects to train on.
            places = [str(place) for place, (of, _) in folders.items() if of == split]
            text = f"No slices to {split} in {' and '.join(places or ['the folders of train'])}"
            remedy = f"Expected {_EXPECTED} (README, 'Data')."
            if not places and any(row.split == "train" for row in rows):
                remedy = "They are cut from train, by subject: at least two subjects of a class are needed there."
            yield Finding("nothing found", True, text, remedy)


def _leaks(rows: list[_Row]) -> Iterator[Finding]:
    splits: dict[str, dict[str, str]] = {}
    for row in rows:
        splits.setdefault(row.subject, {}).setdefault(row.split, row.path)
    for subject, files in splits.items():
        if len(files) > 1:
            text = f"Subject {subject} is in {' and in '.join(files)}"
            remedy = "A subject belongs to exactly one split: move all of its slices to one of the folders."
            yield Finding("leak", True, text, remedy, tuple(files.values()))


def _table(root: Path, rows: list[_Row]) -> Slices:
    rows = sorted(rows, key=lambda row: (row.subject, row.slice, row.path))
    return Slices(
        root,
        np.array([row.path for row in rows], dtype=str),
        np.array([row.subject for row in rows], dtype=str),
        np.array([row.slice for row in rows], dtype=np.int32),
        np.array([row.label for row in rows], dtype=np.int32),
    )
