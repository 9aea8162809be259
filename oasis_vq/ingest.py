"""Cut brain volumes into slices in the OASIS layout: OASIS-1 discs, NIfTI and ANALYZE files."""

import csv
import gzip
import io
import itertools
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import imageio.v3 as iio
from tqdm import tqdm

from oasis_vq.files import write_json, write_whole
from oasis_vq.slices import OASIS_SUBJECTS
from oasis_vq.subjects import OASIS_TEXT, SUBJECT_PATTERN, Subject, choose_subjects, note, read_people, versions
from oasis_vq.volumes import (
    SliceGeometry,
    SourceFile,
    cut_slices,
    pair_files,
    read_mask,
    read_shape,
    read_volume,
    require_brain,
)
from oasis_vq.workers import finish, make_once, partial_of, read_record, run_tasks, start_or_continue

FORMAT_VERSION = 3  # of the algorithm: raise it whenever the same volumes give other bytes
COLUMNS = ("file", "split", "case", "subject", "slice", "source", "position_mm", "age", "sex", "diagnosis")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_VOLUMES = (".nii.gz", ".nii", ".hdr", ".img")
_LEFT_OUT = re.compile(r"\..*|derivatives|sourcedata")  # hidden; further versions of the same volumes in BIDS
_OASIS_SCAN = re.compile(r"OAS1_\d{4}_MR\d_mpr")
_OASIS_VOLUME = re.compile(r"OAS1_\d{4}_MR1_mpr_n\d_anon_111_t88_masked_gfc\.")  # MR2 is the same person again


def _is_wanted(path: str) -> bool:
    """Whether a file can be an archive, a volume or a mask, or tell who somebody is; `path` is below the source."""
    *_, name = parts = PurePosixPath(path).parts
    if any(map(_LEFT_OUT.fullmatch, parts)) or (_OASIS_SCAN.match(name) and not _OASIS_VOLUME.match(name)):
        return False  # an OASIS-1 disc holds more volumes of each person, with skulls, and its segmentations
    if name.lower().endswith(_ARCHIVES + _VOLUMES) or name == "participants.tsv":
        return True
    return bool(OASIS_TEXT.fullmatch(name))


def _walk(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """Yield the files below a folder; links to folders are followed, but no folder is entered twice."""
    if folder.resolve() in entered:
        return
    entered.add(folder.resolve())
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name)):
        if not path.is_dir():
            yield path
        elif not _LEFT_OUT.fullmatch(path.name):  # say, the thousands of objects of git-annex, each a volume
            yield from _walk(path, entered)


def _find_files(source: Path) -> list[SourceFile]:
    """List the files on disk that a source consists of; archives are not opened."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source} to prepare slices from.")
    if source.is_dir():
        root, paths = source, _walk(source, set())
    elif source.name.lower().endswith(_ARCHIVES):
        root, paths = source.parent, [source]
    else:
        raise ValueError(f"Slices come from a folder or an archive ({', '.join(_ARCHIVES)}). Received: {source}.")
    files = []
    for path in paths:
        label = path.relative_to(root).as_posix()
        if _is_wanted(label) and (path.is_file() or path.is_symlink()):
            if label.encode("utf-8", "replace").decode() != label:  # the manifest could not name it
                raise ValueError(f"A file's name is no UTF-8. Received: {label!a}. Rename it.")
            found = path.stat() if path.exists() else None
            size, modified = (found.st_size, found.st_mtime_ns) if found else (None, None)
            files.append(SourceFile(label, str(path), None, size, modified))
    return files


def _read_members(archive: Path, is_wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of those files in an archive whose path is wanted, in its order; nothing is unpacked."""
    try:
        # gzip, not tarfile, decompresses: it notices when the end is missing.
        with (
            archive.open("rb") if archive.suffix.lower() == ".tar" else gzip.open(archive) as stream,
            tarfile.open(fileobj=stream, mode="r|") as members,
        ):
            for member in members:
                if member.isfile() and is_wanted(member.name):
                    yield member.name, members.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        _pass_on(error, str(archive))
        raise ValueError(
            f"{archive} cannot be read as an archive ({error}). Replace it or move it away; if download made it, run "
            "that again."
        ) from error


def _pass_on(error: Exception, file: str) -> None:
    """Raise an error of the system anew, with the file's name: it says nothing of what is in the file."""
    if isinstance(error, OSError) and error.errno:  # those of gzip and nibabel have no number
        raise OSError(error.errno, error.strerror, error.filename or file) from error


def _open_archives(on_disk: list[SourceFile], *, progress: bool) -> tuple[list[SourceFile], dict[str, str]]:
    """Return the volumes' files on disk and in archives, and by label the texts that tell of people."""
    files, texts = [], {}
    for file in tqdm(on_disk, "listing", unit="file", leave=False, disable=not progress):
        path, found = Path(file.path), [(file, None)]
        if file.label.lower().endswith(_ARCHIVES):
            members = _read_members(path, _is_wanted)
            found = (
                (SourceFile(f"{file.label}:{name}", name, path, len(data), file.modified), data)
                for name, data in members
            )
        for one, content in found:
            if one.label.endswith((".txt", ".tsv")) and one.size is None:
                print(f"note: {one.label} is a link to a file that is not here: age and sex stay unknown")
            elif one.label.endswith((".txt", ".tsv")):
                texts[one.label] = (path.read_bytes() if content is None else content).decode("utf-8-sig", "replace")
            elif one.size is None:
                files.append(one)
            else:
                with path.open("rb") if content is None else io.BytesIO(content) as stream:
                    files.append(one._replace(shape=read_shape(stream)))
    return files, texts


def _mark(partial: Path, subject: Subject) -> Path:
    return partial / ".subjects" / f"case_{subject.case:03d}.json"


def _write_subject(subject: Subject, members: dict[str, bytes], partial: Path, geometry: SliceGeometry) -> None:
    """Write the slices of a subject, then the mark that says so; `members` are its files that are in an archive."""

    def contents(files: tuple[SourceFile, ...]) -> list[bytes]:
        return [members[file.path] if file.archive else Path(file.path).read_bytes() for file in files]

    label, mask = subject.volume[-1].label, None
    try:
        volume, affine = read_volume(contents(subject.volume))
        if subject.mask:
            label = subject.mask[-1].label
            mask = read_mask(contents(subject.mask), affine, volume.shape)
            require_brain(mask, volume, affine)
            label = subject.volume[-1].label
        images, positions, has_skull = cut_slices(volume, affine, geometry, mask)
    except MemoryError as error:
        raise MemoryError(
            f"{label} does not fit into memory (the volume's shape is {subject.volume[0].shape}). Try --workers 1, or "
            "a smaller --image-size."
        ) from error
    except Exception as error:  # damaged files raise a dozen kinds, of nibabel, gzip, zlib and NumPy
        _pass_on(error, label)
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{label} cannot be used: {text}. Replace it or move it away.") from error
    for number, image in enumerate(images):
        # Each is on the disk before the mark is: after a power cut, too, a mark can be trusted.
        write_whole(partial / subject.file(number), iio.imwrite("<bytes>", image, extension=".png"))
    mark = {"origin": subject.origin(), "positions_mm": positions.round(2).tolist(), "has_skull": has_skull}
    write_json(_mark(partial, subject), mark)


def _keep_finished(partial: Path, subjects: list[Subject], num_slices: int) -> list[Subject]:
    """Return the subjects that are yet to be cut, and remove all that is there but of the others."""
    waiting, kept = [], set()
    for subject in subjects:
        if (read_record(_mark(partial, subject)) or {}).get("origin") == subject.origin():
            kept |= {_mark(partial, subject), *(partial / subject.file(number) for number in range(num_slices))}
        else:
            waiting.append(subject)
    for path in [*partial.glob(".subjects/*"), *partial.glob("keras_png_slices_*/*")]:  # no mark without slices
        if path not in kept:
            path.unlink()
    return waiting


def _tasks(subjects: list[Subject], partial: Path, geometry: SliceGeometry) -> Iterator[tuple]:
    """Yield the arguments of `_write_subject`; each archive is read once, and few of its files are in memory."""
    subjects = sorted(subjects, key=lambda subject: (str(subject.volume[0].archive or ""), subject.case))
    for archive, group in itertools.groupby(subjects, key=lambda subject: subject.volume[0].archive):
        if archive is None:
            yield from ((subject, {}, partial, geometry) for subject in group)
            continue
        owners: dict[str, list[Subject]] = {}  # of files that are yet to be read, or in memory
        for subject in group:
            for file in subject.volume + subject.mask:
                owners.setdefault(file.path, []).append(subject)
        contents = {}
        for path, content in _read_members(archive, owners.__contains__):
            contents[path] = content
            for subject in list(owners[path]):
                files = {file.path for file in subject.volume + subject.mask}
                if not files <= contents.keys():
                    continue
                yield subject, {file: contents[file] for file in files}, partial, geometry
                for file in files:
                    owners[file].remove(subject)
                    if not owners[file]:
                        del owners[file], contents[file]
            if not owners:
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
    subject the volume whose name comes first, those with T1 or MPRAGE in it before others, and of these masks, what is
    made of another volume (`c1sub-01_T1w` beside or below `sub-01_T1w`), maps and those with a contrast agent (T1c,
    T1ce, T1Gd) last. A file `<volume>_<...>` whose ending has one of `volumes.MASK_WORDS` in it, and no part of a
    brain, such as a lesion, is the volume's mask, and in BIDS `sub-01_mask` or `sub-01_desc-brain_mask` that of
    `sub-01_T1w`: where it is above 0 is brain. Names that begin with a dot, what is in `derivatives` and `sourcedata`
    below the source, and volumes in a folder called `labels`, `labelsTr`, `masks`, `segmentations` or the like do not
    count. Archives are never unpacked. The slices grow in `<folder>.partial`, one call at a time, and get their name
    when they are complete. A later call with the same arguments goes on there, also when volumes have come, gone or
    changed: only these are cut anew, and whoever has another case or split by that. `manifest.csv` says of each slice
    who it is and where it comes from.

    Args:
        source: a folder, searched with all below it, or an archive (.tar.gz, .tgz, .tar).
        folder: where `keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png` and the manifest go.
        geometry: which planes are cut, and their images' size; None for 32 axial slices of 256 x 256 mm and pixels.
        split: "published" shares OASIS-1 by the case ranges of the OASIS PNG set, if none of the three is empty then,
            and all else by seed; "seeded" shares everything by seed.
        seed: of the split.
        subject_pattern: regular expression whose match says who it is, in the file's name without suffix, or else in
            its folders' names below the source, the innermost first; ".+" makes each file name a person. None for
            `SUBJECT_PATTERN`: OASIS, BIDS, ADNI, IXI and BraTS.
        num_workers: processes; 1 works in this one. With more, a script needs the usual `if __name__ == "__main__":`.
        progress: whether to show progress bars.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there are no volumes, or only links to volumes that are elsewhere.
        ValueError: a file is damaged or is no brain volume, nothing says who somebody is, or there are too few
            subjects to split.
        MemoryError: a volume does not fit into memory.
        OSError: the system cannot read a file, or write one.
        FileExistsError: the folder holds something else, or a file of the source has another size or time since then.
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
    settings = {
        "format_version": FORMAT_VERSION, **geometry.to_dict(), "split": split, "seed": seed,
        "subject_pattern": subject_pattern,
    }  # fmt: skip
    record = {**settings, "files": versions(on_disk)}

    def fill() -> None:
        if read_record(partial_of(folder) / "prepare.json") == record:  # all was done but the name
            _name(partial_of(folder), folder)
            return
        files, texts = _open_archives(on_disk, progress=progress)
        volumes, odd = pair_files(files)
        note("files are left out, which are no volumes", odd)
        if not volumes:
            raise FileNotFoundError(
                f"No volumes in {source}. Expected .nii, .nii.gz, .hdr and .img files, or .tar.gz archives of them. Of "
                "OASIS-1 only the skull-stripped volumes of first sessions count (..._MR1_..._t88_masked_gfc.img), of "
                "BIDS no derivatives and sourcedata."
            )
        subjects = choose_subjects(volumes, subject_pattern, split, seed)
        parts = [*(f"keras_png_slices_{part}" for part in OASIS_SUBJECTS), ".subjects"]
        partial = start_or_continue(folder, "prepare.json", settings, parts)
        waiting = _keep_finished(partial, subjects, geometry.num_slices)
        with tqdm(desc="slices", unit="volume", total=len(subjects), disable=not progress) as bar:
            bar.update(len(subjects) - len(waiting))
            for _ in run_tasks(_write_subject, _tasks(waiting, partial, geometry), min(num_workers, len(waiting))):
                bar.update()
        marks = [read_record(_mark(partial, subject)) for subject in subjects]
        _write_manifest(partial, subjects, marks, read_people(texts))
        with_skull = sum(mark["has_skull"] for mark in marks)
        if with_skull:
            print(
                f"note: {with_skull} of {len(subjects)} volumes have no mask beside them: the skull stays, and slices "
                "are spread over the head, the lowest below the brain"
            )
        write_json(partial / "prepare.json", record)
        _name(partial, folder)

    return make_once(folder, "A set of slices", "prepare.json", record, fill)


def _name(partial: Path, folder: Path) -> None:
    """Give a folder its name, in which all is done."""
    shutil.rmtree(partial / ".subjects", ignore_errors=True)
    finish(partial, folder)
