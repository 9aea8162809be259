"""Grid search: a training for every combination of values, the best in validation, and one test score at the end."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oasis_vq.config import PriorConfig, VQVAEConfig
from oasis_vq.evaluation import evaluate_prior, evaluate_reconstruction
from oasis_vq.files import write_json
from oasis_vq.folders import RESTARTED, model_folder, read_history, sha256
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.slices import SliceIndex
from oasis_vq.training import fit_or_load
from oasis_vq.vqvae import VQVAE


def candidates(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Return the changes that each combination of a grid's values makes, by name; the last field varies fastest."""
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return {",".join(f"{name}={value}" for name, value in changes.items()): changes for changes in combinations}


def grid_search(
    name: str | Path,
    config: VQVAEConfig | PriorConfig,
    grid: Mapping[str, Sequence[Any]],
    index: SliceIndex,
    *,
    vqvae: VQVAE | None = None,
    restart: bool = False,
) -> dict:
    """Train a model for every combination of values, and score the one that is best in validation on the test split.

    Each candidate is a model folder of `fit_or_load` inside that of the search, named by its values: a search that was
    stopped goes on by itself, and one with more values trains what is new. A candidate whose loss is no longer a
    number, or which does not fit into memory, loses.

    Args:
        name: of the folder in `Paths.models`, or a path.
        config: what all candidates share.
        grid: {field of the configuration: values to try}.
        index: the slices; the winner alone sees test.
        vqvae: for a search among priors, the VQ-VAE whose codes they learn.
        restart: whether to train all candidates anew; a search that was stopped at that goes on with it.

    Returns:
        What the folder's search.json holds: `candidates`, best first, each with `name`, `changes`, what it scores in
        validation (brain_ssim and ssim of a VQ-VAE, bits_per_code and accuracy of a prior, the first of which decides;
        NaN if it could not be trained) and `seconds` of training; `test`: the winner's report, of
        `evaluate_reconstruction` or `evaluate_prior`.

    Raises:
        ValueError: if a value is impossible, or no candidate could be trained; as `fit_or_load` besides.
    """
    if not grid or not all(grid.values()):
        raise ValueError(f"A grid has a field or more, and a value or more for each. Received: {dict(grid)}.")
    folder = model_folder(name)
    shared = config.to_dict()
    chosen = candidates(grid)
    configs = {label: type(config).from_dict({**shared, **changes}) for label, changes in chosen.items()}
    rows, failure = [], ""
    restarted = folder / RESTARTED
    splits = list(index.fingerprints().values())
    codes_of = getattr(vqvae, "folder", None)
    asked = json.dumps([shared, splits, codes_of and sha256(codes_of / "model.keras")])
    if restarted.exists() and restarted.read_text() != asked:
        restarted.unlink()
    if restart and not restarted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        restarted.write_text(asked)
    for label, changes in tqdm(chosen.items(), "search", unit="candidate"):
        row: dict[str, Any] = {"name": label, "changes": changes}
        anew = restart and not _is_newer(folder / label / "config.json", restarted)
        try:
            row |= _scores(fit_or_load(folder / label, configs[label], index, vqvae=vqvae, restart=anew), index)
            row["seconds"] = float(read_history(folder / label)["seconds"].sum())
        except (FloatingPointError, MemoryError) as error:
            failure = str(error)
            print(f"note: {failure}")
            row["brain_ssim" if vqvae is None else "bits_per_code"] = math.nan
        rows.append(row)
    rows.sort(key=_loss)
    if not math.isfinite(_loss(rows[0])):
        raise ValueError(f"No candidate in {folder} could be trained. The last: {failure}")
    winner = fit_or_load(folder / rows[0]["name"], configs[rows[0]["name"]], index, vqvae=vqvae)
    if vqvae is None:
        test = evaluate_reconstruction(winner, index.test, train=index.train)
    else:
        test = evaluate_prior(winner, vqvae, index)
    found = {"candidates": rows, "test": test}
    write_json(folder / "search.json", found)
    if restart:
        restarted.unlink(missing_ok=True)
    return found


def _is_newer(file: Path, other: Path) -> bool:
    return file.exists() and file.stat().st_mtime_ns > other.stat().st_mtime_ns


def _loss(row: dict[str, Any]) -> float:
    """Return what is least for the winner."""
    value = row["bits_per_code"] if "bits_per_code" in row else -row["brain_ssim"]
    return value if math.isfinite(value) else math.inf


def _scores(model: VQVAE | PixelCNN, index: SliceIndex) -> dict[str, float]:
    """Return a candidate's scores in validation; those of a VQ-VAE are made once, and kept in its metrics.json."""
    file = model.folder / "metrics.json"
    known = json.loads(file.read_text())
    if isinstance(model, PixelCNN):
        return {name: known[f"val_{name}"] for name in ("bits_per_code", "accuracy")}
    names = ("brain_ssim", "ssim")
    if not {f"validate_{name}" for name in names} <= set(known):
        report = evaluate_reconstruction(model, index.validate, train=index.train)
        known |= {f"validate_{name}": report[name] for name in names}
        write_json(file, known)
    return {name: math.nan if known[f"validate_{name}"] is None else known[f"validate_{name}"] for name in names}


def table(found: dict) -> str:
    """Return a search's result as a text table, the winner first, and its test scores below."""
    rows = found["candidates"]
    names = [name for name in ("brain_ssim", "ssim", "bits_per_code", "accuracy") if name in rows[0]]
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'candidate, scores in validation':<{width}}" + "".join(f"{name:>15}" for name in names) + f"{'min':>8}"]
    for row in rows:
        trained = "seconds" in row
        cells = "".join(f"{row[name]:>15.3f}" if trained else f"{'':>15}" for name in names)
        lines.append(f"{row['name']:<{width}}{cells}" + (f"{row['seconds'] / 60:>8.1f}" if trained else "  failed"))
    scores = ", ".join(f"{name} {found['test'][name]:.3f}" for name in names)
    return "\n".join([*lines, f"The winner on the test split: {scores}."])
