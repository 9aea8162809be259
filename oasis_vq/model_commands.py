"""What the commands that train and use models do: one function each, its signature and docstring are its --help.

What takes seconds to import is imported where it is used: --help does not wait.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import DisallowNone, arg


def recipes() -> None:
    """Print the recipes: image size, code grid, codes, bits per image, parameters, and what the report claims, if any.

    Parameters are those of VQ-VAE and prior without slice positions and classes, which come from the data.
    """
    _start()
    from oasis_vq import pixelcnn, recipes, vqvae

    print(f"{'recipe':<17}{'image':>5}{'grid':>9}{'codes':>6}{'bits/image':>11}{'parameters':>20}{'epochs':>8}  what")
    for name in recipes.recipe_names():
        chosen = recipes.recipe(name)
        rows, columns = chosen.vqvae.grid_shape
        models = vqvae.VQVAE(chosen.vqvae), pixelcnn.PixelCNN(replace(chosen.prior, num_slices=0))
        parameters = " + ".join(f"{model.count_params():,}" for model in models)
        epochs = f"{chosen.vqvae.epochs}+{chosen.prior.epochs}"
        print(
            f"{name:<17}{chosen.vqvae.image_size:>5}{f'{rows}x{columns}':>9}{chosen.vqvae.num_embeddings:>6}"
            f"{chosen.vqvae.bits_per_image:>11,.0f}{parameters:>20}{epochs:>8}  {chosen.description}"
        )
        if chosen.reported:
            print(f"{'':<78}reported: {chosen.reported}")


def train_vqvae(
    data: Path,
    out: Path,
    recipe: str = "default128",
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    fit: Literal["pad", "stretch"] | None = None,
    upside_down_copies: DisallowNone[bool | None] = None,
    flip_left_right: DisallowNone[bool | None] = None,
    max_shift: int | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    skip_unreadable: bool = False,
    cache: bool = False,
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] | None = None,
    deterministic: bool = False,
    strategy: Literal["mirrored", "multiworker"] | None = None,
    workers: tuple[str, ...] = (),
    index: int | None = None,
    restart: bool = False,
) -> None:
    """Train a VQ-VAE; a training that was interrupted goes on by itself.

    Args:
        data: folder with slices in the OASIS or the ADNI layout.
        out: model folder to write.
        recipe: configuration to start from; `recipes` lists them.
        image_size: height and width that slices are resized to; None for the recipe's.
        epochs: passes over the training slices; None for the recipe's.
        batch_size: images per step; None for the recipe's.
        fit: what becomes of slices that are not square: black borders or another shape; None for the recipe's.
        upside_down_copies: whether each slice is there a second time, upside down; None for the recipe's.
        flip_left_right: whether half of the slices, drawn at random, are mirrored; None for the recipe's.
        max_shift: largest random shift in pixels; None for the recipe's.
        seed: of weights and order.
        limit_train: training subjects to use at most.
        skip_unreadable: whether files that cannot be decoded are left out instead of refused.
        cache: whether slices are decoded once, into a file: for GPUs that wait for the PNG files.
        precision: of the layers; mixed is faster on GPUs, mixed_bfloat16 on CPUs with AMX too; None for the recipe's.
        deterministic: whether the same command gives bit-identical weights on the same machine; slower on GPUs.
        strategy: all GPUs of this machine (mirrored), or several processes or machines, on each of which this command
            is given (multiworker); a batch is shared by all.
        workers: host:port of each process, the first is the chief; if not given, TF_CONFIG says.
        index: which of the workers this process is, from 0.
        restart: whether to train anew; the model at `out` is replaced when the new one is complete. A restart that was
            stopped goes on when it is given again; remove `<out>.partial` to begin that anew, too.
    """
    device, devices = _start(seed, deterministic=deterministic), _devices(strategy, workers, index)
    from oasis_vq import recipes

    given = {
        "image_size": image_size, "epochs": epochs, "batch_size": batch_size, "fit": fit, "seed": seed,
        "upside_down_copies": upside_down_copies, "flip_left_right": flip_left_right, "max_shift": max_shift,
        "precision": precision,
    }  # fmt: skip
    config = _with_given(recipes.recipe(recipe).vqvae, given)
    slices = _find(data, limit_train, skip_unreadable=skip_unreadable)
    _train(out, config, slices, device=device, restart=restart, cache=cache, strategy=devices)


def encode(
    data: Path,
    vqvae: Path,
    out: Path = Path("codes.npz"),
    limit_train: int | None = None,
    skip_unreadable: bool = False,
) -> None:
    """Write the codes of all slices, with slice position, label, subject and split.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: the .npz file to write.
        limit_train: training subjects to use at most.
        skip_unreadable: whether files that cannot be decoded are left out instead of refused.
    """
    _require_file(out)
    _start()
    from oasis_vq import folders
    from oasis_vq.codes import encode_index
    from oasis_vq.guard import check_readable

    index = _find(data, limit_train, skip_unreadable=skip_unreadable)
    check_readable(*index.splits().values())
    codes = encode_index(folders.load_vqvae(vqvae), index)
    out.parent.mkdir(parents=True, exist_ok=True)
    codes.save(out)
    print(f"{out}: codes {codes.codes.shape}")


def train_prior(
    data: Path,
    vqvae: Path,
    out: Path,
    coarse: Path | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    condition_on: tuple[Literal["slice_index", "label"], ...] | None = None,
    patience: int | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    skip_unreadable: bool = False,
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] | None = None,
    deterministic: bool = False,
    strategy: Literal["mirrored", "multiworker"] | None = None,
    workers: tuple[str, ...] = (),
    index: int | None = None,
    restart: bool = False,
) -> None:
    """Train a PixelCNN prior over the codes of a VQ-VAE; a training that was interrupted goes on by itself.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: model folder to write.
        coarse: model folder of a prior over the codes of a coarser VQ-VAE, whose samples this one refines.
        recipe: configuration to start from; None for the one that the VQ-VAE came from.
        epochs: passes over the training slices; None for the recipe's.
        batch_size: code grids per step; None for the recipe's.
        condition_on: what the prior is told of a grid where the data have it, or nothing; None for the recipe's.
        patience: epochs without a better validation after which the training ends; None for the recipe's, 0 for never.
        seed: of weights and order.
        limit_train: training subjects to use at most.
        skip_unreadable: whether files that cannot be decoded are left out instead of refused.
        precision: of the layers; mixed is faster on GPUs, mixed_bfloat16 on CPUs with AMX too; None for the recipe's.
        deterministic: whether the same command gives bit-identical weights on the same machine; slower on GPUs.
        strategy: all GPUs of this machine (mirrored), or several processes or machines, on each of which this command
            is given (multiworker); a batch is shared by all.
        workers: host:port of each process, the first is the chief; if not given, TF_CONFIG says.
        index: which of the workers this process is, from 0.
        restart: whether to train anew; the model at `out` is replaced when the new one is complete. A restart that was
            stopped goes on when it is given again; remove `<out>.partial` to begin that anew, too.
    """
    device, devices = _start(seed, deterministic=deterministic), _devices(strategy, workers, index)
    from oasis_vq import folders, recipes

    model = folders.load_vqvae(vqvae)
    given = {"epochs": epochs, "batch_size": batch_size, "condition_on": condition_on, "seed": seed}
    given |= {"precision": precision, "patience": patience}
    config = _with_given(recipes.recipe(recipe or model.config.recipe).prior.matched_to(model.config), given)
    slices = _find(data, limit_train, skip_unreadable=skip_unreadable)
    level = None if coarse is None else folders.load_prior(coarse)
    _train(out, config, slices, device=device, vqvae=model, coarse=level, restart=restart, strategy=devices)


def search(
    data: Path,
    out: Path,
    recipe: str | None = None,
    vqvae: Path | None = None,
    grid: tuple[str, ...] = (),
    quick: bool = False,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    skip_unreadable: bool = False,
    deterministic: bool = False,
    restart: bool = False,
) -> None:
    """Train every combination of some values, choose in validation, and score the winner on test; goes on by itself.

    The highest brain_ssim is chosen, of priors the fewest bits per code. Writes a model folder for each candidate,
    search.json, and the candidates' losses as search.png and search.pdf.

    Args:
        data: folder with the slices.
        out: folder of the search.
        recipe: configuration to start from, with the grid of its report if that searched; None for bce_search, or with
            a VQ-VAE for the recipe it came from.
        vqvae: model folder of a VQ-VAE, to search among priors of its codes; None searches among VQ-VAEs.
        grid: fields and values to try in place of the recipe's, such as: embedding_dim=10,25 quantizer=gradient,ema
            'channels=(16,32),(32,32)'.
        quick: whether to use the small version of the recipe.
        image_size: height and width that slices are resized to; None for the recipe's.
        epochs: passes over the training slices for each candidate; None for the recipe's.
        batch_size: images or code grids per step; None for the recipe's.
        seed: of weights and order.
        limit_train: training subjects to use at most.
        skip_unreadable: whether files that cannot be decoded are left out instead of refused.
        deterministic: whether the same command gives bit-identical weights on the same machine; slower on GPUs.
        restart: whether to train all candidates anew; one that was stopped at that goes on when it is given again.
    """
    _start(seed, deterministic=deterministic)
    from oasis_vq import figures, folders, plots, recipes
    from oasis_vq import search as searching

    model = None if vqvae is None else folders.load_vqvae(vqvae)
    name = recipe or (model.config.recipe if model else "bce_search")
    chosen = recipes.recipe(name, profile="quick" if quick else "full")
    given = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    if model is None:
        config, tried = _with_given(chosen.vqvae, {**given, "image_size": image_size}), chosen.grid
    elif image_size is not None:
        raise ValueError("--image-size is that of the VQ-VAE in a search among priors: leave it out.")
    else:
        config, tried = _with_given(chosen.prior.matched_to(model.config), given), chosen.prior_grid
    tried = _grid_of(grid) or tried
    if not tried:
        raise ValueError(f"The recipe {name} has no grid: give one, such as --grid learning_rate=1e-4,1e-3.")
    index = _find(data, limit_train, skip_unreadable=skip_unreadable)
    found = searching.grid_search(out, config, tried, index, vqvae=model, restart=restart)
    trained = [row["name"] for row in found["candidates"] if "seconds" in row]
    column = "val_reconstruction_loss" if model is None else "val_bits_per_code"
    histories = {name: folders.read_history(out / name) for name in trained}
    figures.save_figure(plots.plot_candidates(histories, column), "search", folder=out)
    print(searching.table(found))


def reconstruct(data: Path, vqvae: Path, out: Path, num: int = 8, seed: int = 0) -> None:
    """Write a figure of test slices, their codes, reconstructions and errors, as PNG and PDF.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: figure to write; .png and .pdf are made.
        num: slices shown.
        seed: of the choice of slices.
    """
    _require_file(out)
    _start()
    import numpy as np

    from oasis_vq import figures, folders, guard, metrics, plots, slices, streams

    if num < 1:
        raise ValueError(f"num is at least 1. Received: {num}.")
    test, model = slices.find_slices(data).test, folders.load_vqvae(vqvae)
    chosen = test[np.sort(np.random.default_rng(seed).permutation(len(test))[:num])]
    guard.check_readable(chosen)
    images = streams.load_images(chosen, image_size=model.config.image_size, fit=model.config.fit)
    codes = model.encode(images)
    again = model.decode(codes)
    figure = plots.plot_reconstructions(
        images, codes, again,
        num_embeddings=model.config.num_embeddings, scores=metrics.ssim_per_image(images, again)[1],
    )  # fmt: skip
    name = out.stem if out.suffix.lower() in (".png", ".pdf") else out.name
    figures.save_figure(figure, name, folder=out.parent)
    print(
        f"{out.with_name(f'{name}.png')}: {len(images)} test slices, brain_ssim {metrics.brain_ssim(images, again):.3f}"
    )


def generate(
    prior: Path,
    out: Path,
    num: Annotated[int, arg(aliases=["-n"])] = 16,
    seed: int = 0,
    slice_index: int | None = None,
    label: Literal["NC", "AD"] | None = None,
    unconditional: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Draw new brains: grid.png, sample_00.png and so on, codes.npz and provenance.json.

    Args:
        prior: model folder of the prior.
        out: folder to write.
        num: how many.
        seed: the same seed gives the same brains.
        slice_index: slice position, as in the names of the training slices; None draws one for each.
        label: class, for a prior that was trained with classes; None draws one for each.
        unconditional: whether the prior is told neither position nor class.
        temperature: below 1 more likely and less diverse; at least 1e-6.
        top_k: draw from the k most likely codes only.
        top_p: draw from the most likely codes that reach this probability only.
    """
    _start()
    import imageio.v3 as iio
    import numpy as np

    from oasis_vq import figures, folders, plots, reports, sampling
    from oasis_vq.codes import Codes
    from oasis_vq.files import write_json, write_whole
    from oasis_vq.slices import LABELS, UNKNOWN

    model = folders.load_prior(prior)
    vqvae = model.drafter.fine if model.drafter else folders.load_vqvae(folders.vqvae_folder(prior))
    asked = {"slice_index": slice_index, "label": None if label is None else LABELS.index(label)}
    if unconditional:
        if not model.config.condition_dropout:
            raise ValueError(f"{prior} was told position and class of every grid: it cannot draw without them.")
        if slice_index is not None or label is not None:
            raise ValueError("--unconditional is without --slice-index and --label: leave them out.")
        asked = dict.fromkeys(asked, UNKNOWN)
    options = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, **asked}
    codes = sampling.sample_codes(model, num, **options)
    images = vqvae.decode(codes)
    out.mkdir(parents=True, exist_ok=True)
    if any((out / name).exists() for name in ("codes.npz", "provenance.json")):
        # What an earlier call left is not to be mixed with what this one makes, even if it is stopped.
        for old in (*out.glob("sample_*.png"), *(out / name for name in ("grid.png", "grid.pdf", "provenance.json"))):
            old.unlink(missing_ok=True)
    conditions = sampling.sample_conditions(model, num, seed=seed, **asked)
    nobody = np.full(num, "")
    Codes(codes=codes, subject=nobody, split=nobody, **conditions).save(out / "codes.npz")
    digits = max(2, len(str(num - 1)))
    for number, image in enumerate(images):
        png = iio.imwrite("<bytes>", np.round(image[..., 0] * 255).astype(np.uint8), extension=".png")
        write_whole(out / f"sample_{number:0{digits}}.png", png)
    figures.save_figure(plots.plot_slices(images), "grid", folder=out)
    made_with = reports.provenance(folders.needed_folders(prior))
    write_json(out / "provenance.json", {**made_with, "num": num, **options})
    print(f"{out / 'grid.png'}: {num} samples")


def evaluate(
    model: tyro.conf.Positional[Path],
    data: Path,
    split: Literal["test", "validate"] = "test",
    limit_train: int | None = None,
    skip_unreadable: bool = False,
) -> None:
    """Score a VQ-VAE or a prior on the test split beside its baselines; writes metrics.json in the model folder, unless
    the slices are in another split than those that it was trained with.

    A prior is scored by the bits a code costs, by its samples, and by how it tells slices with planted lesions.
    Choose by validation, as often as you like, and score the test split once.

    Args:
        model: model folder.
        data: folder with the slices.
        split: whose slices are scored; for validate without a prior's samples and lesions, and nothing is written.
        limit_train: training subjects to use at most, for the baselines.
        skip_unreadable: whether files that cannot be decoded are left out instead of refused.
    """
    _start()
    from oasis_vq import reports

    index = _find(data, limit_train, skip_unreadable=skip_unreadable)
    report = (
        reports.evaluate_model(model, index, again=True) if split == "test" else reports.validate_model(model, index)
    )
    print(f"{model.name}, {split} split of {index.root.name}\n")
    print("\n\n".join(reports.report_texts(report)))


def _require_file(out: Path) -> None:
    """Raise ValueError if what is to be a file is a folder."""
    if out.is_dir():
        raise ValueError(f"--out is a file to write. Received: {out}, which is a folder.")


def _start(seed: int = 0, *, deterministic: bool = False) -> str:
    """Import TensorFlow quietly and return the devices; figures are drawn without a screen."""
    import matplotlib as mpl

    from oasis_vq.runtime import start_tensorflow

    mpl.use("Agg")
    return start_tensorflow(seed, deterministic=deterministic)


def _devices(strategy: str | None, workers: tuple[str, ...], index: int | None):
    if strategy is None:
        if workers or index is not None:
            raise ValueError("--workers and --index are given with --strategy multiworker.")
        return None
    from oasis_vq.devices import make_strategy

    return make_strategy(strategy, workers=workers, index=index)


def _find(data: Path, limit_train: int | None, *, skip_unreadable: bool):
    from oasis_vq import guard, slices

    index = slices.find_slices(data, limit_train=limit_train)
    if skip_unreadable:
        index, dropped = guard.without_unreadable(index)
        for path in dropped:
            print(f"note: {path} cannot be decoded: left out")
    return index


def _with_given(config, given: dict):
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _grid_of(words: tuple[str, ...]) -> dict:
    """Return the grid that words such as 'embedding_dim=10,25' ask for."""
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values) or name in grid:
            raise ValueError(f"A grid is given as field=value,value, each field once. Received: {word}.")
        try:
            grid[name] = ast.literal_eval(f"({values},)")
        except (SyntaxError, ValueError):
            grid[name] = tuple(values.split(","))
    return grid


def _train(out: Path, config, index, **options) -> None:
    from oasis_vq import training

    print(f"{index}\ndevice: {options.pop('device')}")
    training.fit_or_load(out, config, index, **options)
    metrics = json.loads((out / "metrics.json").read_text())
    print(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("val_")))
