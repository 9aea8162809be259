"""Who is shown in brain volumes, one volume each, and in which split they are."""

import csv
import io
import itertools
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from oasis_vq.slices import OASIS_SUBJECTS, ranked
from oasis_vq.volumes import SourceFile, split_label

# Of BIDS not sub-HC-01, whose id may be HC or HC-01, and not sub-002_S_0295; but sub-01_0000, a channel of nnU-Net.
_BIDS_SUBJECT = r"sub-[A-Za-z0-9]+(?![A-Za-z0-9]|_S_\d|(?!_000\d(?!\d))[-_]\d+(?![A-Za-z0-9]))"
SUBJECT_PATTERN = (  # OASIS-1 to 3, BIDS, ADNI, IXI, BraTS from 2020 on and before
    rf"OAS[12]_\d{{4}}|OAS3\d{{4}}|{_BIDS_SUBJECT}|\d{{3}}_S_\d{{4,5}}|IXI\d+"
    r"|BraTS(?:20\d\d|20_[A-Za-z]+|-[A-Z]+)[_-]\d+|Bra[Tt][Ss]1\d_[^_]+_[^_]+"
)
PUBLISHED_SPLIT = {"train": range(1, 402), "validate": range(402, 441), "test": range(441, 458)}  # cases of OASIS-1
_MASK = re.compile(r"[_-](?:mask|seg|dlmuse|dlicv)(?![a-z])", re.IGNORECASE)  # not masked
OASIS_TEXT = re.compile(r"(OAS1_\d{4})_MR1\.txt")  # which tells of a person


class Subject(NamedTuple):
    """A person: the volume to cut, and where its slices go. A volume is one file, or a header and its image."""

    name: str
    case: int
    split: str
    volume: tuple[SourceFile, ...]
    mask: tuple[SourceFile, ...]  # empty if there is none

    def file(self, number: int) -> str:
        """Return the path of a slice below the data folder."""
        return f"keras_png_slices_{self.split}/case_{self.case:03d}_slice_{number}.nii.png"

    def origin(self) -> dict[str, Any]:
        """Return, as JSON values, what decides about the slices besides the geometry, and about their place."""
        files = versions(self.volume + self.mask)
        return {"subject": self.name, "case": self.case, "split": self.split, "files": files}


def versions(files: Iterable[SourceFile]) -> dict[str, list[int | None]]:
    """Return, as JSON values, by what another version of a file is told: its size and the time of its last change."""
    return {file.label: [file.size, file.modified] for file in files}


def split_subjects(names: Iterable[str], split: Literal["published", "seeded"], seed: int = 0) -> dict[str, str]:
    """Share subjects among train, validate and test.

    Args:
        names: of the subjects.
        split: "published" goes by the case ranges of OASIS-1 where all names are OAS1_0001 to OAS1_0457 and none of
            the three stays empty, else by seed.
        seed: of a split in the shares of the OASIS PNG set (302 / 35 / 17); it depends on seed and names only.

    Returns:
        For each subject its split.

    Raises:
        ValueError: fewer than 3 subjects to share by seed.
    """
    names = sorted(names)
    cases = {name: int(name[5:]) for name in names if re.fullmatch(r"OAS1_\d{4}", name)}
    if split == "published" and len(cases) == len(names):
        found = {name: part for name, case in cases.items() for part, ids in PUBLISHED_SPLIT.items() if case in ids}
        if len(found) == len(names) and len(set(found.values())) == len(PUBLISHED_SPLIT):
            return found
    if len(names) < 3:
        raise ValueError(
            f"A seeded split needs at least 3 subjects, one each to train, validate and test. Received: {len(names)}."
        )
    total = sum(OASIS_SUBJECTS.values())
    num_validate, num_test = (max(1, round(len(names) * OASIS_SUBJECTS[part] / total)) for part in ("validate", "test"))
    parts = ["validate"] * num_validate + ["test"] * num_test
    return dict(itertools.zip_longest(ranked(names, seed), parts, fillvalue="train"))


def note(text: str, labels: list[str]) -> None:
    """Tell the user of files, if there are any."""
    if labels:
        print(f"note: {len(labels)} {text}: {', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}")


def choose_subjects(
    volumes: dict[str, list[tuple[SourceFile, ...]]],
    subject_pattern: str,
    split: Literal["published", "seeded"],
    seed: int,
) -> list[Subject]:
    """Return who is in the volumes, one each, in the order of their cases, and tell the user what is not as asked."""
    chosen, unknown, further = {}, [], []
    for stem, (volume, *masks) in volumes.items():
        names = reversed(split_label(stem))  # the file's, and then outwards
        found = (match[0] for name in names if (match := re.search(subject_pattern, name)))
        if not (subject := next(filter(None, found), None)):
            unknown.append(volume[0].label)
        elif subject in chosen:
            further.append(volume[0].label)
        else:
            chosen[subject] = volume, masks[0] if masks else ()
    if unknown:
        raise ValueError(
            f"Nothing says who is shown in {len(unknown)} of {len(volumes)} volumes, such as {', '.join(unknown[:3])}; "
            "a guess could put one person into two splits. Give a --subject-pattern that finds people in the names of "
            'files or folders, such as "subj\\d+", or ".+" if each file name is a person; or move the volumes away. '
            f"Received: {subject_pattern}."
        )
    note("further volumes of these subjects are left out", further)
    masks = [volume[0].label for volume, _ in chosen.values() if _MASK.search(split_label(volume[0].label)[-1])]
    note("volumes are called masks: are the brains that they belong to not here?", masks)
    subjects, split_of = [], split_subjects(chosen, split, seed)
    from_oasis = all(re.fullmatch(r"OAS1_\d{4}", name) for name in chosen)
    for rank, name in enumerate(sorted(chosen), start=1):
        subjects.append(Subject(name, int(name[5:]) if from_oasis else rank, split_of[name], *chosen[name]))
    if dangling := [file.label for one in subjects for file in one.volume + one.mask if file.size is None]:
        text = f"{len(dangling)} links lead to files that are not here, such as {', '.join(dangling[:3])}."
        raise FileNotFoundError(f"{text} Get the files (datalad get, git annex get), or remove the links.")
    cases = {subject.case for subject in subjects}
    empty = [f"{ids[0]}-{ids[-1]}" for ids in PUBLISHED_SPLIT.values() if not cases & set(ids)]
    if empty and from_oasis and split == "published":
        print(f"note: the cases {' and '.join(empty)} are not here: subjects are shared by seed")
    return subjects


def read_people(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return age, sex and diagnosis by subject, from the text files of OASIS-1 and from participants.tsv of BIDS."""
    people = {}
    for label, text in texts.items():
        if match := OASIS_TEXT.search(label):
            told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
            cdr = told.get("CDR")  # the clinical dementia rating, for people who were tested
            people[match[1]] = {"age": told.get("AGE"), "sex": told.get("M/F"), "diagnosis": cdr and f"CDR {cdr}"}
            continue
        for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
            told = {key: value for key, value in row.items() if value != "n/a"}
            diagnosis = told.get("diagnosis") or told.get("group")
            person = {"age": told.get("age"), "sex": told.get("sex"), "diagnosis": diagnosis}
            name = told.get("participant_id", "")
            people |= {name: person, f"sub-{name}": person}  # some leave the prefix out
    return people
