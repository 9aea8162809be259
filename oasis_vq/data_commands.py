"""What the commands that make and check data folders do: one function each, its signature and docstring are its --help.

What takes seconds to import is imported where it is used: --help does not wait.
"""

from pathlib import Path
from typing import Literal

import tyro


def phantom(out: Path, subjects: int = 354, image_size: int = 256, seed: int = 0, workers: int = 2) -> None:
    """Make a cohort of warped MNI152 brains in the OASIS layout: something to work on when there are no data.

    Args:
        out: folder to write; what is there already is never overwritten.
        subjects: how many; they are split as in OASIS.
        image_size: height and width of the PNGs in pixels.
        seed: the same seed gives the same files.
        workers: processes.
    """
    from oasis_vq.phantom import make_cohort

    make_cohort(out, num_subjects=subjects, image_size=image_size, seed=seed, num_workers=workers)
    print(f"{out}: {subjects} subjects")


def download(
    collection: tyro.conf.Positional[Literal["oasis1"]],
    out: Path,
    discs: tuple[int, ...] = tuple(range(1, 13)),
    accept_terms: bool = False,
) -> None:
    """Download the OASIS-1 archives, about 1.5 GB each; a download that was broken off goes on where it was.

    Args:
        collection: what to download.
        out: folder of the archives.
        discs: numbers of the archives, from 1 to 12; all if not given.
        accept_terms: whether you accept the data use terms, which are shown; otherwise you are asked.
    """
    from oasis_vq.download import confirm_terms, download_oasis1

    confirm_terms(accept_terms)
    for archive in download_oasis1(out, discs=discs):
        print(archive)


def prepare(
    source: tyro.conf.Positional[Path],
    out: Path,
    image_size: int = 256,
    plane: Literal["axial", "coronal", "sagittal"] = "axial",
    num_slices: int = 32,
    slice_range: tuple[float, float] | None = None,
    field_of_view: float = 256.0,
    split: Literal["published", "seeded"] = "published",
    subject_pattern: str | None = None,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Cut brain volumes into slices in the OASIS layout; what was interrupted goes on when called again.

    Args:
        source: a folder or an archive: OASIS-1 archives or what was in them, NIfTI or ANALYZE volumes.
        out: folder to write; what is there already is never overwritten.
        image_size: height and width of the PNGs in pixels.
        plane: orientation of the slices.
        num_slices: slices of each subject.
        slice_range: first and last slice as shares of the brain's extent; None for a range made for the plane.
        field_of_view: height and width of the images in mm.
        split: OASIS-1 by the case ranges of the OASIS PNG set ('published') unless that leaves a split empty, or
            everybody by seed; others by seed.
        subject_pattern: regular expression that finds the person in a file's name or else in its folders', the
            innermost first; '.+' says that each file is a person. None knows OASIS, BIDS, ADNI, IXI and BraTS.
        seed: of the split.
        workers: processes.
    """
    from oasis_vq import ingest

    geometry = ingest.SliceGeometry(
        image_size=image_size, plane=plane, num_slices=num_slices, slice_range=slice_range, field_of_view=field_of_view
    )
    options = {"split": split, "seed": seed, "subject_pattern": subject_pattern, "num_workers": workers}
    ingest.prepare(source, out, geometry, **options)
    print(f"{out}: {len(list(out.glob('*/*.png')))} slices")


def check(data: tyro.conf.Positional[Path]) -> None:
    """Look through a data folder: what is there, and each problem with its remedy; exit status 1 if it is unusable.

    Args:
        data: folder with the slices.
    """
    from oasis_vq.runtime import start_tensorflow

    start_tensorflow()
    from oasis_vq.guard import check_folder

    index, findings = check_folder(data)
    for split, part in index.splits().items():
        if len(part):
            numbers = f"slices {part.slice.min()}-{part.slice.max()}"
            print(f"{split:<9}{len(part):>7} files{part.num_subjects:>6} subjects  {numbers}")
    for finding in findings:
        print(f"{'error' if finding.is_error else 'note':<6} {finding.kind}: {finding.told(most=20)}")
    errors = sum(finding.is_error for finding in findings)
    if errors:
        raise ValueError(f"{data} cannot be used as it is: {errors} {'errors' if errors > 1 else 'error'} above.")
    print(f"{data}: usable, {len(findings)} {'note' if len(findings) == 1 else 'notes'}")
