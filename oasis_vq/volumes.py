"""Brain volumes: tell them by their files, read them, find the brain, and cut planes through it.

World axes are x to the right of the subject, y forward, z up, in mm, as the affine of a volume says. Axial images have
anterior up and the subject's left on the left, as the OASIS PNGs; coronal images superior up and left on the left;
sagittal images superior up and anterior on the right. Slices are numbered from inferior, posterior and left.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from oasis_vq.config import Config

PLANES = {  # the world axis across the planes; the axes down the rows and along the columns, and their directions
    "axial": (2, (1, -1), (0, 1)),
    "coronal": (1, (2, -1), (0, 1)),
    "sagittal": (0, (2, -1), (1, 1)),
}
# Shares of the brain's extent. Axial: from the lower temporal lobe and cerebellum to somewhat below the vertex.
SLICE_RANGES = {"axial": (0.275, 0.96), "coronal": (0.1, 0.9), "sagittal": (0.15, 0.85)}
LARGEST_BRAIN = 2.5e6  # mm³; a foreground larger than that is a head
_VOLUME_NAME = re.compile(r"(.+)(\.nii\.gz|\.nii|\.hdr|\.img)", re.IGNORECASE)
MASK_WORDS = ("brain", "dlicv", "dlmuse", "mask", "seg")  # <volume>_<something with one of these> is its mask
_PART = re.compile(r"lesion|tumou?r|wmh|stroke|brain_?stem", re.IGNORECASE)  # no whole brain, whatever else it says
_LABEL_FOLDER = re.compile(r"labels?(?:tr|ts)?|masks?|seg(?:mentation)?s?", re.IGNORECASE)  # holds nothing else
_LABELS_WORD = re.compile(r"label|mask|seg|annot", re.IGNORECASE)  # in a folder's name
SMALLEST_MASK = 0.05  # of what is not background: less is no brain
LONGEST_HEADER = 540  # bytes, of NIfTI-2
_BIDS_NAME = re.compile(r"((?:.*/)?sub-[^/]+?)(?:_desc-([^_/]+))?_([A-Za-z0-9]+)")  # what it shows, how, and the kind
_T1 = re.compile(r"T1(?!\d)|(?<![A-Za-z])(?:3d)?t1(?!\d)|(?i:mp-?rage)")  # also in MT1 and sT1W, not in subject1
_OTHER_T1 = re.compile(r"t1(?:c|ce|gd)(?![a-z])|_ce-|t1map|t1rho|dividedby", re.IGNORECASE)  # contrast agents, maps
_TO_T1 = re.compile(r"(?:ses|space|from|to)-[^_]+|_(?:to|in|reg)_?t1[^_]*", re.IGNORECASE)  # says not what is shown
_SINGLE = (nib.Nifti1Image, nib.Nifti2Image)
_PAIRS = (nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm2AnalyzeImage)


@dataclass(frozen=True, kw_only=True)
class SliceGeometry(Config):
    """Which planes are cut, and how large their images are."""

    image_size: int = 256
    """Height and width of the images in pixels."""
    field_of_view: float = 256.0
    """Height and width of the images in mm; in their middle is the brain's centre of mass."""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """Orientation of the slices."""
    num_slices: int = 32
    """Slices of each subject, evenly spread over `slice_range`."""
    slice_range: tuple[float, float] | None = None
    """First and last slice, as shares of the brain's extent across the planes; None for `SLICE_RANGES[plane]`."""

    def __post_init__(self):
        self._require(self.image_size >= 16, "image_size is at least 16 pixels", self.image_size)
        self._require(self.field_of_view > 0, "field_of_view is above 0 mm", self.field_of_view)
        self._require(self.plane in PLANES, f"plane is one of {', '.join(PLANES)}", self.plane)
        self._require(self.num_slices >= 1, "num_slices is at least 1", self.num_slices)
        if self.slice_range is None:
            object.__setattr__(self, "slice_range", SLICE_RANGES[self.plane])  # the way into a frozen dataclass
        low, high = self.slice_range
        self._require(0 <= low < high <= 1, "slice_range rises within 0 and 1", self.slice_range)


class SourceFile(NamedTuple):
    """A file of the source, on disk or in an archive."""

    label: str  # path below the source; of a member "disc1.tar.gz:disc1/OAS1_0001_MR1/..."
    path: str  # on disk, or the member's name
    archive: Path | None
    size: int | None  # in bytes; None for a link to a file that is not there
    modified: int | None  # when it was changed last, in ns; of a member when the archive was
    shape: tuple[int, ...] | None = None  # as `read_shape` says


def split_label(label: str) -> list[str]:
    """Return the names of the archive and the folders that a file is in, from the outermost, and its own."""
    return re.split(r"(?:\.tar\.gz|\.tgz|\.tar):|/", label, flags=re.IGNORECASE)


def pair_files(files: Iterable[SourceFile]) -> tuple[dict[str, list[tuple[SourceFile, ...]]], list[str]]:
    """Find volumes among files by their names and the headers' shapes.

    Returns:
        volumes: by their label without suffix, those with T1 in the file's name first, of these those that look like
            masks, made of another volume, maps or of a contrast agent last, else by name. Of each the volume and then
            its masks, those that are the whole brain first, and of these the files: one, or header and image.
        odd: labels, with the reason, of what is none: another half is missing, it has not three axes, or its folder is
            one of label maps.
    """
    parts: dict[str, dict[str, SourceFile]] = {}
    for file in files:
        if match := _VOLUME_NAME.fullmatch(file.label):
            parts.setdefault(match[1], {})[match[2].lower()] = file
    whole, odd = {}, []
    for stem, found in sorted(parts.items()):
        single = found.get(".nii.gz") or found.get(".nii")
        first, *_ = volume = (single,) if single else tuple(found[suffix] for suffix in sorted(found))  # .hdr, .img
        if not single and len(volume) < 2:
            odd.append(f"{first.label} (its other half is missing, .hdr or .img)")
        elif first.shape and len(first.shape) != 3:
            odd.append(f"{first.label} (its shape is {first.shape})")
        elif _LABEL_FOLDER.fullmatch(split_label(f"/{stem}")[-2]):
            odd.append(f"{first.label} (its folder's name says label maps)")
        else:
            whole[stem] = volume

    paths = {stem: split_label(stem) for stem in whole}
    places = set(map(tuple, paths.values()))

    def is_derived(stem: str) -> bool:
        """Whether it is called c1sub-01_T1w beside or below sub-01_T1w; 11_T1 beside 1_T1 is of another person."""
        *folders, name = paths[stem]
        above = [folders[:depth] for depth in range(len(folders) + 1)]
        endings = [name[cut:] for cut in range(1, len(name)) if any(map(str.isalpha, name[:cut]))]
        return any((*folder, ending) in places for folder in above for ending in endings)

    def preference(stem: str) -> tuple:
        *folders, name = paths[stem]
        shown = _TO_T1.sub("", name)
        count = len(_T1.findall(shown))  # SUBJECT1_T1 has two, SUBJECT1_FLAIR one
        is_mask = bool(_PART.search(name)) or any(word in name.lower() for word in MASK_WORDS)
        among_labels = any(map(_LABELS_WORD.search, folders))
        return not count, is_mask or among_labels, is_derived(stem), bool(_OTHER_T1.search(shown)), -count, name, stem

    masks_of = _find_masks(whole)
    return {stem: [whole[name] for name in (stem, *masks_of[stem])] for stem in sorted(masks_of, key=preference)}, odd


def _find_masks(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the masks of each volume; a mask whose volume is not there is a volume.

    Args:
        names: paths without suffix. `<volume>_<...>` with one of `MASK_WORDS` in the ending is a mask, and in BIDS
            `sub-01_mask` or `sub-01_desc-brain_mask` is that of all `sub-01_<kind>` and `sub-01_desc-<...>_<kind>`;
            none is one of a part, such as a lesion.
    """
    names = sorted(names)
    masks_of: dict[str, list[str]] = {name: [] for name in names}
    bids = {name: match.groups() for name in names if (match := _BIDS_NAME.fullmatch(name))}
    shown: dict[str, list[str]] = {}
    for name, (entities, _, kind) in bids.items():
        if kind != "mask":
            shown.setdefault(entities, []).append(name)
    masks = set()
    for name in names:
        cuts = [match.start() for match in re.finditer("_(?!.*/)", name)]  # in the file's name
        owners = [name[:cut] for cut in cuts if _mask_rank(name[cut:]) is not None]
        owners = [owner for owner in owners if owner in masks_of][:1]
        entities, description, kind = bids.get(name, (None, None, None))
        for owner in owners or (shown.get(entities, []) if kind == "mask" and description in (None, "brain") else []):
            masks_of[owner].append(name)
            masks.add(name)

    return {
        name: sorted(found, key=lambda mask, owner=name: _mask_rank(mask.removeprefix(owner)) or 0)
        for name, found in masks_of.items()
        if name not in masks
    }


def _mask_rank(ending: str) -> int | None:
    """Return the place among `MASK_WORDS` of the first in the ending of a mask's name, or None if it is no mask."""
    ranks = (rank for rank, word in enumerate(MASK_WORDS) if word in ending.lower())
    return None if _PART.search(ending) else next(ranks, None)


def read_shape(stream: BinaryIO) -> tuple[int, ...] | None:
    """Return the shape that a header tells, without axes of 1 after the third; None if the file begins with no header.

    Args:
        stream: a NIfTI file, or the header of a NIfTI or ANALYZE pair; gzipped or not. Only its start is read.
    """
    try:
        is_gzipped = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        start = (gzip.GzipFile(fileobj=stream) if is_gzipped else stream).read(LONGEST_HEADER)
    except (OSError, EOFError, zlib.error):
        return None
    kind = _find_kind(start, _SINGLE + _PAIRS)
    if kind is None:
        return None
    shape = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False).get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _find_kind(start: bytes, kinds: tuple[type, ...]) -> type | None:
    return next((kind for kind in kinds if kind.header_class.may_contain_header(start)), None)


def read_volume(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume and turn its axes to the nearest world axes; nothing is resampled.

    Args:
        contents: of a NIfTI file, or of the header and the image of a NIfTI or ANALYZE pair; gzipped or not.

    Returns:
        volume: (x, y, z), float32, with 0 for NaN and infinities.
        affine: (4, 4), from voxels to mm. ANALYZE knows no origin: 0 is the middle of the volume.

    Raises:
        ValueError: it is no volume. A damaged one also raises what nibabel, gzip and NumPy do.
    """
    contents = [gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content for content in contents]
    kind = _find_kind(contents[0], _SINGLE if len(contents) == 1 else _PAIRS)
    if kind is None:
        raise ValueError("neither NIfTI nor ANALYZE")
    parts = {"image": contents[-1], "header": contents[0], "mat": b""}  # SPM keeps a matrix beside ANALYZE files
    image = kind.from_file_map({name: nib.FileHolder(fileobj=io.BytesIO(part)) for name, part in parts.items()})
    shape, affine = image.shape[:3], image.affine
    if len(shape) < 3 or np.prod(image.shape[3:]) != 1:
        raise ValueError(f"its shape is {image.shape}, a volume has three axes")
    if kind is nib.Spm2AnalyzeImage:
        # nibabel takes every ANALYZE volume for transverse, x to the left, as those of OASIS-1 are. The header may
        # say coronal (1) or sagittal (2): so does 4dfptoanalyze, the converter of the laboratory that made OASIS-1.
        axes = {b"\1": "LSA", b"\2": "ASL"}.get(bytes(image.header["orient"]), "LAS")
        affine = np.eye(4)
        for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(axes)):
            affine[:3, axis] = sign * image.header.get_zooms()[axis] * np.eye(3)[int(world)]
        affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    turn = nib.io_orientation(affine)
    volume = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    volume = np.nan_to_num(nib.apply_orientation(volume, turn), nan=0, posinf=0, neginf=0)
    return volume, affine @ nib.orientations.inv_ornt_aff(turn, shape)


def read_mask(contents: list[bytes], affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return where labels are above 0, as bool of a volume's shape: at each of its voxels the nearest label.

    Args:
        contents: of the labels' files, as `read_volume` takes them.
        affine: (4, 4), of the volume, from its voxels to mm.
        shape: of the volume.
    """
    labels, labels_affine = read_volume(contents)
    matrix = np.linalg.inv(labels_affine) @ affine  # from voxels of the volume to voxels of the labels
    return ndimage.affine_transform(labels > 0, matrix, output_shape=shape, order=0, mode="grid-constant")


def find_brain(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return where the brain is in a volume without a mask, as bool (x, y, z), and whether the skull is there as well.

    A background of zeros is what skull-stripping leaves. Without one, what is brighter than Otsu's threshold counts.

    Raises:
        ValueError: all values are the same.
    """
    if volume.min() == volume.max():
        raise ValueError(f"it is empty: all its values are {volume.min():g}")
    magnitude = np.abs(volume)  # a volume that was standardised has values below 0 in the brain
    bright = np.percentile(magnitude[magnitude > 0], 99.5)
    if np.mean(magnitude == 0) > 0.25:
        found = ndimage.binary_fill_holes(magnitude > 0.01 * bright)  # not the traces that interpolation leaves outside
        return found, bool(found.sum() * abs(np.linalg.det(affine)) > LARGEST_BRAIN)
    from skimage.filters import threshold_otsu  # here, not above: few volumes need it

    return magnitude > threshold_otsu(np.minimum(magnitude, bright)), True


def require_brain(mask: np.ndarray, volume: np.ndarray, affine: np.ndarray) -> None:
    """Raise ValueError if a mask (x, y, z) is no brain in a volume."""
    if mask.sum() < SMALLEST_MASK * find_brain(volume, affine)[0].sum():
        share = f"{mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000:.3g} cm³"
        raise ValueError(f"the mask is no brain, {share} of a head" if mask.any() else "the mask is empty")


def cut_slices(
    volume: np.ndarray, affine: np.ndarray, geometry: SliceGeometry, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Cut planes through a brain and scale its intensities: 0.5 % of the brain's voxels are brighter than white.

    Where the pixels are as large as the voxels, and parallel to them, they are voxels: positions move to the nearest
    one. Else values are interpolated linearly between voxels, and averaged where a pixel is larger than a voxel.

    Args:
        volume: (x, y, z), float32, its axes turned to the nearest world axes.
        affine: (4, 4), from voxels to mm.
        geometry: which planes, how large.
        mask: (x, y, z), bool, the brain; all else becomes black. Without one `find_brain` looks for it.

    Returns:
        images: (num_slices, image_size, image_size), uint8.
        positions: (num_slices,), mm along the world axis across the planes.
        has_skull: whether more than the brain is shown, for want of a mask.

    Raises:
        ValueError: there is no brain, or no contrast in it.
    """
    brain, has_skull = find_brain(volume, affine) if mask is None else (mask, False)
    low, high = np.percentile(volume[brain], (0.5, 99.5)).tolist()
    low = min(low, 0.0)  # black is 0, except where the brain has values below
    if high <= low:
        raise ValueError(f"it has no contrast: 99.5 % of the brain are not above {low:g}")
    image = np.clip((volume - low) / (high - low), 0, 1)
    if not has_skull:
        image *= brain

    voxel = np.linalg.norm(affine[:3, :3], axis=0)  # mm
    indices = np.ogrid[tuple(map(slice, volume.shape))]

    def brain_positions(axis: int) -> np.ndarray:
        return (sum(affine[axis, i] * indices[i] for i in range(3)) + affine[axis, 3])[brain]

    def on_voxels(position: np.ndarray | float, axis: int) -> np.ndarray | float:
        first = affine[axis, 3]
        # Not 0.5: a tie must not be decided by the origin's rounding errors, which another stored orientation has not.
        return first + np.floor((position - first) / voxel[axis] + 0.501) * voxel[axis]

    across, *in_plane = PLANES[geometry.plane]
    extent = np.percentile(brain_positions(across), (0.1, 99.9))  # a few stray voxels do not count
    shares = np.linspace(*geometry.slice_range, geometry.num_slices)
    if geometry.num_slices == 1:
        shares = np.mean(geometry.slice_range, keepdims=True)
    positions = np.interp(shares, (0, 1), extent)
    if geometry.num_slices == 1 or positions[1] - positions[0] >= voxel[across]:  # else some would be cut twice
        positions = on_voxels(positions, across)

    pixel = geometry.field_of_view / geometry.image_size
    points = max(1, int(np.ceil(pixel / min(voxel[axis] for axis, _ in in_plane) - 0.1)))  # on a pixel's side
    num_points = geometry.image_size * points
    directions, start = np.zeros((3, 3)), np.zeros(3)
    for column, (axis, sign) in enumerate(in_plane, start=1):
        directions[axis, column] = sign * pixel / points
        half = sign * pixel / points * (num_points - 1) / 2
        start[axis] = on_voxels(brain_positions(axis).mean() - half, axis)
    inverse = np.linalg.inv(affine)
    images = np.empty((geometry.num_slices, geometry.image_size, geometry.image_size), np.uint8)
    for number, start[across] in enumerate(positions):
        plane = ndimage.affine_transform(
            image,
            np.round(inverse[:3, :3] @ directions, 6),  # so that affines in float32 give whole numbers as well
            np.round(inverse[:3, :3] @ start + inverse[:3, 3], 6),
            output_shape=(1, num_points, num_points), order=1, mode="grid-constant",
        )  # fmt: skip
        blocks = plane.reshape(geometry.image_size, points, geometry.image_size, points)
        images[number] = np.rint(255 * blocks.mean((1, 3)))
    return images, positions, has_skull
