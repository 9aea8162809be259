"""Slices: what is found in the two layouts, who is in which split, and what a wrong folder is told."""

import os
import shutil
import subprocess
import sys

import pytest

import oasis_vq as ovq

TRAIN = "keras_png_slices_train"


def test_index_has_the_cohort_and_no_subject_twice(index):
    assert {name: (len(part), part.num_subjects) for name, part in index.splits().items()} == {
        "train": (48, 6), "validate": (16, 2), "test": (16, 2)
    }  # fmt: skip
    subjects = [set(part.subject) for part in index.splits().values()]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    assert index.train.slice[:9].tolist() == [*range(8), 0]
    assert "train 48 of 6 subjects" in str(index)
    assert index.slice_range == (0, 7) and index.num_labels == 0


def test_positions_at_shares_are_those_there_are(index, adni):
    assert index.positions_at(0.42) == 3 and index.positions_at([0, 0.5, 1]).tolist() == [0, 4, 7]
    assert ovq.find_slices(adni).positions_at([0, 1]).tolist() == [78, 80]


def test_slices_sort_by_number_not_by_letters(cohort, copied):
    for number in (10, 9):
        source = copied / TRAIN / "case_001_slice_0.nii.png"
        (copied / TRAIN / f"case_001_slice_{number}.nii.png").write_bytes(source.read_bytes())
    assert ovq.find_slices(copied).train.slice[:10].tolist() == [*range(8), 9, 10]


def test_a_folder_around_the_layout_will_do_if_there_is_one_in_it(tmp_path, cohort, adni):
    shutil.copytree(cohort, tmp_path / "around" / "keras_png_slices_data")
    seg = tmp_path / "around" / "keras_png_slices_data" / "keras_png_slices_seg_train"
    seg.mkdir()
    (seg / "seg_001_slice_0.nii.png").write_bytes(b"")
    index = ovq.find_slices(tmp_path / "around")
    assert len(index.train) == 48 and index.root.name == "keras_png_slices_data"
    shutil.copytree(adni, tmp_path / "around" / "AD_NC")
    with pytest.raises(FileNotFoundError, match=r"AD_NC in the ADNI layout and .*_data in the OASIS layout hold"):
        ovq.find_slices(tmp_path / "around")


def test_a_folder_that_is_not_the_whole_says_which_is(cohort, adni, tmp_path):
    for part, whole in ((cohort / TRAIN, cohort), (adni / "train", adni)):
        with pytest.raises(FileNotFoundError, match=rf"is one part of a data folder. Name the whole: .*{whole.name}"):
            ovq.find_slices(part)
    shutil.copytree(cohort, tmp_path / "oasis.partial")
    for folder, text in ((tmp_path / "oasis.partial", "is not complete"), (tmp_path, "No PNG slices in")):
        with pytest.raises(FileNotFoundError, match=text):
            ovq.find_slices(folder)
    shutil.copytree(cohort, tmp_path / "both")
    shutil.copytree(adni / "train", tmp_path / "both" / "train")
    with pytest.raises(FileNotFoundError, match=r"both in the OASIS layout and .*both in the ADNI layout hold slices"):
        ovq.find_slices(tmp_path / "both")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the permissions of POSIX")
def test_a_neighbour_that_may_not_be_entered_does_not_matter(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "oasis")
    (tmp_path / "lost+found").mkdir(mode=0)
    code = "import os, sys, oasis_vq.slices as s; os.geteuid() or os.setuid(65534); print(s.find_slices(sys.argv[1]))"
    if os.geteuid() == 0:  # somebody else enters
        for path in (tmp_path, *tmp_path.parents[:3]):
            path.chmod(path.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("oasis: slices: train 48"), done.stderr


def test_a_case_is_a_number(copied):
    file = copied / TRAIN / "case_001_slice_0.nii.png"
    file.rename(file.with_name("case_1_slice_0.nii.PNG"))
    assert ovq.find_slices(copied).train.num_subjects == 6
    other = copied / "keras_png_slices_test" / "case_1_slice_0.nii.png"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="Subject 001 is in train and in test"):
        ovq.find_slices(copied)


def test_adni_layout_gives_labels_positions_and_validation_by_subject(adni):
    index = ovq.find_slices(adni)
    assert {name: (len(part), part.num_subjects) for name, part in index.splits().items()} == {
        "train": (54, 18), "validate": (6, 2), "test": (24, 8)
    }  # fmt: skip
    assert set(index.validate.subject) & set(index.train.subject) == set()
    assert sorted(index.validate.label.tolist()) == [0] * 3 + [1] * 3  # one subject of each class
    assert index.slice_range == (78, 80) and index.num_labels == 2
    for path, label in zip(index.test.path, index.test.label, strict=True):
        assert ("/AD/" in path.replace("\\", "/")) == (label == 1)
    other = ovq.find_slices(adni, seed=1)
    assert set(other.validate.subject) != set(index.validate.subject)
    assert set(ovq.find_slices(adni).validate.path) == set(index.validate.path)


def test_validation_hardly_changes_when_subjects_come(adni, tmp_path):
    more = shutil.copytree(adni, tmp_path / "more")
    before = set(ovq.find_slices(more).validate.subject)
    for file in list((more / "train" / "AD").iterdir()):
        file.with_name(f"9{file.name}").write_bytes(file.read_bytes())
    after = set(ovq.find_slices(more).validate.subject)
    assert len(after) == 3 and len(before - after) <= 1


def test_adni_table_tells_people_from_images(adni, tmp_path):
    copy = shutil.copytree(adni, tmp_path / "people")
    ids = sorted({file.name.split("_")[0] for file in copy.glob("*/*/*.jpeg")})
    lines = [f'"I{image}","{number // 2:03d}_S_0001"' for number, image in enumerate(ids)]  # two images each
    (copy / "collection.csv").write_text('"Image Data ID","Subject"\n' + "\n".join(lines))
    index = ovq.find_slices(copy)
    assert sum(part.num_subjects for part in index.splits().values()) == 14 and index.notes == ()
    assert index.validate.num_subjects == 1 and len(index.validate) == 6
    (copy / "collection.csv").write_text('"Image Data ID","Subject"\n' + "\n".join(lines[:-3]), encoding="latin-1")
    (note,) = ovq.find_slices(copy).notes
    assert note.kind == "image ids" and "3 of 28 ids" in note.text
    (copy / "collection.csv").write_text("\n".join(["Image Data ID;Subject", *lines]).replace(",", ";"))
    assert ovq.find_slices(copy).notes == ()  # as spreadsheets write it where the comma is in numbers
    for odd in ("\n".join(['"Image ID","Subject ID"', *lines]), f'"Image Data ID","Subject"\n{"x" * 200_000},1'):
        (copy / "collection.csv").write_text(odd)
        (note,) = ovq.find_slices(copy).notes
        assert "28 of 28 ids" in note.text and note.remedy.endswith("no such columns: collection.csv.")
    for file in copy.glob(f"*/*/{ids[3]}_*"):
        file.rename(file.with_name(f"I{file.name}"))
    (copy / "collection.csv").write_text('"Image Data ID","Subject"\n' + "\n".join(lines))
    assert sum(part.num_subjects for part in ovq.find_slices(copy).splits().values()) == 14
    lines[-1] = f'"I{ids[-1]}","000_S_0001"'  # someone to train on is in test as well
    (copy / "collection.csv").write_text('"Image Data ID","Subject"\n' + "\n".join(lines))
    with pytest.raises(ValueError, match="Subject 000_S_0001 is in train and in test"):
        ovq.find_slices(copy)


def test_a_person_in_names_of_images_is_in_one_split(adni, tmp_path):
    copy = shutil.copytree(adni, tmp_path / "people")
    ids = sorted({path.name.split("_")[0] for path in copy.glob("train/*/*")})
    for number, own in enumerate(ids):  # two images of each person
        for file in copy.glob(f"train/*/{own}_*"):
            file.rename(file.with_name(f"{number // 4:03d}_S_0{number // 4:03d}_I{number}_{file.name.split('_')[-1]}"))
    index = ovq.find_slices(copy)
    assert sorted({*index.train.subject, *index.validate.subject}) == [f"{n:03d}_S_0{n:03d}" for n in range(5)]
    file = next(copy.glob("train/*/000_S_0000_*"))
    file.rename(copy / "test" / "AD" / "000_S_0000_I99_78.jpeg")
    with pytest.raises(ValueError, match=r"Subject 000_S_0000 is in (train|validate) and in test"):
        ovq.find_slices(copy)


def test_own_validation_of_the_adni_layout_is_told(adni, tmp_path):
    copy = shutil.copytree(adni, tmp_path / "own")
    shutil.copytree(copy / "test", copy / "validate")
    (note,) = (note for note in ovq.find_slices(copy).notes if note.kind == "validation")
    assert note.paths == (str(copy / "validate"),) and "validation is cut from train" in note.text


def test_classes_that_training_cannot_tell_apart_are_no_condition(adni, tmp_path):
    copy = shutil.copytree(adni, tmp_path / "CN")
    for split in ("train", "test"):
        (copy / split / "NC").rename(copy / split / "CN")  # as ADNI says
        (copy / split / "MCI").mkdir()
    index = ovq.find_slices(copy)
    assert index.num_labels == 2 and len(index.train) == 54
    (note,) = (note for note in index.notes if note.kind == "classes")
    assert "MCI" in str(note) and "is not read" in str(note)
    shutil.rmtree(copy / "train" / "AD")
    assert ovq.find_slices(copy).num_labels == 0


def test_fewer_training_subjects_are_of_all_classes(adni):
    assert sorted(ovq.find_slices(adni, limit_train=2).train.label.tolist()) == [0] * 3 + [1] * 3


def test_fewer_training_subjects_are_among_more(cohort, index):
    some, more = (ovq.find_slices(cohort, limit_train=count) for count in (2, 4))
    assert some.train.num_subjects == 2 and len(some.train) == 16 and len(some.test) == len(index.test)
    assert set(some.train.subject) < set(more.train.subject) < set(index.train.subject)
    assert len(ovq.find_slices(cohort, limit_train=99).train) == 48
    with pytest.raises(ValueError, match="limit_train is at least 1"):
        ovq.find_slices(cohort, limit_train=0)


def test_fingerprint_knows_sizes_labels_and_if_asked_times(copied, adni, tmp_path):
    def index():
        return ovq.find_slices(copied).train

    before, before_modified = index().fingerprint(), index().fingerprint(modified=True)
    file = copied / TRAIN / "case_001_slice_0.nii.png"
    content = file.read_bytes()
    file.write_bytes(content)
    assert index().fingerprint() == before and index().fingerprint(modified=True) != before_modified
    file.write_bytes(content + b" ")
    assert index().fingerprint() != before
    swapped = shutil.copytree(adni, tmp_path / "swapped")
    (swapped / "test" / "AD").rename(swapped / "test" / "x")
    (swapped / "test" / "NC").rename(swapped / "test" / "AD")
    (swapped / "test" / "x").rename(swapped / "test" / "NC")
    assert ovq.find_slices(swapped).test.fingerprint() != ovq.find_slices(adni).test.fingerprint()


def test_missing_folder_is_named_with_the_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("nowhere", "There is no folder .*nowhere"), ("empty", "No PNG slices in .*empty")):
        with pytest.raises(FileNotFoundError, match=rf"{said}.*python -m oasis_vq phantom"):
            ovq.find_slices(tmp_path / name)


def test_empty_split_is_named(copied, adni, tmp_path):
    for file in (copied / "keras_png_slices_validate").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"No slices to validate in .*keras_png_slices_validate"):
        ovq.find_slices(copied)
    without = shutil.copytree(adni, tmp_path / "without")
    shutil.rmtree(without / "test")
    with pytest.raises(FileNotFoundError, match=r"No slices to test in .*NC and .*AD"):
        ovq.find_slices(without)
    few = shutil.copytree(adni, tmp_path / "few")
    kept = {sorted((few / "train" / name).iterdir())[0].name.split("_")[0] for name in ("AD", "NC")}
    for file in few.glob("train/*/*"):
        if file.name.split("_")[0] not in kept:
            file.unlink()
    with pytest.raises(FileNotFoundError, match=r"No slices to validate .* two subjects of a class are needed"):
        ovq.find_slices(few)


@pytest.mark.parametrize("name", ["brain.png", "case_001_slice_x.nii.png", "case_001.nii.png", "photo.JPG"])
def test_file_outside_the_layout_is_named(copied, name):
    (copied / TRAIN / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}: it is named outside the layout.*case_001_slice_0"):
        ovq.find_slices(copied)


def test_files_that_are_no_images_are_passed_over(copied):
    for name in (".DS_Store", "notes.txt", "Thumbs.db"):
        (copied / TRAIN / name).write_bytes(b"")
    assert len(ovq.find_slices(copied).train) == 48


def test_subject_in_two_splits_is_refused(copied):
    leak = copied / "keras_png_slices_test" / "case_001_slice_0.nii.png"
    leak.write_bytes((copied / TRAIN / "case_001_slice_0.nii.png").read_bytes())
    with pytest.raises(ValueError, match="Subject 001 is in train and in test"):
        ovq.find_slices(copied)


def test_environment_says_where_the_slices_are_and_how_many(monkeypatch, cohort):
    monkeypatch.setenv("OASIS_VQ_DATA", str(cohort))
    assert len(ovq.find_or_make_slices(16).train) == 48
    monkeypatch.setenv("OASIS_VQ_LIMIT_TRAIN", "2")
    assert len(ovq.find_or_make_slices(16).train) == 16
    monkeypatch.setenv("OASIS_VQ_LIMIT_TRAIN", "few")
    with pytest.raises(ValueError, match=r"OASIS_VQ_LIMIT_TRAIN is a number from 1 on. Received: few"):
        ovq.find_or_make_slices(16)


@pytest.mark.slow
def test_phantom_is_made_when_there_are_no_data(tmp_path, monkeypatch):
    monkeypatch.delenv("OASIS_VQ_DATA", raising=False)
    monkeypatch.setenv("OASIS_VQ_PHANTOM", str(tmp_path))
    index = ovq.find_or_make_slices(16)
    assert index.root == tmp_path / "phantom16-24" and index.train.num_subjects == 20
