"""Volumes become slices: which way up, how bright, whose, in which split; and the same files however they were made."""

import csv
import dataclasses
import gzip
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from oasis_vq import ingest
from oasis_vq.ingest import prepare
from oasis_vq.subjects import SUBJECT_PATTERN, split_subjects
from oasis_vq.volumes import SliceGeometry, cut_slices, read_volume
from oasis_vq.workers import finish, read_record, run_tasks

ROOT = Path(ingest.__file__).parents[1]
REAL_VOLUMES = Path(os.environ.get("OASIS_VQ_REAL_VOLUMES") or ROOT / "data" / "ixi_nifti")
AFFINE = np.array([[4.0, 0, 0, -70], [0, 4.0, 0, -90], [0, 0, 4.0, -60], [0, 0, 0, 1]])
SMALL = SliceGeometry(image_size=32, num_slices=6)


def brain(shape=(36, 44, 32), seed=0):
    """An ellipsoid of 60 to 100 with balls: 200 at the left, 160 at the front, 130 at the top; (x, y, z) in RAS."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    volume = 80 + 20 * np.clip(texture / texture.std() / 2, -1, 1)
    for centre, value in (((-0.45, 0, 0), 200), ((0, 0.5, 0), 160), ((0, 0, 0.5), 130)):
        volume[sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < 0.04] = value
    return np.where(sum((axis / 0.8) ** 2 for axis in axes) < 1, volume, 0).astype(np.float32)


def stored(volume, affine, axes):
    """The same volume with its axes in another order and direction, such as "PSR"."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    turned = nib.apply_orientation(volume, turn)
    return np.ascontiguousarray(turned), affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)


def write_nifti(path, volume, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, affine), path)


def write_analyze(path, volume, orient=b"\0"):
    """Write what OASIS-1 holds: big-endian int16 with a fourth axis of 1; `volume` as it is stored, x to the left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nib.AnalyzeHeader(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape((*volume.shape, 1))
    header.set_zooms((4, 4, 4, 1))
    header["orient"] = orient
    path.with_suffix(".hdr").write_bytes(header.binaryblock)
    path.with_suffix(".img").write_bytes(volume.astype(">i2").tobytes(order="F"))


def write_disc(folder, cases):
    """Write people as an OASIS-1 disc has them: what is to be read, and what is not, here of no use to anybody."""
    for case in cases:
        for session in ("MR1", "MR2"):
            name = f"OAS1_{case:04d}_{session}"
            root = folder / "disc1" / name
            atlas = root / "PROCESSED" / "MPRAGE" / "T88_111"
            scan = brain(seed=case)[::-1] if session == "MR1" else np.ones((8, 8, 8))
            write_analyze(atlas / f"{name}_mpr_n{3 + case % 2}_anon_111_t88_masked_gfc.hdr", 10 * scan)
            (root / f"{name}.txt").write_text(
                f"SESSION ID:   {name}\n\nAGE:          {70 + case % 9}\nM/F:          Female\nHAND:         Right\n"
                f"CDR:          {'0.5' if case % 2 else ''}\nMMSE:         29\n"
            )
            decoys = (
                atlas / f"{name}_mpr_n4_anon_111_t88_gfc.hdr",
                root / "PROCESSED" / "MPRAGE" / "SUBJ_111" / f"{name}_mpr_n4_anon_sbj_111.hdr",
                root / "RAW" / f"{name}_mpr-1_anon.hdr",
                root / "FSL_SEG" / f"{name}_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr",
            )
            for decoy in decoys:
                write_analyze(decoy, np.ones((8, 8, 8)))
            (root / "RAW" / f"{name}_mpr-1_anon_sag_66.gif").write_bytes(b"GIF89a")
            (root / "RAW" / f"._{name}_mpr_n4_anon_111_t88_masked_gfc.hdr").write_bytes(b"of a Mac")
    return folder


def write_people(folder, num=3):
    """Write NIfTI volumes of IXI001, IXI002 and so on; each file stands a little off the others' grid."""
    for number in range(1, num + 1):
        affine = AFFINE + np.array([[0, 0, 0, number / 3]] * 3 + [[0] * 4])
        write_nifti(folder / f"IXI{number:03d}-HH-T1.nii.gz", brain(seed=number), affine)
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "disc1", arcname="disc1")
    return archive


def read_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def slices_of(folder):
    return {name: content for name, content in read_bytes(folder).items() if name.endswith(".png")}


def manifest(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def quickly(source, folder, geometry=SMALL, **options):
    return prepare(source, folder, geometry, **{"num_workers": 1, "progress": False, **options})


def place_of(image, value):
    """Row and column of the ball that had this value, if the image shows it; 200 is white."""
    rows, columns = np.nonzero(np.abs(image / 255.0 - value / 200) < 0.03)
    return (rows.mean(), columns.mean()) if len(rows) > 3 else None


def test_each_plane_is_seen_from_its_canonical_side():
    middle = 15.5

    def balls(plane):
        images, positions, has_skull = cut_slices(brain(), AFFINE, SliceGeometry(image_size=32, plane=plane))
        assert np.all(np.diff(positions) >= 0) and not has_skull
        shown = {value: [place_of(image, value) for image in images] for value in (200, 160, 130)}
        numbers = {value: np.mean([k for k, at in enumerate(found) if at]) for value, found in shown.items()}
        return numbers, {v: np.mean([at for at in found if at], axis=0) - middle for v, found in shown.items()}

    (numbers, places) = balls("axial")
    assert places[160][0] < -3 and abs(places[160][1]) < 2  # front: up
    assert places[200][1] < -3 and abs(places[200][0]) < 2  # left: on the left
    assert numbers[130] > numbers[200] + 5  # the top comes last
    (numbers, places) = balls("coronal")
    assert places[130][0] < -2 and abs(places[130][1]) < 2  # top: up
    assert places[200][1] < -3 and abs(places[200][0]) < 2  # left: on the left
    assert numbers[160] > numbers[200] + 5  # the front comes last
    (numbers, places) = balls("sagittal")
    assert places[130][0] < -2 and abs(places[130][1]) < 2  # top: up
    assert places[160][1] > 3 and abs(places[160][0]) < 2  # front: on the right
    assert numbers[200] < numbers[160] - 5  # the left comes first


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("sizes, image_size", [((3.9, 4.1, 4.4), 24), ((0.7, 0.7, 0.7), 25)])
def test_all_48_stored_orientations_give_the_same_slices(plane, sizes, image_size):
    """Voxels off the pixels; and voxels as large as pixels, whose middle lies between two voxels."""
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -31.3, -41.9, -17.7
    field_of_view = 256.0 if image_size == 24 else 25 * 0.7
    geometry = SliceGeometry(image_size=image_size, field_of_view=field_of_view, num_slices=5, plane=plane)
    expected, *_ = cut_slices(brain(), affine, geometry)
    assert expected.max() > 200
    orders = itertools.permutations(("RL", "AP", "SI"))
    codes = ["".join(code) for order in orders for code in itertools.product(*order)]
    assert len(set(codes)) == 48
    for code in codes:
        content = nib.Nifti1Image(*stored(brain(), affine, code)).to_bytes()
        images, *_ = cut_slices(*read_volume([content]), geometry)
        np.testing.assert_array_equal(images, expected, err_msg=code)


def test_oblique_volume_is_turned_by_its_affine():
    turn = np.eye(4)
    turn[:3, :3] = nib.eulerangles.euler2mat(0.3, -0.2, 0.25)  # 12 to 17 degrees about each axis
    oblique = turn @ np.array([[2.0, 0, 0, -90], [0, 2.0, 0, -110], [0, 0, 2.0, -80], [0, 0, 0, 1]])
    world = [oblique[i, :3] @ np.indices((90, 110, 80)).reshape(3, -1) + oblique[i, 3] for i in range(3)]
    smooth = ndimage.gaussian_filter(brain(), 1.0)
    places = [(axis - AFFINE[i, 3]) / 4 for i, axis in enumerate(world)]
    turned = ndimage.map_coordinates(smooth, places, order=1).reshape(90, 110, 80)
    images, positions, _ = cut_slices(turned, oblique, SMALL)
    expected, expected_positions, _ = cut_slices(smooth, AFFINE, SMALL)
    assert np.abs(positions - expected_positions).max() < 5
    shown = images[2:4] > 0
    assert np.abs(images[2:4].astype(float) - expected[2:4])[shown].mean() < 5
    assert np.abs(images[2:4].astype(float) - expected[2:4, :, ::-1])[shown].mean() > 12  # the wrong way round


@pytest.mark.parametrize("orient, axes", [(b"\0", "LAS"), (b"\1", "LSA"), (b"\2", "ASL"), (b" ", "LAS")])
def test_analyze_header_says_how_the_volume_lies(tmp_path, orient, axes):
    centred = AFFINE.copy()
    centred[:3, 3] = -4 * (np.array(brain().shape) - 1) / 2
    write_analyze(tmp_path / "volume.hdr", stored(brain(), centred, axes)[0], orient)
    volume, affine = read_volume([(tmp_path / f"volume{suffix}").read_bytes() for suffix in (".hdr", ".img")])
    np.testing.assert_array_equal(affine, centred)
    np.testing.assert_array_equal(volume, np.trunc(brain()))


def test_pixels_as_large_as_voxels_are_voxels():
    volume, geometry = brain(), SliceGeometry(image_size=64, num_slices=5)  # 4 mm
    images, positions, _ = cut_slices(volume, AFFINE, geometry)
    planes = np.round((positions + 60) / 4).astype(int)
    np.testing.assert_allclose(planes, (positions + 60) / 4)
    white = np.percentile(volume[volume > 0], 99.5)
    for image, plane in zip(images, planes, strict=True):
        expected = np.rint(255 * np.clip(volume[:, ::-1, plane].T / white, 0, 1))  # rows from front to back
        rows, columns = np.nonzero(expected)
        top, left = (np.nonzero(image)[axis].min() for axis in (0, 1))
        shifted = image[rows - rows.min() + top, columns - columns.min() + left]
        assert np.abs(shifted - expected[rows, columns]).max() <= 1  # float32
        assert np.count_nonzero(image) == len(rows)


def test_pixels_larger_than_voxels_are_averages():
    volume = np.where(np.indices((64, 64, 8)).sum(0) % 2, 200, 100).astype(np.float32)  # as fine as can be
    volume[:8], volume[-8:], volume[:, :8], volume[:, -8:] = 0, 0, 0, 0
    images, *_ = cut_slices(volume, np.eye(4), SliceGeometry(image_size=16, field_of_view=64, num_slices=2))
    inside = ndimage.binary_erosion(images > 0, np.ones((1, 3, 3)))
    assert inside.sum() > 100
    assert np.all(np.abs(images[inside] - 191.0) <= 1)


def test_outliers_and_missing_values_do_not_set_the_scale():
    volume = brain()
    expected, *_ = cut_slices(volume, AFFINE, SMALL)
    for value in (1e7, -1e7, np.nan, np.inf):
        spoiled = volume.copy()
        spoiled[12:14, 20, 20] = value
        images, *_ = cut_slices(*read_volume([nib.Nifti1Image(spoiled, AFFINE).to_bytes()]), SMALL)
        assert (np.abs(images.astype(int) - expected) > 2).sum() < 30
    far, *_ = cut_slices(np.where(volume > 0, volume + 3000, 0).astype(np.float32), AFFINE, SMALL)
    assert np.all(far[expected > 100] > 200)  # black is 0, not the darkest tissue
    standardised = np.where(volume > 0, (volume - 90) / 25, 0).astype(np.float32)
    images, *_ = cut_slices(standardised, AFFINE, SMALL)
    assert np.all(images[expected == 0] == 0) and np.all(images[expected > 180] > 140)


def test_slice_range_count_and_field_of_view():
    both, *_ = cut_slices(brain(), AFFINE, SliceGeometry(image_size=32, num_slices=9, slice_range=(0.0, 1.0)))
    areas = (both > 0).sum((1, 2))
    assert areas.argmax() in (3, 4, 5) and areas[0] < 0.3 * areas[4] and areas[8] < 0.3 * areas[4] and areas.min() > 0
    single = SliceGeometry(image_size=32, num_slices=1, slice_range=(0.2, 0.8))
    one, (position,), _ = cut_slices(brain(), AFFINE, single)
    assert one.shape == (1, 32, 32) and abs(position - (-60 + 4 * 15.5)) <= 2
    close, *_ = cut_slices(brain(), AFFINE, dataclasses.replace(single, field_of_view=128.0))
    assert 3.5 < (close > 0).sum() / (one > 0).sum() < 4.5
    _, positions, _ = cut_slices(brain(), AFFINE, SliceGeometry(num_slices=60, image_size=32))  # more than there are
    assert len(set(positions)) == 60


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"plane": "transverse"}, "plane is one of axial, coronal, sagittal. Received: transverse."),
        ({"num_slices": 0}, "num_slices is at least 1. Received: 0."),
        ({"slice_range": (0.9, 0.1)}, "slice_range rises within 0 and 1. Received: (0.9, 0.1)."),
        ({"image_size": 8}, "image_size is at least 16 pixels. Received: 8."),
        ({"field_of_view": 0.0}, "field_of_view is above 0 mm. Received: 0.0."),
    ],
)
def test_impossible_geometry_is_refused(wrong, text):
    with pytest.raises(ValueError) as error:
        SliceGeometry(**wrong)
    assert str(error.value) == text


def test_published_split_goes_by_case_and_seeded_by_subject():
    names = [f"OAS1_{case:04d}" for case in (1, 401, 402, 440, 441, 457)]
    published = split_subjects(names, "published")
    assert [published[name] for name in names] == ["train", "train", "validate", "validate", "test", "test"]
    for others in (["OAS1_0001", "OAS1_0458", "OAS1_0003"], ["IXI013", "IXI014", "OAS1_0001"]):
        assert sorted(split_subjects(others, "published").values()) == ["test", "train", "validate"]
    people = [f"IXI{number:03d}" for number in range(354)]
    seeded = split_subjects(people, "seeded", seed=1)
    assert [list(seeded.values()).count(part) for part in ("train", "validate", "test")] == [302, 35, 17]
    assert split_subjects(people[::-1], "seeded", seed=1) == seeded != split_subjects(people, "seeded", seed=2)
    with pytest.raises(ValueError, match=r"at least 3 subjects, one each to .* Received: 2\.$"):
        split_subjects(names[:2], "seeded")


def test_disc_extracted_and_packed_gives_the_same_slices(tmp_path, capsys):
    disc = write_disc(tmp_path / "extracted", (1, 2, 402, 441))
    archive = pack(disc, tmp_path / "oasis_cross-sectional_disc1.tar.gz")
    extracted = quickly(disc, tmp_path / "a")
    packed = quickly(archive, tmp_path / "b", num_workers=2)
    (tmp_path / "discs").mkdir()
    archive.rename(tmp_path / "discs" / archive.name)
    in_folder = quickly(tmp_path / "discs", tmp_path / "c")
    cases = {"train": (1, 2), "validate": (402,), "test": (441,)}
    names = {f"keras_png_slices_{s}/case_{c:03d}_slice_{k}.nii.png" for s in cases for c in cases[s] for k in range(6)}
    assert set(slices_of(extracted)) == names
    assert slices_of(extracted) == slices_of(packed) == slices_of(in_folder)
    assert read_bytes(packed) == read_bytes(in_folder)
    folders = {f"keras_png_slices_{split}" for split in cases}
    assert {path.name for path in extracted.iterdir()} == folders | {"manifest.csv", "prepare.json"}
    image = iio.imread(extracted / "keras_png_slices_validate" / "case_402_slice_3.nii.png")
    volume = np.trunc(10 * brain(seed=402))  # stored from right to left
    np.testing.assert_array_equal(image, cut_slices(volume.astype(np.float32), AFFINE, SMALL)[0][3])
    assert capsys.readouterr().out == ""  # no notes


def test_manifest_says_who_where_and_from_what(tmp_path):
    disc = write_disc(tmp_path / "extracted", (1, 402, 442))
    rows = manifest(quickly(pack(disc, tmp_path / "disc1.tgz"), tmp_path / "out"))
    assert tuple(rows[0]) == ingest.COLUMNS and len(rows) == 18
    assert {row["file"] for row in rows} == set(slices_of(tmp_path / "out"))
    first, other = rows[0], rows[6]
    atlas = "disc1.tgz:disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.img"
    assert (first["split"], first["case"], first["subject"], first["slice"]) == ("train", "1", "OAS1_0001", "0")
    assert (first["source"], first["age"], first["sex"], first["diagnosis"]) == (atlas, "71", "Female", "CDR 0.5")
    assert (other["split"], other["age"], other["diagnosis"]) == ("validate", "76", "")  # not tested
    assert np.all(np.diff([float(row["position_mm"]) for row in rows[:6]]) > 0)


def test_participants_table_of_bids_is_used(tmp_path):
    source = tmp_path / "bids"
    for name in ("sub-01", "sub-02", "sub-A3"):
        write_nifti(source / name / "anat" / f"{name}_T1w.nii.gz", brain())
        write_nifti(source / name / "anat" / f"{name}_FLAIR.nii.gz", np.ones((8, 8, 8), np.float32))
    table = "participant_id\tage\tsex\tgroup\nsub-01\t34\tF\tcontrol\nsub-02\tn/a\tM\tpatient\nA3\t61\tM\tn/a\n"
    (source / "participants.tsv").write_text(table)
    rows = manifest(quickly(source, tmp_path / "out"))[::6]
    found = [",".join(row[key] for key in ("case", "subject", "age", "sex", "diagnosis")) for row in rows]
    assert found == ["1,sub-01,34,F,control", "2,sub-02,,M,patient", "3,sub-A3,61,M,"]
    assert {row["split"] for row in rows} == {"train", "validate", "test"}
    assert all(row["source"].endswith("_T1w.nii.gz") for row in rows)


def test_mask_beside_a_volume_strips_the_skull(tmp_path, capsys):
    inside, rng = brain() > 0, np.random.default_rng(0)
    head = np.where(inside, brain(), 0) + rng.uniform(5, 15, inside.shape).astype(np.float32)
    shell = ndimage.binary_dilation(inside, iterations=3) & ~ndimage.binary_dilation(inside)
    head[shell] = 300
    fine, fine_affine = np.kron(inside, np.ones((2, 2, 2))), AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    fine_affine[:3, 3] -= 1  # mm: the first of two voxels begins where the one began
    for name in ("IXI001", "IXI002", "IXI003"):
        write_nifti(tmp_path / "volumes" / f"{name}_T1.nii.gz", head)
    write_nifti(tmp_path / "volumes" / "IXI001_T1_DLMUSE.nii.gz", (47 * inside).astype(np.uint8))
    turned, turned_affine = stored(fine.astype(np.uint8), fine_affine, "PSR")
    write_nifti(tmp_path / "volumes" / "IXI002_T1_brain_mask.nii.gz", turned, turned_affine)
    folder = quickly(tmp_path / "volumes", tmp_path / "out", SliceGeometry(image_size=64, num_slices=6))
    assert "note: 1 of 3 volumes have no mask beside them: the skull stays, and slices" in capsys.readouterr().out
    images = {}
    for row in manifest(folder):
        images.setdefault(row["subject"], []).append(iio.imread(folder / row["file"]))
    stripped, by_finer_mask, whole = (np.stack(images[name]) for name in ("IXI001", "IXI002", "IXI003"))
    np.testing.assert_array_equal(stripped, by_finer_mask)
    expected, *_ = cut_slices(head, AFFINE, SliceGeometry(image_size=64, num_slices=6), mask=inside)
    np.testing.assert_array_equal(stripped, expected)
    assert np.all(stripped[:, [0, -1]] == 0) and (stripped == 0).mean() > 0.6
    assert (whole > 0).sum() > 1.5 * (stripped > 0).sum()  # the shell and the air's noise
    with tarfile.open(tmp_path / "volumes.tar", "w") as tar:
        tar.add(tmp_path / "volumes", arcname=".")
    packed = quickly(tmp_path / "volumes.tar", tmp_path / "packed", SliceGeometry(image_size=64, num_slices=6))
    assert slices_of(packed) == slices_of(folder)


def test_volumes_of_an_archive_may_share_a_mask(tmp_path):
    inside = (brain() > 85).astype(np.uint8)
    for name in ("sub-01_T1w", "sub-01_T2w", "sub-02_T1w"):
        write_nifti(tmp_path / "volumes" / f"{name}.nii.gz", brain())
    write_nifti(tmp_path / "volumes" / "sub-01_desc-brain_mask.nii.gz", inside)
    expected = slices_of(quickly(tmp_path / "volumes", tmp_path / "out", subject_pattern=".+"))
    assert len(expected) == 18
    names = sorted(path.name for path in (tmp_path / "volumes").iterdir())
    for number, order in enumerate((names, names[::-1])):  # the mask before its volumes, and after them
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in order:
                tar.add(tmp_path / "volumes" / name, arcname=f"volumes/{name}")
        folder = quickly(tmp_path / f"{number}.tar", tmp_path / f"packed{number}", subject_pattern=".+")
        assert slices_of(folder) == expected


def test_one_volume_a_subject_and_the_others_are_named(tmp_path, capsys):
    source = write_people(tmp_path / "volumes", 3)
    write_nifti(source / "later" / "IXI002-HH-T2.nii.gz", np.ones((8, 8, 8), np.float32))
    write_nifti(source / "IXI003-HH-PD.nii", np.ones((8, 8, 8), np.float32))
    rows = manifest(quickly(source, tmp_path / "out"))
    assert len(rows) == 18 and all("-T1" in row["source"] for row in rows)
    note = "note: 2 further volumes of these subjects are left out: later/IXI002-HH-T2.nii.gz, IXI003-HH-PD.nii\n"
    assert capsys.readouterr().out == note
    for number in (1, 2, 3, 10):  # the letters t1 are in subject1
        for kind in ("FLAIR", "T1"):
            write_nifti(tmp_path / "others" / f"subject{number}_{kind}.nii.gz", brain())
    found = who(tmp_path / "others", tmp_path / "others_out", subject_pattern=r"subject\d+")
    assert found == {f"subject{number}": f"subject{number}_T1.nii.gz" for number in (1, 2, 3, 10)}


def test_a_lesion_is_no_brain(tmp_path, capsys):
    source, inside = tmp_path / "volumes", (brain() > 0).astype(np.uint8)
    lesion = (brain() > 190).astype(np.uint8)
    for name in ("sub-01", "sub-02", "sub-03"):
        write_nifti(source / f"{name}_T1w.nii.gz", brain())
        write_nifti(source / f"{name}_desc-lesion_mask.nii.gz", lesion)
        write_nifti(source / f"{name}_T1w_lesion_seg.nii.gz", lesion)
    whole = quickly(source, tmp_path / "whole")
    assert "further volumes of these subjects are left out: sub-01_T1w_lesion_seg" in capsys.readouterr().out
    for name in ("sub-01", "sub-02", "sub-03"):
        write_nifti(source / f"{name}_T1w_fine_seg.nii.gz", lesion)
        write_nifti(source / f"{name}_T1w_mask.nii.gz", inside)
    assert slices_of(quickly(source, tmp_path / "masked")) == slices_of(whole)
    (source / "sub-02_T1w_brainstem_mask.nii.gz").write_bytes((source / "sub-02_desc-lesion_mask.nii.gz").read_bytes())
    assert slices_of(quickly(source, tmp_path / "with_brainstem")) == slices_of(whole)
    for name in ("stroke1", "stroke2", "stroke3"):  # people may be called so
        write_nifti(tmp_path / "patients" / f"{name}_T1.nii.gz", brain() + 5)
        write_nifti(tmp_path / "patients" / f"{name}_T1_brain_mask.nii.gz", inside)
    quickly(tmp_path / "patients", tmp_path / "strokes", subject_pattern=r"stroke\d")
    assert "the skull stays" not in capsys.readouterr().out
    (source / "sub-02_T1w_mask.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=r"^sub-02_T1w_fine_seg\.nii\.gz cannot be used: the mask is no brain, .* cm³ of"
    ):
        quickly(source, tmp_path / "refused")


def who(source, folder, **options):
    """Return the volume taken of each person."""
    return {row["subject"]: row["source"] for row in manifest(quickly(source, folder, **options))}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "people, volumes, best",
    [
        ("OAS2_0001 OAS2_0002 OAS2_0010", "{}_MR1.nii.gz {}_MR2.nii.gz", 0),
        ("OAS2_0001 OAS2_0002 OAS2_0010", "{}_MR1/RAW/mpr-1.nifti.nii {}_MR1/RAW/mpr-2.nifti.nii", 0),
        ("OAS30001 OAS30002 OAS30010", "{}_MR_d0129/anat1/T1w.nii.gz {}_MR_d2000/anat1/T1w.nii.gz", 0),
        ("sub-01 sub-02 sub-A3", "{}/ses-1/anat/T1w.nii.gz {}/anat/{}_T2w.nii.gz", 0),
        ("002_S_0295 002_S_0413 003_S_10001", "ADNI/{}/MPRAGE/I1.nii ADNI/{}/MPRAGE/I2.nii", 0),
        ("BraTS2021_00000 BraTS2021_00002 BraTS2021_01666", "{}/{}_flair.nii.gz {}/{}_seg.nii.gz {}/{}_t1.nii.gz", 2),
        ("BraTS20_Training_001 BraTS20_Training_002 BraTS20_Validation_001", "{}_t1ce.nii {}_t1.nii {}_t2.nii", 1),
        ("BraTS-GLI-00000 BraTS-GLI-00002 BraTS-MEN-00002", "{}-000/{}-000-t1n.nii.gz {}-001/{}-001-t1n.nii.gz", 0),
        ("BraTS-GLI-00003 BraTS-GLI-00004 BraTS-GLI-00005", "{}-000-t1c.nii.gz {}-000-t1n.nii.gz {}-000-t2f.nii.gz", 1),
        ("sub-patient1 sub-patient10 sub-patient2", "{}_FLAIR.nii.gz {}_T1w.nii.gz {}_acq-post1_T2w.nii.gz", 1),
        ("002_S_0295 002_S_0413 003_S_10001", "{}_MR_Axial_T2-FLAIR.nii {}_MR_MT1__N3m.nii {}_MR_PD.nii", 1),
        ("sub-01 sub-02 sub-03", "{}_FLAIR.nii.gz {}_T2w.nii.gz {}_UNIT1.nii.gz", 2),
        ("IXI001 IXI002 IXI003", "{}_FLAIR.nii.gz {}_T1wDividedByT2w.nii.gz {}_WIP_sT1W_3D_TFE.nii.gz", 2),
        ("sub-01 sub-02 sub-03", "{}_T1map.nii.gz {}_T1w.nii.gz {}_T1w_T1lesion.nii.gz", 1),
        ("IXI001 IXI002 IXI003", "{}_FLAIR_to_T1.nii.gz {}_T1.nii.gz {}_T1_lesion_T1space.nii.gz", 1),
        ("002_S_0295 002_S_0413 003_S_10001", "sub-{}_T1w.nii", 0),
        ("002_S_0295 002_S_0413 003_S_10001", "{}_MR_Axial_T2.nii {}_MR_MPRAGE.nii {}_MR_PD.nii", 1),
        ("sub-01 sub-02 sub-03", "{}_ses-t1_FLAIR.nii.gz {}_ses-t1_acq-3DT1_run-1.nii.gz", 1),
        ("Brats18_2013_2 Brats18_CBICA_AAB Brats18_TCIA01_131", "{}_1/{}_1_flair.nii.gz {}_1/{}_1_t2.nii.gz", 0),
        ("sub-01 sub-02 sub-03", "{}/c1{}_T1w.nii {}/mri/mwp1{}_T1w.nii {}/y_{}_T1w.nii {}/{}_T1w.nii", 3),  # SPM
        ("sub-01 sub-02 sub-03", "BiasField_{}_T1w.nii.gz atropos_{}_T1w.nii.gz {}_T1w.nii.gz", 2),  # ANTs
        ("IXI001 IXI002 IXI003", "A_{}.nii out/BF{}.nii {}.nii", 2),
        ("sub-01 sub-02 sub-03", "labelsTr/{}.nii.gz imagesTr/{}_0000.nii.gz", 1),  # nnU-Net
        ("IXI001 IXI002 IXI003", "Masks/{}.nii.gz raw/{}.nii.gz", 1),
        ("sub-01 sub-02 sub-03", "scan_labels/{}/{}_T1w.nii.gz scans/{}/{}_T1w.nii.gz", 1),
    ],
)
def test_people_are_told_apart_by_file_or_folder(tmp_path, packed, people, volumes, best):
    source = tmp_path / "disc1"
    for name in people.split():
        for path in volumes.split():
            write_nifti(source / path.replace("{}", name), brain())
    found = who(pack(tmp_path, tmp_path / "all.tar.gz") if packed else source, tmp_path / "out")
    assert [(name, path.removeprefix("all.tar.gz:disc1/")) for name, path in found.items()] == [
        (name, volumes.split()[best].replace("{}", name)) for name in people.split()
    ]


@pytest.mark.parametrize("volumes, pattern", [("c1{}_t1.nii {}_t1.nii", r"subj\d"), ("{}_T1.nii {}_T1ce.nii", r"\d+")])
def test_what_was_made_of_a_volume_comes_after_it(tmp_path, volumes, pattern):
    """A file's name ends with that of what it was made of; but 11 was not made of 1."""
    people, source = ("subj1", "subj2", "subj3") if "subj" in pattern else ("1", "11", "111"), tmp_path / "volumes"
    for name in people:
        for path in volumes.split():
            write_nifti(source / path.replace("{}", name), brain())
    (source / "1_T1ce.nii").unlink(missing_ok=True)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in source.iterdir():
            tar.add(path, arcname=path.name)
    best = "{}_t1.nii" if "subj" in pattern else "{}_T1.nii"
    found = who(source, tmp_path / "out", subject_pattern=pattern)
    assert found == {name: best.replace("{}", name) for name in people}
    found = who(tmp_path / "all.tar", tmp_path / "packed", subject_pattern=pattern)
    assert found == {name: f"all.tar:{best.replace('{}', name)}" for name in people}


def test_volumes_of_unknown_people_are_refused(tmp_path):
    source = tmp_path / "volumes"
    for number in (1, 2, 3):
        for kind in ("T1", "T2", "FLAIR"):
            write_nifti(source / f"subj{number}" / f"{kind}.nii.gz", brain())
    text = (
        r"^Nothing says who is shown in 9 of 9 volumes, such as subj1/T1\.nii\.gz, .*--subject-pattern .*subj.d\+.*\.\+"
    )
    with pytest.raises(ValueError, match=text):
        quickly(source, tmp_path / "out")
    found = who(source, tmp_path / "people", subject_pattern=r"subj\d")
    assert found == {f"subj{number}": f"subj{number}/T1.nii.gz" for number in (1, 2, 3)}
    assert set(who(source, tmp_path / "files", subject_pattern=".+")) == {"T1", "T2", "FLAIR"}
    write_nifti(source / "mine.nii.gz", brain())
    for pattern in (r"subj\d", r"(?:subj\d)?"):  # no match, and one of nothing
        with pytest.raises(ValueError, match=r"in 1 of 10 volumes, such as mine\.nii\.gz; .* Received: .*subj"):
            quickly(source, tmp_path / "out", subject_pattern=pattern)
    with pytest.raises(ValueError, match=r"^subject_pattern is no regular expression .* Received: \(\.$"):
        quickly(source, tmp_path / "out", subject_pattern="(")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "people, volume",
    [
        ("sub-HC-01 sub-HC-02 sub-AD-01", "{}_T1w.nii.gz"),
        ("sub-HC_01 sub-HC_02 sub-AD_01", "{}/T1w.nii.gz"),
        ("sub-HC_0010 sub-HC_0011 sub-AD_0010", "{}.nii.gz"),
    ],
)
def test_ids_of_two_parts_are_not_cut_short(tmp_path, people, volume):
    for name in people.split():
        write_nifti(tmp_path / "volumes" / volume.replace("{}", name), brain())
    with pytest.raises(ValueError, match=r"^Nothing says who is shown in 3 of 3 volumes, such as sub-AD"):
        quickly(tmp_path / "volumes", tmp_path / "out")


@pytest.mark.parametrize("ending", ["_0000", "_0001", "_T1w", "-T1w", "_ses-1_T1w", "_ses-1_run-01_T1w", "_7T", ""])
def test_what_follows_an_id_of_bids_is_no_part_of_it(ending):
    assert re.search(SUBJECT_PATTERN, f"c1sub-01{ending}")[0] == "sub-01"  # _0000: a channel of nnU-Net


def test_empty_published_split_is_shared_by_seed_and_says_so(tmp_path, capsys):
    disc = write_disc(tmp_path / "extracted", (1, 2, 3))
    rows = manifest(quickly(disc, tmp_path / "published"))
    assert {row["split"] for row in rows} == {"train", "validate", "test"}
    assert {row["case"] for row in rows} == {"1", "2", "3"}
    told = "note: the cases 402-440 and 441-457 are not here: subjects are shared by seed\n"
    assert capsys.readouterr().out == told
    assert slices_of(quickly(disc, tmp_path / "seeded", split="seeded")) == slices_of(tmp_path / "published")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_and_dangling_ones_named(tmp_path, capsys):
    store = write_people(tmp_path / "store", 4)
    source = tmp_path / "dataset"
    objects = source / ".git" / "annex" / "objects"
    objects.mkdir(parents=True)
    for number in (1, 2, 3):
        (objects / f"MD5E-{number}.nii.gz").write_bytes((store / f"IXI00{number}-HH-T1.nii.gz").read_bytes())
        folder = tmp_path / "elsewhere" / str(number)
        folder.mkdir(parents=True)
        (folder / "T1.nii.gz").symlink_to(objects / f"MD5E-{number}.nii.gz")
        (folder / "T2.nii.gz").symlink_to(objects / "MD5E-not-here.nii.gz")  # not needed
        (folder / "loop").symlink_to(source)
        (source / f"sub-{number}").symlink_to(folder)
    found = who(source, tmp_path / "out")
    assert found == {f"sub-{number}": f"sub-{number}/T1.nii.gz" for number in (1, 2, 3)}
    note = "note: 3 further volumes of these subjects are left out: sub-1/T2.nii.gz, sub-2/T2.nii.gz, sub-3/T2.nii.gz\n"
    assert capsys.readouterr().out == note
    (objects / "MD5E-2.nii.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^1 links lead to .* not here, such as sub-2/T1\.nii\.gz\. Get the files"
    ):
        quickly(source, tmp_path / "other")


def test_bids_raw_volumes_come_before_derivatives_and_have_their_masks(tmp_path, capsys):
    source = tmp_path / "bids"
    for name in ("sub-01", "sub-02", "sub-03"):
        write_nifti(source / name / "ses-1" / "anat" / f"{name}_ses-1_T1w.nii.gz", brain())
        for folder in ("derivatives/prep", "sourcedata"):
            write_nifti(source / folder / name / f"{name}_desc-preproc_T1w.NII.GZ", brain())
            for other in ("desc-brain_mask", "space-MNI_desc-brain_mask", "dseg"):
                write_nifti(source / folder / name / f"{name}_{other}.nii.gz", (brain() > 85).astype(np.uint8))
    found = who(source, tmp_path / "out")
    assert found == {f"sub-0{n}": f"sub-0{n}/ses-1/anat/sub-0{n}_ses-1_T1w.nii.gz" for n in (1, 2, 3)}
    assert capsys.readouterr().out == ""
    brains = np.mean([iio.imread(tmp_path / "out" / name) > 0 for name in slices_of(tmp_path / "out")])
    for folder in ("derivatives", "derivatives/prep", "sourcedata"):
        folder = quickly(source / folder, tmp_path / "inside" / folder.replace("/", "-"))
        assert all(row["source"].endswith("_desc-preproc_T1w.NII.GZ") for row in manifest(folder))
        share = np.mean([iio.imread(folder / name) > 0 for name in slices_of(folder)]) / brains
        assert 0.2 < share < 0.6  # the brighter part alone


def test_odd_files_are_left_out_with_a_note(tmp_path, capsys):
    disc = tmp_path / "disc1"
    expected = quickly(write_people(disc), tmp_path / "without")
    write_nifti(disc / "IXI001_bold.nii.gz", np.zeros((9, 9, 9, 5), np.float32))
    write_nifti(disc / "IXI002-HH-T1_probseg.nii", np.zeros((36, 44, 32, 3), np.float32))
    write_nifti(disc / "flat.nii", np.zeros((9, 9), np.float32))
    (disc / "photo.hdr").write_bytes(b"#?RADIANCE\n")
    told = (
        "note: 4 files are left out, which are no volumes: {0}IXI001_bold.nii.gz (its shape is (9, 9, 9, 5)), "
        "{0}IXI002-HH-T1_probseg.nii (its shape is (36, 44, 32, 3)), {0}flat.nii (its shape is (9, 9)), "
        "{0}photo.hdr (its other half is missing, .hdr or .img)\n"
    )
    for source, place in ((disc, ""), (pack(tmp_path, tmp_path / "all.tar.gz"), "all.tar.gz:disc1/")):
        capsys.readouterr()
        assert slices_of(quickly(source, tmp_path / f"from-{source.name}")) == slices_of(expected)
        assert capsys.readouterr().out == told.format(place)


def test_label_maps_in_a_folder_of_their_own_are_no_brains(tmp_path, capsys):
    source = tmp_path / "Task01_BrainTumour"
    for number in (1, 2, 3):
        write_nifti(source / "imagesTr" / f"BRATS_00{number}.nii.gz", np.zeros((9, 9, 9, 4), np.float32))
        write_nifti(source / "labelsTr" / f"BRATS_00{number}.nii.gz", (brain() > 150).astype(np.uint8))
    with pytest.raises(FileNotFoundError, match=r"^No volumes in .*Task01_BrainTumour\. Expected"):
        quickly(source, tmp_path / "out", subject_pattern=r"BRATS_\d+")
    told = "(its shape is (9, 9, 9, 4)), labelsTr/BRATS_001.nii.gz (its folder's name says label maps), labelsTr/"
    assert told in capsys.readouterr().out


def test_after_an_error_only_what_changed_is_cut_anew(tmp_path):
    source, partial = write_people(tmp_path / "volumes", 12), tmp_path / "out.partial"
    damaged, whole = source / "IXI011-HH-T1.nii.gz", (source / "IXI011-HH-T1.nii.gz").read_bytes()
    damaged.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"^IXI011-HH-T1\.nii\.gz cannot be used"):
        quickly(source, tmp_path / "out")

    def times():
        return {str(path.relative_to(partial)): path.stat().st_mtime_ns for path in partial.glob("keras*/*.png")}

    before = times()
    assert len(before) == 60
    (source / "IXI002-HH-T1.nii.gz").unlink()  # all after it have another case
    write_nifti(source / "IXI003-HH-T1_mask.nii.gz", (brain() > 85).astype(np.uint8))
    (source / "IXI005-HH-T1.nii.gz").rename(source / "IXI005-HH-T1-new.nii.gz")
    with pytest.raises(ValueError, match=r"^IXI011-HH-T1\.nii\.gz cannot be used"):
        quickly(source, tmp_path / "out")
    between = times()
    assert len(between) == 54 and {name for name, time in between.items() if before.get(name) == time} == {
        name for name in before if "case_001" in name
    }
    damaged.write_bytes(whole)
    folder = quickly(source, tmp_path / "out")
    kept = {name for name, time in between.items() if (folder / name).stat().st_mtime_ns == time}
    assert kept == set(between)
    assert read_bytes(folder) == read_bytes(quickly(source, tmp_path / "at_once"))


def test_marks_are_written_after_slices_that_are_on_the_disk(tmp_path, monkeypatch):
    synced, sync, marks = [], os.fsync, {}
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), sync(number)))
    monkeypatch.setattr(
        ingest, "read_record", lambda file: (marks.setdefault(file.name, file.stat().st_ino), read_record(file))[1]
        if file.exists() else None,
    )  # fmt: skip
    folder = quickly(write_people(tmp_path / "volumes"), tmp_path / "out")
    for row in manifest(folder):
        slices = synced.index((folder / row["file"]).stat().st_ino)
        assert slices < synced.index(marks[f"case_{int(row['case']):03d}.json"])


@pytest.mark.parametrize("packed, num_workers", [(False, 1), (True, 2)])
def test_killed_run_is_completed_to_the_same_bytes(tmp_path, packed, num_workers):
    source, geometry = write_disc(tmp_path / "extracted", range(390, 420)), SliceGeometry(image_size=64, num_slices=20)
    if packed:
        source = pack(source, tmp_path / "disc.tar.gz")
    expected = quickly(source, tmp_path / "uninterrupted", geometry, num_workers=3 - num_workers)
    folder, partial = tmp_path / "killed", tmp_path / "killed.partial"
    code = "from oasis_vq.ingest import SliceGeometry, prepare; import sys; "
    code += f"prepare(sys.argv[1], sys.argv[2], SliceGeometry(image_size=64, num_slices=20), num_workers={num_workers})"
    process = subprocess.Popen([sys.executable, "-c", code, source, folder], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(partial.glob("*/case_396_*.png")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() != 0
    process.communicate(timeout=10)  # the pipe ends only when every worker that inherited it has ended
    written = list(partial.glob("*/case_*.png"))
    assert 20 < len(written) < 600 and not folder.exists() and not (partial / "manifest.csv").exists()
    first = partial / "keras_png_slices_train" / "case_390_slice_0.nii.png"
    modified = first.stat().st_mtime_ns

    quickly(source, folder, geometry, num_workers=num_workers)
    assert read_bytes(folder) == read_bytes(expected) and not partial.exists()
    assert (folder / "keras_png_slices_train" / first.name).stat().st_mtime_ns == modified  # continued, not begun anew


def test_finished_folder_is_left_alone_and_another_refused(tmp_path):
    source = write_people(tmp_path / "volumes")
    folder = quickly(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert quickly(source, folder) == folder
    with pytest.raises(FileExistsError) as other:
        quickly(source, folder, SliceGeometry(image_size=48, num_slices=6))
    assert "holds one made with image_size: 32, not 48. Name" in str(other.value) and "\n" not in str(other.value)
    write_nifti(source / "IXI009-HH-T1.nii.gz", brain())
    told = r"holds one made with other files: IXI009-HH-T1\.nii\.gz is new\. Name another folder, or remove this one\.$"
    with pytest.raises(FileExistsError, match=told):
        quickly(source, folder)
    (source / "IXI001-HH-T1.nii.gz").unlink()
    (source / "IXI002-HH-T1.nii.gz").write_bytes(b"of another size")
    write_nifti(source / "IXI008-HH-T1.nii.gz", brain())
    told = r"files: IXI001\S+ is gone, IXI002\S+ has changed, IXI008\S+ is new and 1 more\. Name"
    with pytest.raises(FileExistsError, match=told):
        quickly(source, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"which holds files without prepare\.json\."):
        quickly(source, tmp_path / "full")


@pytest.mark.parametrize("changed", ["IXI002-HH-T1.nii.gz", "IXI003-HH-T1_mask.nii.gz", "all.tar"])
def test_another_file_of_the_same_size_is_noticed(tmp_path, monkeypatch, changed):
    source = write_people(tmp_path / "volumes")
    write_nifti(source / "IXI003-HH-T1_mask.nii.gz", (brain() > 85).astype(np.uint8))
    if changed == "all.tar":
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            tar.add(source, arcname="volumes")
        source = tmp_path / "all.tar"
    file = source if changed == "all.tar" else source / changed

    def touch():
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**10))

    folder = quickly(source, tmp_path / "out")
    touch()
    with pytest.raises(FileExistsError, match=rf"one made with other files: {re.escape(changed)} has changed\. Name"):
        quickly(source, folder)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # when all is cut
        patch.setattr(ingest, "_write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            quickly(source, tmp_path / "later")
    touch()
    cut, write = [], ingest._write_subject
    monkeypatch.setattr(
        ingest, "_write_subject", lambda subject, *rest: (cut.append(subject.name), write(subject, *rest))
    )
    quickly(source, tmp_path / "later")
    assert cut == (["IXI001", "IXI002", "IXI003"] if changed == "all.tar" else [changed[:6]])


def test_slices_recorded_without_times_are_kept_and_told(tmp_path):
    source = write_people(tmp_path / "volumes")
    folder = quickly(source, tmp_path / "out")
    record = json.loads((folder / "prepare.json").read_text())
    old = {"format_version": 2, "files": {name: size for name, (size, _) in record["files"].items()}}
    (folder / "prepare.json").write_text(json.dumps({**record, **old}))
    before = read_bytes(folder)
    text = (
        r"one made with format_version: 2, not 3; other files: IXI001\S+ has changed, .* Name another folder, or remove"
    )
    with pytest.raises(FileExistsError, match=text):
        quickly(source, folder)
    assert read_bytes(folder) == before


def test_partial_folder_with_other_parameters_is_begun_anew(tmp_path):
    source, partial = write_people(tmp_path / "volumes"), tmp_path / "anew.partial"
    expected = quickly(source, tmp_path / "out")
    (partial / ".subjects").mkdir(parents=True)
    parameters = json.loads((expected / "prepare.json").read_text())
    (partial / "prepare.json").write_text(json.dumps({**parameters, "seed": 5}))
    (partial / ".subjects" / "case_001.json").write_text("of another person")
    assert read_bytes(quickly(source, tmp_path / "anew")) == read_bytes(expected)


def test_a_run_stopped_at_its_end_only_gives_the_name(tmp_path, monkeypatch):
    source = write_people(tmp_path / "volumes")
    expected = read_bytes(quickly(source, tmp_path / "expected"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            quickly(source, tmp_path / "out")
        patch.setattr(ingest, "finish", finish)
        patch.setattr(ingest, "_write_subject", stop)
        assert read_bytes(quickly(source, tmp_path / "out")) == expected


def test_what_is_not_ours_is_never_removed(tmp_path):
    source = write_people(tmp_path / "volumes")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^out grows in .*out\.partial, where something else is\. Move it away"):
        quickly(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"link is a link or a place where a disk is mounted"):
        quickly(source, tmp_path / "link")


def test_two_processes_make_one_folder(tmp_path):
    source = write_people(tmp_path / "volumes", 12)
    expected = read_bytes(quickly(source, tmp_path / "expected"))
    code = "from oasis_vq.ingest import SliceGeometry, prepare; import sys; "
    code += "prepare(sys.argv[1], sys.argv[2], SliceGeometry(image_size=32, num_slices=6), num_workers=1)"
    words = [sys.executable, "-c", code, source, tmp_path / "out"]
    both = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert read_bytes(tmp_path / "out") == expected
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_worker_is_told_in_one_line():
    with pytest.raises(
        MemoryError, match=r"^One of 2 processes ended\. .* perhaps for want of memory: try --workers 1"
    ):
        list(run_tasks(signal.raise_signal, [(signal.SIGKILL,)], 2))


TWO = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
from oasis_vq.workers import run_tasks
seen = set()
def tasks():
    while len(seen) < 2:
        yield ("__import__('os').getpid()",)
    print("both", flush=True)
    while True:
        {then}
try:
    for process in run_tasks(eval, tasks(), 2):
        seen.add(process)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no groups of processes there")
@pytest.mark.parametrize(
    "then", ["time.sleep(60)", """yield ("__import__('time').sleep(60)",)"""], ids=["idle", "busy"]
)
def test_ctrl_c_ends_workers_at_once_and_without_a_word(then):
    """A terminal sends it to all processes of a command."""
    words, pipe = [sys.executable, "-c", TWO.format(then=then)], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "both\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=30) == ("stopped\n", "")
        finally:
            process.kill()


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, also where pytest was started in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows tells no single thread")
def test_ctrl_c_is_heard_although_another_thread_gets_it(listening):
    """As it is that comes just before Python waits: nothing wakes the main thread."""
    other = threading.Thread(target=lambda: (time.sleep(2), signal.pthread_kill(threading.get_ident(), signal.SIGINT)))
    begun = time.monotonic()
    other.start()
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(time.sleep, [(60,), (60,)], 2))
    assert time.monotonic() - begun < 30


def test_ctrl_c_is_not_lost_while_a_worker_starts(monkeypatch, listening):
    """Nor does it stop the start half-way."""
    done = []

    class Interrupted(ProcessPoolExecutor):
        def submit(self, *task):
            os.kill(os.getpid(), signal.SIGINT)
            done.append(super().submit(*task))
            return done[-1]

    monkeypatch.setattr("oasis_vq.workers.ProcessPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(math.sqrt, [(4,), (9,)], 2))
    for worker in multiprocessing.active_children():
        worker.join(30)
    assert len(done) == 1 and multiprocessing.active_children() == []


def test_a_script_without_the_guard_is_told(tmp_path):
    """It does not wait for itself."""
    source, script = write_people(tmp_path / "volumes"), tmp_path / "script.py"
    script.write_text(f"from oasis_vq.ingest import prepare\nprepare({str(source)!r}, {str(tmp_path / 'out')!r})\n")
    words = [sys.executable, script]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 1 and "several processes needs `if __name__" in done.stderr


def test_names_that_are_no_text_are_told(tmp_path):
    source = write_people(tmp_path / "volumes")
    (source / "IXI003-HH-T1.nii.gz").rename(source / os.fsdecode(b"IXI003_M\xfcller_T1.nii.gz"))
    with pytest.raises(ValueError, match=r"^A file's name is no UTF-8\. Received: 'IXI003_M\\udcfcller_T1"):
        quickly(source, tmp_path / "out")


def cut_off(path):
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])


def without_affine(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:328] = bytes(48)  # the three rows of the affine
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "spoil, text",
    [
        (cut_off, "Compressed file ended"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "neither NIfTI nor ANALYZE"),
        (lambda path: path.write_bytes(b""), "neither NIfTI nor ANALYZE"),
        (lambda path: write_nifti(path, np.full((9, 9, 9), 7, np.float32)), "it is empty: all its values are 7"),
        (without_affine, ""),
    ],
)
def test_broken_volume_is_named(tmp_path, spoil, text):
    source = write_people(tmp_path / "volumes")
    spoil(source / "IXI002-HH-T1.nii.gz")
    with pytest.raises(ValueError, match=rf"^IXI002-HH-T1\.nii\.gz cannot be used: {text}.*move it away\.$"):
        quickly(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_volume_larger_than_memory_is_not_called_damaged(tmp_path, num_workers):
    source = write_people(tmp_path / "volumes")
    content = bytearray(gzip.decompress((source / "IXI002-HH-T1.nii.gz").read_bytes()))
    content[42:48] = np.full(3, 32767, "<i2").tobytes()  # its shape: 140 TB
    (source / "IXI002-HH-T1.nii.gz").write_bytes(gzip.compress(content))
    text = (
        r"^IXI002-HH-T1\.nii\.gz does not fit into memory \(the volume's shape is \(32767, 32767, 32767\)\)\. "
        r"Try --workers 1, or a smaller --image-size\.$"
    )
    with pytest.raises(MemoryError, match=text):
        quickly(source, tmp_path / "out", num_workers=num_workers)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that cannot be read")
def test_a_disk_that_fails_is_not_called_a_damaged_file(tmp_path):
    source = write_people(tmp_path / "volumes")
    (source / "IXI002-HH-T1.nii.gz").unlink()
    (source / "IXI002-HH-T1.nii.gz").symlink_to("/proc/self/mem")
    text = r"^\[Errno \d+\] (Input/output error|Permission denied): '.*"
    with pytest.raises(OSError, match=text + r"IXI002-HH-T1\.nii\.gz'$"):
        quickly(source, tmp_path / "out")
    (tmp_path / "all.tar").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=text + r"all\.tar'$"):
        quickly(tmp_path / "all.tar", tmp_path / "out")


def test_broken_mask_archive_and_pair_are_named(tmp_path):
    source = write_people(tmp_path / "volumes")
    mask = source / "IXI003-HH-T1_mask.nii.gz"
    write_nifti(mask, np.zeros((36, 44, 32), np.uint8))
    with pytest.raises(ValueError, match=r"^IXI003-HH-T1_mask\.nii\.gz cannot be used: the mask is empty\. Replace"):
        quickly(source, tmp_path / "out", num_workers=2)  # the error comes from a worker
    mask.write_bytes(b"no mask")
    with pytest.raises(ValueError, match=r"^IXI003-HH-T1_mask\.nii\.gz cannot be used: neither NIfTI nor"):
        quickly(source, tmp_path / "out")

    disc = write_disc(tmp_path / "extracted", (1, 2, 3))
    archive = pack(disc, tmp_path / "disc1.tar.gz")
    whole = archive.read_bytes()
    for share in (0.3, 0.7, 0.999):
        archive.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            ValueError,
            match=r"disc1\.tar\.gz cannot be read as an archive .*move it away; if download made it, run that again\.$",
        ):
            quickly(archive, tmp_path / "other")
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"disc1\.tar\.gz cannot be read as an archive \(Not a gzipped file"):
        quickly(archive, tmp_path / "other")

    image = next(disc.rglob("OAS1_0002_MR1*masked_gfc.img"))
    whole = image.read_bytes()
    image.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"OAS1_0002_MR1_mpr_n3_anon_111_t88_masked_gfc\.img cannot be used: Expected"):
        quickly(disc, tmp_path / "other")
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_masks_without_their_volumes_are_told(tmp_path, capsys):
    source = write_people(tmp_path / "volumes")
    (source / "IXI003-HH-T1.nii.gz").rename(source / "IXI003-HH-T1_mask.nii.gz")
    quickly(source, tmp_path / "out")
    assert "volumes are called masks" in (said := capsys.readouterr().out) and "IXI003-HH-T1_mask.nii.gz" in said


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are listed in /proc")
def test_ctrl_c_while_workers_start_is_without_a_word(tmp_path):
    words = [sys.executable, "-m", "oasis_vq", "phantom", "--out", str(tmp_path / "p"), "--workers", "2"]
    words += ["--image-size", "2048"]  # a person takes minutes
    options = {"cwd": ROOT, "stdout": -1, "stderr": -1, "text": True, "start_new_session": True}
    # A shell starts what it puts into the background with SIGINT ignored, and the tests may be run so.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, **options) as process:
        children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
        while len(children.read_text().split()) < 2 and time.monotonic() < deadline:  # a tracker, and a worker
            time.sleep(0.005)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]  # at once, not after the first person
    assert process.returncode == 1 and "Traceback" not in said and "Stopped. The same command again" in said


def test_nothing_to_prepare_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no .*absent to prepare slices from\.$"):
        quickly(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^No volumes in .*empty\. Expected \.nii, "):
        quickly(tmp_path / "empty", tmp_path / "out")
    write_nifti(tmp_path / "one" / "IXI001.nii.gz", brain())
    with pytest.raises(
        ValueError, match=r"^Slices come from a folder or an archive \(\.tar\.gz, \.tgz, \.tar\)\. Received: "
    ):
        quickly(tmp_path / "one" / "IXI001.nii.gz", tmp_path / "out")
    with pytest.raises(ValueError, match="at least 3 subjects"):
        quickly(write_people(tmp_path / "volumes", 2), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_tasks_are_taken_only_as_they_are_needed():
    taken = []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield (number,)

    for number, root in enumerate(run_tasks(math.sqrt, tasks(), num_workers=2)):
        assert root == math.sqrt(number) and len(taken) <= number + 5
    assert len(taken) == 20


def test_import_needs_no_tensorflow():
    code = "import sys, oasis_vq.ingest; print('tensorflow' in sys.modules, 'skimage' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_real_volumes(tmp_path):
    if not REAL_VOLUMES.is_dir():
        pytest.skip(f"no real volumes in {REAL_VOLUMES} (set OASIS_VQ_REAL_VOLUMES)")
    code = "import sys; from oasis_vq.ingest import prepare; prepare(sys.argv[1], sys.argv[2])"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, REAL_VOLUMES, tmp_path / "out"], cwd=ROOT, check=True)
    assert time.monotonic() - start < 20
    rows = manifest(tmp_path / "out")
    assert len(rows) == 32 * 8 and all("DLMUSE" not in row["source"] for row in rows)
    images = np.stack([iio.imread(tmp_path / "out" / row["file"]) for row in rows]).reshape(8, 32, 256, 256)
    shares = (images > 0).mean((2, 3))
    assert np.all(shares[:, 8:20] > 0.2) and np.all(shares > 0.02) and np.all(shares < 0.35)
    assert not images[:, :, :20].any() and not images[..., :40].any() and not images[..., -40:].any()
    rows = np.arange(256)[:, None]
    heights = ((images > 0) * rows).sum((2, 3)) / (images > 0).sum((2, 3))
    assert np.all(heights[:, 0] > heights[:, 6] + 4)  # the cerebellum lies behind the middle of what is above it
