"""Model folders: what is in them, what is refused, and the models that they hold.

A model folder holds `model.keras`, `config.json`, `metrics.json` and `history.csv`; config.json says what the model
is, how and on which data it was trained, and which VQ-VAE a prior belongs to. What else is there is for looking at.
"""

import csv
import hashlib
import json
import os
from pathlib import Path

import keras
import numpy as np

from oasis_vq.config import Config, Paths, PriorConfig, VQVAEConfig
from oasis_vq.pixelcnn import Drafter, PixelCNN
from oasis_vq.runtime import quiet_native_logs
from oasis_vq.slices import SliceIndex
from oasis_vq.vqvae import VQVAE

RESTARTED = "restarted"
"""Name of a file in a folder that is trained anew: what was begun so and stopped goes on."""
_CONFIGS: dict[str, type[Config]] = {"VQVAE": VQVAEConfig, "PixelCNN": PriorConfig}


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model: a text without a slash is one of `Paths.models`, anything else is the path."""
    return Paths().models / name if isinstance(name, str) and not {"/", os.sep} & set(name) else Path(name)


def load_vqvae(folder: str | Path) -> VQVAE:
    """Load a VQ-VAE from its folder, or from its name in `Paths.models`.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if it holds something else.
    """
    return load_model(model_folder(folder), "VQVAE")


def load_prior(folder: str | Path) -> PixelCNN:
    """Load a prior from its folder, or from its name in `Paths.models`, if its VQ-VAE is the one it was trained with.

    Raises:
        FileNotFoundError: if the folder, a file of it, or its VQ-VAE is missing.
        ValueError: if it holds something else, or the VQ-VAE has changed.
    """
    folder = model_folder(folder)
    prior = load_model(folder, "PixelCNN")
    _referred(folder, read_record(folder)["vqvae"], "VQ-VAE", "codes", "was trained on")
    return prior


def _referred(folder: Path, reference: dict[str, str], what: str, made: str, use: str) -> Path:
    """Return the folder of the model that the prior of a folder refers to, if it is there and the same."""
    file = Path(os.path.normpath(folder / reference["folder"])) / "model.keras"
    if not file.exists():
        raise FileNotFoundError(
            f"No {what} in {file.parent}, whose {made} the prior {folder} {use}. Put it back, or train the prior again."
        )
    if sha256(file) != reference["sha256"]:
        raise ValueError(
            f"{file} is not the {what} whose {made} the prior {folder} {use}: expected SHA-256 "
            f"{reference['sha256'][:12]}, found {sha256(file)[:12]}. Put the old one back, or train the prior again."
        )
    return file.parent


def read_record(folder: str | Path) -> dict:
    """Return the contents of a model folder's config.json: what it is, its configuration, and a prior's VQ-VAE."""
    file = model_folder(folder) / "config.json"
    if not file.exists():
        trained = f"; a training has begun in {file.parent}.partial" if Path(f"{file.parent}.partial").exists() else ""
        raise FileNotFoundError(
            f"No config.json in {file.parent}. Expected a model folder, as train-vqvae or train-prior make{trained}."
        )
    try:
        record = json.loads(file.read_text())
        _CONFIGS[record["model"]].from_dict(record["config"])
        if record["model"] == "PixelCNN" and not {"folder", "sha256"} <= set(record["vqvae"]):
            raise ValueError("a prior names its VQ-VAE's folder and sha256")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the configuration of a model ({error}). Train the model again.") from error
    return record


def vqvae_folder(prior_folder: str | Path) -> Path:
    """Return the folder of the VQ-VAE that a prior belongs to."""
    prior_folder = model_folder(prior_folder)
    return Path(os.path.normpath(prior_folder / read_record(prior_folder)["vqvae"]["folder"]))


def needed_folders(prior_folder: str | Path) -> list[Path]:
    """Return the folders of all models that samples of a prior are made with: its VQ-VAE, itself, those of its coarse
    grids."""
    folder = model_folder(prior_folder)
    own, coarse = [vqvae_folder(folder), folder], read_record(folder).get("coarse")
    return own + (needed_folders(os.path.normpath(folder / coarse["folder"])) if coarse else [])


def read_history(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the columns of a model folder's history.csv by name, one value an epoch."""
    with (model_folder(folder) / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def load_model(folder: Path, kind: str) -> VQVAE | PixelCNN:
    """Return the model of a folder, which must be a 'VQVAE' or a 'PixelCNN'."""
    record = read_record(folder)
    if record["model"] != kind:
        raise ValueError(f"{folder} holds a {record['model']}. Expected a {kind}.")
    file = folder / "model.keras"
    if not file.exists():
        raise FileNotFoundError(f"No model.keras in {folder}. Expected the weights of the {kind}: train it again.")
    try:
        with quiet_native_logs():
            model = keras.models.load_model(file)
    except Exception as error:  # Keras raises many kinds for a broken file; the user needs to know which file.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be loaded ({reason}). Train the model again.") from error
    model.folder = folder.absolute()
    if "coarse" in record:
        coarse = load_prior(_referred(folder, record["coarse"], "prior", "grids", "refines"))
        model.drafter = make_drafter(coarse, load_vqvae(vqvae_folder(folder)))
    return model


def make_drafter(coarse: PixelCNN, fine: VQVAE) -> Drafter:
    """Return what makes drafts for a prior over the codes of a fine VQ-VAE, from a coarse prior that was loaded."""
    return Drafter(coarse, load_vqvae(vqvae_folder(coarse.folder)), fine)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _reference(model: VQVAE | PixelCNN, prior_folder: Path) -> dict[str, str]:
    """Return what a prior's config.json says of a model it needs: the relative folder and the file's SHA-256."""
    folder = getattr(model, "folder", None)
    if folder is None:
        kind = "VQ-VAE" if isinstance(model, VQVAE) else "coarse prior"
        raise ValueError(f"A prior needs a saved {kind}: take the one that fit_or_load or a load function returned.")
    relative = os.path.relpath(folder, prior_folder)
    return {"folder": Path(relative).as_posix(), "sha256": sha256(folder / "model.keras")}


def refuse_other(folder: Path, record: dict, *, restart: bool) -> None:
    """Raise ValueError if a folder holds no model, or, unless it is replaced, one made otherwise than asked for."""
    found = read_record(folder)
    if restart:
        return
    if found["model"] != record["model"]:
        text = f"model: {found['model']}, not {record['model']}"
    else:
        config = _CONFIGS[record["model"]]
        text = config.from_dict(found["config"]).differences(config.from_dict(record["config"]))
    for part in ("data", "vqvae", "coarse"):
        before, now = found.get(part, {}), record.get(part, {})
        changed = [
            name for name in now if name not in ("name", "folder", "limit_train") and before.get(name) != now[name]
        ]
        if changed and not text:
            text = f"{part} {changed[0]}: {str(before.get(changed[0]))[:12]}, not {str(now[changed[0]])[:12]}"
    if text:
        raise ValueError(
            f"{folder} was trained otherwise ({text}). Use another name, what it was trained with, "
            "or restart=True (--restart) to replace it."
        )


def new_record(
    config: VQVAEConfig | PriorConfig,
    index: SliceIndex,
    folder: Path,
    vqvae: VQVAE | None,
    coarse: PixelCNN | None = None,
) -> dict:
    """Return what config.json says of a model: kind, configuration, data, a prior's VQ-VAE and the prior it refines."""
    if isinstance(config, PriorConfig):
        if vqvae is None:
            raise ValueError("A prior needs the VQ-VAE whose codes it learns. Received: vqvae=None.")
        if config != config.matched_to(vqvae.config):
            difference = config.differences(config.matched_to(vqvae.config))
            raise ValueError(f"The prior does not fit the VQ-VAE ({difference}): use config.matched_to(vqvae.config).")
    elif vqvae is not None:
        raise ValueError("A VQ-VAE is trained on slices alone. Received: vqvae beside a VQVAEConfig.")
    data = {split: index.splits()[split].fingerprint() for split in ("train", "validate")}
    record = {
        "model": "VQVAE" if vqvae is None else "PixelCNN",
        "config": config.to_dict(),
        "data": {"name": index.root.name, "num_train": len(index.train), **data},
    }
    if index.limit_train is not None:
        record["data"]["limit_train"] = index.limit_train
    if coarse is not None:
        _require_coarser(coarse, vqvae, folder)
    needed = {"vqvae": vqvae, "coarse": coarse}
    record |= {name: _reference(model, folder) for name, model in needed.items() if model is not None}
    for name in needed.keys() & record:
        note_other_split(needed[name].folder, index)
    return record


def _require_coarser(coarse: PixelCNN, fine: VQVAE, folder: Path) -> None:
    """Raise ValueError if a prior of a folder cannot refine what a coarse prior draws."""
    if coarse.folder.resolve() == folder.resolve():
        raise ValueError(f"A prior refines another one. Received: {folder} for both.")
    if coarse.config.refines:
        raise ValueError(f"There are two levels at most. Received: {coarse.folder}, which refines drafts itself.")
    of_coarse = VQVAEConfig.from_dict(read_record(vqvae_folder(coarse.folder))["config"])
    for name in ("image_size", "fit"):
        theirs, ours = getattr(of_coarse, name), getattr(fine.config, name)
        if theirs != ours:
            raise ValueError(f"The VQ-VAEs of two levels have one {name}. Received: {theirs} below {ours}.")
    if of_coarse.downsampling <= fine.config.downsampling:
        known = f"{of_coarse.downsampling}x below {fine.config.downsampling}x"
        raise ValueError(f"A coarse VQ-VAE downsamples more than the fine one. Received: {known}.")


def note_other_split(folder: Path, index: SliceIndex) -> bool:
    """Tell the user if a model of a folder was trained with another split than this, by its validation people, and
    return whether it was."""
    trained_with = read_record(folder)["data"]
    is_other = trained_with["validate"] != index.validate.fingerprint()
    if is_other:
        print(
            f"note: {folder.name} was trained with another split ({trained_with['name']}) than this "
            f"({index.root.name}): are there people of this validation or test among those it was trained on?"
        )
    return is_other


def in_use(folder: Path) -> bool:
    """Return whether a folder exists and has something in it."""
    if folder.is_file():
        raise OSError(f"{folder} is a file. Expected the folder of a model, or nothing.")
    return folder.exists() and any(folder.iterdir())
