"""What a model folder's model is worth, as numbers and as text, and where it comes from."""

import contextlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from oasis_vq import __version__
from oasis_vq.anomaly import find_lesions
from oasis_vq.config import ROOT, Paths
from oasis_vq.evaluation import evaluate_prior, evaluate_reconstruction, table
from oasis_vq.files import write_json
from oasis_vq.folders import load_prior, load_vqvae, model_folder, note_other_split, read_record, sha256, vqvae_folder
from oasis_vq.quality import evaluate_samples, sample_table
from oasis_vq.slices import SliceIndex

PACKAGES = ("tensorflow", "keras", "tensorflow-probability", "numpy", "scikit-image", "matplotlib")
"""Whose versions `provenance` tells."""
NO_SCORES = ("val_", "training_", "num_parameters", "scored_")
"""Beginnings of the names in metrics.json that a training has written, and of what says which slices were scored."""
OF_SAMPLES = ("ceiling", "floor", "test", "copies", "distances")
"""Parts of metrics.json that belong to a prior's samples; the names in them are those of the samples' own scores."""
SAMPLES_VERSION = 2
"""Of what `evaluate_samples` does: raise it when scores of before are not to be taken for those of now."""


def evaluate_model(folder: str | Path, index: SliceIndex, *, again: bool = False) -> dict:
    """Return all that metrics.json of a model folder holds, the scores on the test split computed first if they miss.

    Of slices in another split than the model was trained with, scores are returned alone, and not kept there.

    A VQ-VAE is scored as by `evaluate_reconstruction`, a prior as by `evaluate_prior` and `evaluate_samples`; and
    `lesion_auroc` is that of `find_lesions`, without drafts and where enough slices show brain. Fingerprints of the
    splits stand beside the scores: those of other slices are not taken for theirs, nor those of an older way to score
    samples.

    Args:
        folder: of the model, or its name in `Paths.models`.
        index: the slices; the training split for the baselines, the test split to be scored.
        again: whether scores that are there are computed anew.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if the data guard finds an error.
    """
    folder = model_folder(folder)
    is_vqvae = read_record(folder)["model"] == "VQVAE"
    file = folder / "metrics.json"
    is_other = note_other_split(folder, index)
    known = json.loads(file.read_text()) if file.exists() and not is_other else {}
    scored: dict = {"scored_slices": index.fingerprints()}
    scored |= {} if is_vqvae else {"scored_as": SAMPLES_VERSION}
    if not again and scored == {name: known.get(name) for name in scored}:
        return known
    known.pop("lesion_auroc", None)  # there may be none of these slices
    if is_vqvae:
        report = evaluate_reconstruction(load_vqvae(folder), index.test, train=index.train)
    else:
        prior, vqvae = load_prior(folder), load_vqvae(vqvae_folder(folder))
        report = evaluate_prior(prior, vqvae, index) | evaluate_samples(prior, vqvae, index)
        if prior.drafter is None:  # a draft already shows a lesion
            with contextlib.suppress(ValueError):  # too few slices with brain
                report["lesion_auroc"] = find_lesions(prior, vqvae, index)["auroc"]
    if not is_other:
        write_json(file, {**known, **report, **scored})
    return {**known, **report, **scored}


def validate_model(folder: str | Path, index: SliceIndex) -> dict:
    """Return the scores of a model folder on the validation split as `evaluate_reconstruction` and `evaluate_prior` do.

    Nothing is written.
    """
    folder = model_folder(folder)
    note_other_split(folder, index)
    if read_record(folder)["model"] == "VQVAE":
        return evaluate_reconstruction(load_vqvae(folder), index.validate, train=index.train)
    index = replace(index, test=index.validate)
    report = evaluate_prior(load_prior(folder), load_vqvae(vqvae_folder(folder)), index)
    return {name: value for name, value in report.items() if not name.startswith("validate_")}


def report_texts(metrics: dict) -> list[str]:
    """Return what `evaluate_model` has returned as text tables: of the test split, and of a prior's samples."""
    report = {name: value for name, value in metrics.items() if not name.startswith(NO_SCORES)}
    samples = {name: report.pop(name) for name in OF_SAMPLES if name in report}
    samples |= {name: report.pop(name) for name in samples.get("ceiling", {}) if name in report}
    return [table(report), *([sample_table(samples)] if samples else [])]


def provenance(folders: Sequence[str | Path]) -> dict:
    """Return what results made with these models depend on, as plain JSON values.

    Args:
        folders: of the models, or their names in `Paths.models`.

    Returns:
        oasis_vq and python: versions; packages: version by name; commit: as `commit`; models:
        by name the `sha256` of model.keras and what config.json says: configuration with seed, name and fingerprints
        of the data, and a prior's VQ-VAE.

    Raises:
        FileNotFoundError: if a folder or a file of it is missing.
    """
    models = {}
    for folder in map(model_folder, folders):
        record = read_record(folder)
        name = folder.name if folder.name not in models else f"{folder.parent.name}/{folder.name}"
        models[name] = {"sha256": sha256(folder / "model.keras"), **record}
    return {
        "oasis_vq": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "models": models,
    }


def save_provenance(folders: Sequence[str | Path], *, folder: str | Path | None = None) -> dict:
    """Write `provenance` of these models as provenance.json, and return it.

    Args:
        folders: as in `provenance`.
        folder: where to; None for `Paths.figures`.
    """
    folder = Path(folder) if folder is not None else Paths().figures
    folder.mkdir(parents=True, exist_ok=True)
    found = provenance(folders)
    write_json(folder / "provenance.json", found)
    return found


def commit() -> str | None:
    """Return the commit of the project's checkout that this library is in, or None if it is not in one.

    It ends in "-dirty" if files of the library differ from those of the commit.
    """

    def git(*words: str) -> str:
        words = ("git", "-C", str(ROOT), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return None  # of somebody's own project, in which this one is installed
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "oasis_vq"))
    except (OSError, subprocess.CalledProcessError):
        return None
