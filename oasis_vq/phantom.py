"""Write a phantom cohort: made-up people, each a randomly deformed MNI152 brain, in the OASIS slice layout.

The anatomy is the ICBM 152 nonlinear symmetric 2009a template that nilearn carries in its wheel (Fonov et al. 2011,
doi:10.1016/j.neuroimage.2010.07.033). Its notice: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging
Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, modify, and distribute this
software and its documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies.

Volumes have their axes in the order (z, y, x), in mm: z up, y forward, x to the right of the subject; images have
anterior up and the subject's left on the left. Nothing here multiplies matrices through BLAS: every step runs in one
thread and rounds alike in any process, which keeps the bytes independent of the number of workers.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from oasis_vq.config import Paths, limit_train, profile
from oasis_vq.files import write_whole
from oasis_vq.slices import OASIS_SUBJECTS, SliceIndex, find_slices
from oasis_vq.workers import finish, make_once, run_tasks, start_or_continue

FORMAT_VERSION = 1  # of the algorithm: raise it whenever the same seed gives other bytes
FIELD_OF_VIEW = 256.0  # mm, the side of an image
BRAIN_CENTRE = (18.0, -17.0, 0.0)  # mm (z, y, x) in MNI space; the middle of an image
BRAIN_BOX = (208.0, 176.0)  # mm (y, x) around the centre: holds the largest deformed brain, the rest is not computed
SLICE_RANGE = (-34.0, 66.0)  # mm z in MNI space: lower temporal lobe and cerebellum; 16 mm below the vertex
FIELD_BOX = (192.0, 240.0, 208.0)  # mm (z, y, x), the period of the random fields: longer than any brain


class Template(NamedTuple):
    """The MNI152 brain as `subject_slices` needs it: float32 volumes (z, y, x), 1 mm, `origin` the mm of voxel 0."""

    tissue: np.ndarray  # 0 CSF, 1 grey matter, 2 white matter; sharpened, so it overshoots both ends
    mask: np.ndarray  # 1 in the brain, 0 outside, smoothed over 2 mm
    cortex: np.ndarray  # 1 where folding differs between people, 0 in deep grey and white matter
    ventricles: np.ndarray  # 1 in the lateral ventricles, smoothed over 4 mm
    origin: tuple[float, float, float]


@functools.cache
def load_template() -> Template:
    """Load nilearn's MNI152 tissue maps, cropped to the brain. Takes seconds, once in each process."""
    from nilearn import datasets  # here, not above: it takes seconds to import

    image = datasets.load_mni152_gm_template(resolution=1)
    crop = (slice(0, 158), slice(20, 214), slice(20, 177))  # the brain mask and 5 mm around it
    origin = tuple(float(image.affine[2 - axis, 3]) + crop[axis].start for axis in range(3))

    def volume(nifti) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(nifti.dataobj, dtype=np.float32).T[crop])

    grey = volume(image)
    white = volume(datasets.load_mni152_wm_template(resolution=1))
    mask = volume(datasets.load_mni152_brain_mask(resolution=1))
    z, y, x = (np.arange(n, dtype=np.float32) + o for n, o in zip(mask.shape, origin, strict=True))
    z, y, x = z[:, None, None], y[:, None], x

    # Brainstem and thalamus hold mixed tissue that the maps call grey: the T1 image itself tells how bright it is.
    t1 = volume(datasets.load_mni152_template(resolution=1))
    levels = [np.median(t1[pure & (mask > 0)]) for pure in (grey + white < 0.2, grey > 0.9, white > 0.9)]
    tissue = (np.clip(grey + 2 * white, 0, 2) + np.interp(t1, levels, (0, 1, 2)).astype(np.float32)) / 2 * mask
    # Nearer to the tissue than the template's mask, which keeps the venous sinuses, and without wisps above the eyes.
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(tissue > 0.5, iterations=4)) & (mask > 0)
    mask = ndimage.binary_opening(closed, iterations=3).astype(np.float32)

    fluid = (tissue < 0.6) & (mask > 0) & (abs(x) > 2) & (abs(x) < 32) & (y > -50) & (y < 38) & (z > -8) & (z < 32)
    labels, _ = ndimage.label(fluid)
    ventricles = np.isin(labels, np.bincount(labels[fluid]).argsort()[-2:]).astype(np.float32)  # left and right

    deep = (x / 36) ** 2 + ((y + 6) / 44) ** 2 + ((z - 4) / 26) ** 2  # basal ganglia, thalamus, ventricles: below 1
    brainstem = (x / 20) ** 2 + ((y + 28) / 18) ** 2 + ((z + 30) / 30) ** 2
    cerebellum = (x / 58) ** 2 + ((y + 66) / 36) ** 2 + ((z + 40) / 28) ** 2 < 1
    folding = ndimage.gaussian_filter(grey, 2) * 1.5 * (deep > 1) * (brainstem > 1) * np.where(cerebellum, 0.4, 1)
    folding = np.clip(folding, 0, 1).astype(np.float32)
    # The average of 152 people is blurred: what differs from its surroundings is amplified, thin folia most.
    sharpening = ndimage.gaussian_filter(np.where(cerebellum, 3, 0.8).astype(np.float32), 4)
    return Template(
        tissue=tissue + sharpening * (tissue - ndimage.gaussian_filter(tissue, 3)),
        mask=ndimage.gaussian_filter(mask, 2),
        cortex=ndimage.gaussian_filter(folding, 2),
        ventricles=ndimage.gaussian_filter(ventricles, 4),
        origin=origin,
    )


def random_field(rng: np.random.Generator, wavelength: float, axes: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return a smooth random field of mean 0 and variance 1 whose waves are about `wavelength` mm long.

    Args:
        rng: source of the white noise that is band-passed.
        wavelength: mm; the standard deviation of the pass band is 30 % of its frequency.
        axes: the evenly spaced mm positions along z, y and x at which the field is wanted.

    Returns:
        (len(z), len(y), len(x)), float32.
    """
    spacing = wavelength / 5
    shape = tuple(int(np.ceil(side / spacing)) for side in FIELD_BOX)
    frequencies = [np.fft.fftfreq(n) for n in shape[:2]] + [np.fft.rfftfreq(shape[2])]
    kz, ky, kx = np.meshgrid(*frequencies, indexing="ij", sparse=True)
    waves = np.sqrt(kz**2 + ky**2 + kx**2) * 5  # in units of 1 / wavelength
    spectrum = np.fft.rfftn(rng.standard_normal(shape)) * np.exp(-0.5 * ((waves - 1) / 0.3) ** 2) * (waves > 0)
    field = np.fft.irfftn(spectrum, shape, axes=(0, 1, 2)).astype(np.float32)
    field /= field.std()
    steps = [(axis[1] - axis[0]) / spacing if len(axis) > 1 else 1.0 for axis in axes]
    offsets = [(axis[0] + side / 2) / spacing for axis, side in zip(axes, FIELD_BOX, strict=True)]
    shape = tuple(map(len, axes))
    return ndimage.affine_transform(field, steps, offsets, output_shape=shape, order=1, mode="grid-wrap")


def soft_step(value: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Return 0 where value is below -width / 2, 1 above width / 2, and a straight line between."""
    return np.clip(value / width + 0.5, 0, 1)


def without_specks(masks: np.ndarray) -> np.ndarray:
    """Return each (height, width) mask of the stack without its pieces smaller than 3 % of it."""
    kept = np.zeros_like(masks)
    for plane, mask in enumerate(masks):
        labels, _ = ndimage.label(mask)
        areas = np.bincount(labels.ravel())
        kept[plane] = mask & (areas[labels] > 0.03 * mask.sum())
    return kept


def _places_in_template(rng: np.random.Generator, age: float, axes: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the template voxel (3, z, y, x) that each point of a new person, given by mm `axes`, is made from."""
    template = load_template()
    # A scale above 1 shrinks: MNI152 is larger than most heads. Height differs least, so slice K shows the same level.
    scale = 1.03 + 0.025 * rng.standard_normal() + np.array([0.01, 0.025, 0.025]) * rng.standard_normal(3)
    matrix = (np.diag(scale) + 0.025 * rng.standard_normal((3, 3))).tolist()  # rotates and shears as well
    shift = (1.5 * rng.standard_normal(3)).tolist()  # mm
    mesh = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij", sparse=True)
    places = []
    for row, offset, centre, first in zip(matrix, shift, BRAIN_CENTRE, template.origin, strict=True):
        linear = row[0] * mesh[0] + row[1] * mesh[1] + row[2] * mesh[2]
        # mm: lobes and hemispheres of unlike size, then gyri out of place
        bend = 2.5 * random_field(rng, 90, axes) + 1.1 * random_field(rng, 30, axes)
        places.append(linear + bend + (offset + centre - first))
    places = np.stack(places)
    # Points around the ventricles come from nearer to their middle (wide ventricles) or from farther off (narrow ones).
    dilation = 4 + 30 * (age - 0.3) + 7 * rng.standard_normal()  # times slopes up to 0.06 a mm: -1 to 2 mm
    slopes = [ndimage.map_coordinates(slope, places, order=1) for slope in np.gradient(template.ventricles)]
    return places + dilation * np.stack(slopes)


def _paint(rng: np.random.Generator, age: float, axes: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a new person's noiseless T1 intensities and brain mask at the mm `axes`, both (z, y, x) within [0, 1]."""
    template, places = load_template(), _places_in_template(rng, age, axes)
    tissue, mask, cortex = (
        ndimage.map_coordinates(volume, places, order=1) for volume in (template.tissue, template.mask, template.cortex)
    )
    # Sulci are sheets, as are the zeros of a random field: this person's own valleys run there, some 13 mm apart.
    valleys = np.abs(random_field(rng, 26, axes)) - 0.8
    tissue += cortex * (0.9 * valleys + 0.3 * random_field(rng, 12, axes))
    tissue = np.minimum(tissue, 1 + 10 * np.clip(mask - 0.92, 0, 1))  # no white matter within 3 mm of the surface

    # Crisp tissue classes, whose borders lie deeper in some places than in others; deep nuclei keep their half-tones.
    depth = random_field(rng, 35, axes)
    fluid_border = 0.12 + 0.3 * age + 0.1 * depth
    white_border = 1.62 + 0.08 * random_field(rng, 35, axes)
    softness = 1 - 0.55 * np.clip(cortex, 0, 1)
    grey_part = 0.7 * soft_step(tissue - fluid_border, softness) + 0.3 * np.clip(tissue, 0, 1)
    white_part = 0.7 * soft_step(tissue - white_border, softness) + 0.3 * np.clip(tissue - 1, 0, 1)

    fluid, white = rng.uniform(0.20, 0.32), rng.uniform(0.80, 0.92)
    grey = fluid + (white - fluid) * rng.uniform(0.52, 0.64)
    image = (fluid + (grey - fluid) * grey_part + (white - grey) * white_part) ** rng.uniform(0.9, 1.15)
    image *= 1 + 0.05 * random_field(rng, 150, axes)  # the coil's uneven sensitivity
    brain = soft_step(mask - 0.5 + 0.05 * depth, 0.2)
    return np.clip(image, 0, 1) * brain, brain


def subject_slices(seed: int, subject: int, image_size: int = 256, num_slices: int = 32) -> np.ndarray:
    """Make the axial slices of one made-up person, who depends on these four numbers only.

    Args:
        seed: of the cohort.
        subject: number of the person, counted from 0.
        image_size: pixels on a side of the 256 mm field of view.
        num_slices: planes from the lower temporal lobe to near the vertex.

    Returns:
        (num_slices, image_size, image_size), uint8, inferior to superior, anterior up, background 0.
    """
    rng = np.random.default_rng([seed, subject])
    age = rng.uniform()  # 0 young, 1 old: wide ventricles tend to come with wide sulci
    pixel = FIELD_OF_VIEW / image_size  # mm
    points = max(1, round(pixel))  # along each side of a pixel, averaged: small images are not jagged
    margins = [int((FIELD_OF_VIEW - side) / 2 / pixel) for side in BRAIN_BOX]
    rows, columns = (slice(margin, image_size - margin) for margin in margins)
    y, x = (
        ((np.arange(span.start * points, span.stop * points) + 0.5) / points - image_size / 2) * pixel
        for span in (rows, columns)
    )
    z = np.linspace(*SLICE_RANGE, num_slices) - BRAIN_CENTRE[0]
    image, brain = _paint(rng, age, (z, -y, x))

    blur = rng.uniform(0.3, 0.6) * points / pixel
    image = ndimage.gaussian_filter(image, (0, blur, blur))
    blocks = (num_slices, len(y) // points, points, len(x) // points, points)
    image, brain = (values.reshape(blocks).mean((2, 4)) for values in (image, brain))
    noise = rng.uniform(0.008, 0.022) * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1]) * without_specks(brain > 0.5)  # the magnitude of a complex signal
    slices = np.zeros((num_slices, image_size, image_size), np.uint8)
    slices[:, rows, columns] = np.rint(255 * np.clip(image, 0, 1))
    return slices


def split_cases(num_subjects: int) -> dict[str, range]:
    """Share consecutive case numbers, from 1, among train, validate and test as OASIS does (302 / 35 / 17 of 354).

    Args:
        num_subjects: at least 6; validate and test get 2 or more.

    Returns:
        For each split its case numbers; together 1 .. num_subjects.

    Raises:
        ValueError: fewer than 6 subjects.
    """
    if num_subjects < 6:
        raise ValueError(
            f"A cohort needs at least 6 subjects (2 each to train, validate and test). Received: {num_subjects}. "
            "Ask for 6 or more."
        )
    total = sum(OASIS_SUBJECTS.values())
    shares = (OASIS_SUBJECTS[name] / total for name in ("validate", "test"))
    num_validate, num_test = (max(2, round(num_subjects * share)) for share in shares)
    num_train = num_subjects - num_validate - num_test
    ends = np.cumsum([num_train, num_validate, num_test]).tolist()
    return {
        name: range(start + 1, end + 1) for name, start, end in zip(OASIS_SUBJECTS, [0, *ends[:-1]], ends, strict=True)
    }


def _write_subject(paths: list[Path], seed: int, subject: int, image_size: int) -> None:
    for path, image in zip(paths, subject_slices(seed, subject, image_size, len(paths)), strict=True):
        write_whole(path, iio.imwrite("<bytes>", image, extension=".png"), sync=False)


def _is_whole(path: Path) -> bool:
    """Return whether a PNG is there to its end, which after a power cut its name alone does not say."""
    return path.exists() and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def make_cohort(
    folder: str | os.PathLike,
    *,
    num_subjects: int = 354,
    image_size: int = 256,
    num_slices: int = 32,
    seed: int = 0,
    num_workers: int = 2,
    progress: bool = True,
) -> Path:
    """Write a phantom cohort in the OASIS slice layout; do nothing if this very cohort is there.

    Subject i depends on seed, i, image_size and num_slices only. The cohort grows in `<folder>.partial`, which a later
    call with the same parameters continues, and gets its name when it is complete.

    Args:
        folder: where `keras_png_slices_{train,validate,test}/case_NNN_slice_K.nii.png` and `cohort.json` go.
        num_subjects: at least 6; shared out by `split_cases`.
        image_size: pixels on a side of the 256 mm field of view, at least 16.
        num_slices: axial slices of each subject, at least 1, from inferior to superior.
        seed: at least 0; another seed gives other people.
        num_workers: processes; 1 works in this one. With more, a script needs the usual `if __name__ == "__main__":`.
        progress: whether to show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: a number is too small.
        FileExistsError: the folder holds something else.
    """
    splits = split_cases(num_subjects)
    names, values = ("image_size", "num_slices", "seed", "num_workers"), (image_size, num_slices, seed, num_workers)
    for name, value, least in zip(names, values, (16, 1, 0, 1), strict=True):
        if value < least:
            raise ValueError(f"{name} must be at least {least}. Received: {value}.")
    parameters = {
        "format_version": FORMAT_VERSION, "num_subjects": num_subjects, "image_size": image_size,
        "num_slices": num_slices, "seed": seed,
    }  # fmt: skip
    folder = Path(folder)

    def fill() -> None:
        parts = [f"keras_png_slices_{split}" for split in splits]
        partial = start_or_continue(folder, "cohort.json", parameters, parts)
        tasks = []
        for split, cases in splits.items():
            for case in cases:
                stem = partial / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_"
                paths = [Path(f"{stem}{number}.nii.png") for number in range(num_slices)]
                if not all(map(_is_whole, paths)):
                    tasks.append((paths, seed, case - 1, image_size))
        with tqdm(desc="phantom cohort", unit="subject", total=num_subjects, disable=not progress) as bar:
            bar.update(num_subjects - len(tasks))
            for _ in run_tasks(_write_subject, tasks, min(num_workers, len(tasks)), warm_up=load_template):
                bar.update()
        finish(partial, folder)

    return make_once(folder, "A phantom cohort", "cohort.json", parameters, fill)


def find_or_make_slices(image_size: int) -> SliceIndex:
    """List the slices of the data folder that `OASIS_VQ_DATA` names; without one, of a phantom cohort made for it.

    `OASIS_VQ_LIMIT_TRAIN` limits the training subjects of a data folder.

    Args:
        image_size: of the phantom slices, in pixels. The cohort has 24 subjects in the quick profile, 354 in the full.
    """
    paths = Paths()
    if paths.data:
        return find_slices(paths.data, limit_train=limit_train())
    num_subjects = 24 if profile() == "quick" else 354
    folder = paths.phantom / f"phantom{image_size}-{num_subjects}"
    return find_slices(make_cohort(folder, num_subjects=num_subjects, image_size=image_size))
