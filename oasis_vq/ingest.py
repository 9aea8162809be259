"""Cut brain volumes into slices in the OASIS layout: OASIS-1 discs, NIfTI and ANALYZE files."""

import csv
import gzip
import io
import itertools
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import imageio.v3 as iio
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from oasis_vq.config import write_json, write_whole
from oasis_vq.slices import OASIS_SUBJECTS, ranked
from oasis_vq.volumes import SliceGeometry, cut_slices, read_volume
from oasis_vq.workers import finish, is_finished, run_tasks, start_or_continue

FORMAT_VERSION = 1  # of the algorithm: raise it whenever the same volumes give other bytes
SUBJECT_PATTERN = r"OAS1_\d{4}|sub-[^_]+|\d{3}_S_\d{4}|IXI\d+"  # OASIS-1, BIDS, ADNI, IXI
MASK_WORDS = ("mask", "seg", "dlmuse", "dlicv", "brain")  # <volume>_<something with one of these> is its mask
PUBLISHED_SPLIT = {"train": range(1, 402), "validate": range(402, 441), "test": range(441, 458)}  # cases of OASIS-1
COLUMNS = ("file", "split", "case", "subject", "slice", "source", "position_mm", "age", "sex", "diagnosis")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_VOLUME_NAME = re.compile(r"(.+)(\.nii\.gz|\.nii|\.hdr|\.img)")
_OASIS_SCAN = re.compile(r"OAS1_\d{4}_MR\d_mpr")
_OASIS_VOLUME = re.compile(r"OAS1_\d{4}_MR1_mpr_n\d_anon_111_t88_masked_gfc\.")  # MR2 is the same person again
_OASIS_TEXT = re.compile(r"(OAS1_\d{4})_MR1\.txt")


class SourceFile(NamedTuple):
    """A file of the source, on disk or in an archive."""

    label: str  # path below the source; of a member "disc1.tar.gz:disc1/OAS1_0001_MR1/..."
    path: str  # on disk, or the member's name
    archive: Path | None


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


def split_subjects(names: Iterable[str], split: Literal["published", "seeded"], seed: int = 0) -> dict[str, str]:
    """Share subjects among train, validate and test.

    Args:
        names: of the subjects.
        split: "published" goes by the case ranges of OASIS-1 where all names are OAS1_0001 to OAS1_0457, else by seed.
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
        if len(found) == len(names):
            return found
    if len(names) < 3:
        raise ValueError(
            f"A seeded split needs at least 3 subjects, one each to train, validate and test. Received: {len(names)}."
        )
    total = sum(OASIS_SUBJECTS.values())
    num_validate, num_test = (max(1, round(len(names) * OASIS_SUBJECTS[part] / total)) for part in ("validate", "test"))
    parts = ["validate"] * num_validate + ["test"] * num_test
    return dict(itertools.zip_longest(ranked(names, seed), parts, fillvalue="train"))


def _is_wanted(path: str) -> bool:
    """Whether a file of this name can be an archive, a volume or a mask, or tell who somebody is."""
    name = path.rpartition("/")[2]
    if name.startswith(".") or (_OASIS_SCAN.match(name) and not _OASIS_VOLUME.match(name)):
        return False  # an OASIS-1 disc holds more volumes of each person, with skulls, and its segmentations
    if name.endswith(_ARCHIVES) or name == "participants.tsv":
        return True
    return bool(_VOLUME_NAME.fullmatch(name) or _OASIS_TEXT.fullmatch(name))


def _find_files(source: Path) -> list[SourceFile]:
    """List the files on disk that a source consists of; archives are not opened."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source} to prepare slices from.")
    root, paths = source.parent, [source]
    if source.is_dir():
        root, paths = source, source.rglob("*")
    elif match := _VOLUME_NAME.fullmatch(source.name):  # with its other half, and its mask
        paths = (path for path in root.iterdir() if path.name.startswith((f"{match[1]}.", f"{match[1]}_")))
    files = [path for path in sorted(paths) if path.is_file() and _is_wanted(path.name)]
    return [SourceFile(path.relative_to(root).as_posix(), str(path), None) for path in files]


def _read_members(archive: Path, is_wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of those files in an archive whose path is wanted, in its order; nothing is unpacked."""
    try:
        # gzip, not tarfile, decompresses: it notices when the end is missing.
        with (
            archive.open("rb") if archive.suffix == ".tar" else gzip.open(archive) as stream,
            tarfile.open(fileobj=stream, mode="r|") as members,
        ):
            for member in members:
                if member.isfile() and is_wanted(member.name):
                    yield member.name, members.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} cannot be read as an archive ({error}). Download it again.") from error


def _open_archives(on_disk: list[SourceFile], *, progress: bool) -> tuple[list[SourceFile], dict[str, str]]:
    """Return the files on disk and in the archives among them, and the texts that tell of people by file name."""
    files, texts = [], {}
    for file in tqdm(on_disk, "listing", unit="file", leave=False, disable=not progress):
        path = Path(file.path)
        found: Iterable[tuple[SourceFile, bytes]] = [(file, b"")]
        if file.label.endswith((".txt", ".tsv")):
            found = [(file, path.read_bytes())]
        elif file.label.endswith(_ARCHIVES):
            members = _read_members(path, _is_wanted)
            found = ((SourceFile(f"{file.label}:{member}", member, path), content) for member, content in members)
        for one, content in found:
            files.append(one)
            if one.label.endswith((".txt", ".tsv")):
                texts[one.label] = content.decode("utf-8-sig", errors="replace")
    return files, texts


def _pair_masks(files: list[SourceFile]) -> dict[str, list[tuple[SourceFile, ...]]]:
    """Return for each volume, by its label without suffix, its files, and then those of its masks."""
    parts: dict[str, dict[str, SourceFile]] = {}
    for file in files:
        if match := _VOLUME_NAME.fullmatch(file.label):
            parts.setdefault(match[1], {})[match[2]] = file
    paired: dict[str, list[tuple[SourceFile, ...]]] = {}
    for stem, found in sorted(parts.items()):  # a volume comes before its masks
        single = found.get(".nii.gz") or found.get(".nii")
        if not single and len(found) < 2:
            raise ValueError(f"{found.popitem()[1].label} is half a volume: its .hdr or .img file is missing.")
        volume = (single,) if single else (found[".hdr"], found[".img"])
        cuts = [match.start() for match in re.finditer("_(?!.*/)", stem)]  # in the file's name
        owners = (stem[:cut] for cut in cuts if any(word in stem[cut:].lower() for word in MASK_WORDS))
        owner = next((owner for owner in owners if owner in paired), stem)
        paired.setdefault(owner, []).append(volume)
    return paired


def _choose_subjects(
    files: list[SourceFile], subject_pattern: str, split: Literal["published", "seeded"], seed: int
) -> tuple[list[Subject], list[str]]:
    """Return who is in the files, one volume each, in the order of their cases, and notes for the user."""
    paired, volumes, left_out = _pair_masks(files), {}, []
    names = {stem: re.split("[/:]", stem)[-1] for stem in paired}
    for stem in sorted(paired, key=lambda stem: ("T1" not in names[stem], names[stem], stem)):
        match = re.search(subject_pattern, names[stem])
        if volumes.setdefault(match[0] if match else names[stem], paired[stem]) is not paired[stem]:
            left_out.append(paired[stem][0][0].label)
    split_of = split_subjects(volumes, split, seed)
    from_oasis = all(re.fullmatch(r"OAS1_\d{4}", name) for name in volumes)
    subjects = []
    for rank, name in enumerate(sorted(volumes), start=1):
        volume, *masks = volumes[name]
        case = int(name[5:]) if from_oasis else rank
        subjects.append(Subject(name, case, split_of[name], volume, masks[0] if masks else ()))
    notes = []
    if left_out:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        notes.append(f"{len(left_out)} further volumes of these subjects are left out: {shown}")
    empty = [part for part in OASIS_SUBJECTS if part not in split_of.values()]
    if empty:
        notes.append(f"the published split leaves {' and '.join(empty)} empty; the seeded split fills all three")
    return subjects, notes


def _read_people(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return age, sex and diagnosis by subject, from the text files of OASIS-1 and from participants.tsv of BIDS."""
    people = {}
    for label, text in texts.items():
        if match := _OASIS_TEXT.search(label):
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


def _mark(partial: Path, subject: Subject) -> Path:
    return partial / ".subjects" / f"case_{subject.case:03d}.json"


def _write_subject(subject: Subject, members: dict[str, bytes], partial: Path, geometry: SliceGeometry) -> None:
    """Write the slices of a subject, then the mark that says so; `members` are its files that are in an archive."""

    def read(files: tuple[SourceFile, ...]) -> tuple[np.ndarray, np.ndarray]:
        return read_volume([members[file.path] if file.archive else Path(file.path).read_bytes() for file in files])

    label, mask = subject.volume[-1].label, None
    try:
        volume, affine = read(subject.volume)
        if subject.mask:
            label = subject.mask[-1].label
            labels, mask_affine = read(subject.mask)
            matrix = np.linalg.inv(mask_affine) @ affine  # from voxels of the volume to voxels of the mask
            mask = ndimage.affine_transform(
                labels > 0, matrix, output_shape=volume.shape, order=0, mode="grid-constant"
            )  # fmt: skip
            label = subject.volume[-1].label
        images, positions, has_skull = cut_slices(volume, affine, geometry, mask)
    except Exception as error:  # damaged files raise a dozen kinds, of nibabel, gzip, zlib and NumPy
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{label} cannot be used: {text}. Replace it or move it away.") from error
    for number, image in enumerate(images):
        write_whole(partial / subject.file(number), iio.imwrite("<bytes>", image, extension=".png"), sync=False)
    write_json(_mark(partial, subject), {"positions_mm": positions.round(2).tolist(), "has_skull": has_skull})


def _tasks(subjects: list[Subject], partial: Path, geometry: SliceGeometry) -> Iterator[tuple]:
    """Yield the arguments of `_write_subject`; each archive is read once, and few of its files are in memory."""
    subjects = sorted(subjects, key=lambda subject: (str(subject.volume[0].archive or ""), subject.case))
    for archive, group in itertools.groupby(subjects, key=lambda subject: subject.volume[0].archive):
        if archive is None:
            yield from ((subject, {}, partial, geometry) for subject in group)
            continue
        owners = {file.path: subject for subject in group for file in subject.volume + subject.mask}
        missing, contents = set(owners), {}
        for path, content in _read_members(archive, missing.__contains__):
            missing.remove(path)
            contents[path] = content
            paths = {file.path for file in owners[path].volume + owners[path].mask}
            if not paths & missing:
                yield owners[path], {path: contents.pop(path) for path in paths}, partial, geometry
            if not missing:
                break


def _write_manifest(partial: Path, subjects: list[Subject], marks: list[dict], people: dict[str, dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for subject, mark in zip(subjects, marks, strict=True):
        of_subject = {"split": subject.split, "case": subject.case, "subject": subject.name}
        of_subject |= {"source": subject.volume[-1].label, **people.get(subject.name, {})}
        for number, position in enumerate(mark["positions_mm"]):
            table.writerow({"file": subject.file(number), "slice": number, "position_mm": position, **of_subject})
    write_whole(partial / "manifest.csv", text.getvalue().encode())


def prepare(
    source: str | Path,
    folder: str | Path,
    geometry: SliceGeometry | None = None,
    *,
    split: Literal["published", "seeded"] = "published",
    seed: int = 0,
    subject_pattern: str | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> Path:
    """Cut volumes into slices in the OASIS layout; do nothing if this very folder has been made of them.

    Of OASIS-1 the masked, gain-field corrected volumes in atlas space are taken, first session only; of each other
    subject the volume whose name comes first, those with T1 in it before others. A file `<volume>_<...>` whose ending
    has one of `MASK_WORDS` in it is the volume's mask: where it is above 0 is brain. Archives are never unpacked.
    The slices grow in `<folder>.partial`, which a later call with the same arguments continues, and get their name
    when they are complete. `manifest.csv` says of each slice who it is and where it comes from.

    Args:
        source: a folder, searched with all below it, an archive (.tar.gz, .tgz, .tar), or a volume.
        folder: where `keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png` and the manifest go.
        geometry: which planes are cut, and their images' size; None for 32 axial slices of 256 x 256 mm and pixels.
        split: "published" shares OASIS-1 by the case ranges of the OASIS PNG set, all else by seed; "seeded" shares
            everything by seed.
        seed: of the split.
        subject_pattern: regular expression whose first match in a file's name says who it is; without a match the
            name does. None for `SUBJECT_PATTERN`.
        num_workers: processes; 1 works in this one. With more, a script needs the usual `if __name__ == "__main__":`.
        progress: whether to show progress bars.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there are no volumes.
        ValueError: a file is damaged or is no brain volume, or there are too few subjects to split.
        FileExistsError: the folder holds something else.
    """
    source, folder, geometry = Path(source), Path(folder), geometry or SliceGeometry()
    subject_pattern = SUBJECT_PATTERN if subject_pattern is None else subject_pattern
    if split not in ("published", "seeded"):
        raise ValueError(f"split is 'published' or 'seeded'. Received: {split}.")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1. Received: {num_workers}.")
    try:
        re.compile(subject_pattern)
    except re.error as error:
        raise ValueError(f"subject_pattern is no regular expression ({error}). Received: {subject_pattern}.") from None
    on_disk = _find_files(source)
    parameters = {
        "format_version": FORMAT_VERSION, **geometry.to_dict(), "split": split, "seed": seed,
        "subject_pattern": subject_pattern, "files": {file.label: Path(file.path).stat().st_size for file in on_disk},
    }  # fmt: skip
    if is_finished(folder, "A set of slices", "prepare.json", parameters):
        return folder

    files, texts = _open_archives(on_disk, progress=progress)
    if not any(_VOLUME_NAME.fullmatch(file.label) for file in files):
        raise FileNotFoundError(
            f"No volumes in {source}. Expected .nii, .nii.gz, .hdr and .img files, or .tar.gz archives of them. Of "
            "OASIS-1 only the skull-stripped volumes of first sessions count (..._MR1_..._t88_masked_gfc.img)."
        )
    subjects, notes = _choose_subjects(files, subject_pattern, split, seed)
    parts = [*(f"keras_png_slices_{part}" for part in OASIS_SUBJECTS), ".subjects"]
    partial = start_or_continue(folder, "prepare.json", parameters, parts)
    waiting = [subject for subject in subjects if not _mark(partial, subject).exists()]
    with tqdm(desc="slices", unit="volume", total=len(subjects), disable=not progress) as bar:
        bar.update(len(subjects) - len(waiting))
        for _ in run_tasks(_write_subject, _tasks(waiting, partial, geometry), min(num_workers, len(waiting))):
            bar.update()
    marks = [json.loads(_mark(partial, subject).read_text()) for subject in subjects]
    _write_manifest(partial, subjects, marks, _read_people(texts))
    shutil.rmtree(partial / ".subjects")
    finish(partial, folder)
    with_skull = sum(mark["has_skull"] for mark in marks)
    if with_skull:
        notes.append(f"{with_skull} of {len(subjects)} volumes have no mask beside them: the skull stays")
    for note in notes:
        print(f"note: {note}")
    return folder
