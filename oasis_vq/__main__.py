"""The command line: python -m oasis_vq COMMAND. Errors are one line on stderr; exit status 0 or 1."""

import contextlib
import functools
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg


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


def recipes() -> None:
    """Print the recipes: image size, code grid, codes, bits per image and what each is."""
    import math

    from oasis_vq.recipes import recipe, recipe_names

    print(f"{'recipe':<14}{'image':>6}{'grid':>9}{'codes':>7}{'bits/image':>12}{'epochs':>8}  what")
    for name in recipe_names():
        chosen = recipe(name)
        rows, columns = chosen.vqvae.grid_shape
        bits = math.log2(chosen.vqvae.num_embeddings) * rows * columns
        print(
            f"{name:<14}{chosen.vqvae.image_size:>6}{f'{rows}x{columns}':>9}{chosen.vqvae.num_embeddings:>7}"
            f"{bits:>12,.0f}{f'{chosen.vqvae.epochs}+{chosen.prior.epochs}':>8}  {chosen.description}"
        )


def train_vqvae(
    data: Path,
    out: Path,
    recipe: str = "default128",
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    restart: bool = False,
) -> None:
    """Train a VQ-VAE; a training that was interrupted goes on by itself.

    Args:
        data: folder with keras_png_slices_train, _validate and _test.
        out: model folder to write.
        recipe: configuration to start from; `recipes` lists them.
        image_size: height and width that slices are resized to; None for the recipe's.
        epochs: passes over the training slices; None for the recipe's.
        batch_size: images per step; None for the recipe's.
        seed: of weights and order.
        restart: whether to train anew; the model at `out` is replaced when the new one is complete.
    """
    device = _start(seed)
    from oasis_vq import recipes, slices

    given = {"image_size": image_size, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    config = replace(
        recipes.recipe(recipe).vqvae, **{name: value for name, value in given.items() if value is not None}
    )
    _train(out, config, slices.find_slices(data), device=device, restart=restart)


def encode(data: Path, vqvae: Path, out: Path = Path("codes.npz")) -> None:
    """Write the codes of all slices, with slice position, label, subject and split.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: the .npz file to write.
    """
    _start()
    from oasis_vq import folders, slices
    from oasis_vq.codes import encode_index

    index = slices.find_slices(data)
    for part in index.splits().values():
        slices.check_readable(part)
    codes = encode_index(folders.load_vqvae(vqvae), index)
    out.parent.mkdir(parents=True, exist_ok=True)
    codes.save(out)
    print(f"{out}: codes {codes.codes.shape}")


def train_prior(
    data: Path,
    vqvae: Path,
    out: Path,
    recipe: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    num_slices: int | None = None,
    seed: int = 0,
    restart: bool = False,
) -> None:
    """Train a PixelCNN prior over the codes of a VQ-VAE; a training that was interrupted goes on by itself.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: model folder to write.
        recipe: configuration to start from; None for the one that the VQ-VAE came from.
        epochs: passes over the training slices; None for the recipe's.
        batch_size: code grids per step; None for the recipe's.
        num_slices: slice positions to condition on, 0 for none; None for the recipe's.
        seed: of weights and order.
        restart: whether to train anew; the model at `out` is replaced when the new one is complete.
    """
    device = _start(seed)
    from oasis_vq import folders, recipes, slices

    model = folders.load_vqvae(vqvae)
    given = {"epochs": epochs, "batch_size": batch_size, "num_slices": num_slices, "seed": seed}
    config = recipes.recipe(recipe or model.config.recipe).prior.matched_to(model.config)
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    _train(out, config, slices.find_slices(data), device=device, vqvae=model, restart=restart)


def reconstruct(data: Path, vqvae: Path, out: Path, num: int = 8, seed: int = 0) -> None:
    """Write a figure of test slices, their codes, reconstructions and errors, as PNG and PDF.

    Args:
        data: folder with the slices.
        vqvae: model folder of the VQ-VAE.
        out: figure to write; .png and .pdf are made.
        num: slices shown.
        seed: of the choice of slices.
    """
    _start()
    import numpy as np

    from oasis_vq import folders, metrics, plots, slices

    if num < 1:
        raise ValueError(f"num is at least 1. Received: {num}.")
    index, model = slices.find_slices(data), folders.load_vqvae(vqvae)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(index.test))[:num])
    slices.check_readable(index.test[chosen])
    images = slices.load_images(index.test[chosen], image_size=model.config.image_size)
    codes = model.encode(images)
    again = model.decode(codes)
    figure = plots.plot_reconstructions(
        images, codes, again,
        num_embeddings=model.config.num_embeddings, scores=metrics.ssim_per_image(images, again)[1],
    )  # fmt: skip
    plots.save_figure(figure, out.with_suffix("").name, folder=out.parent)
    print(f"{out.with_suffix('.png')}: {len(images)} test slices, brain_ssim {metrics.brain_ssim(images, again):.3f}")


def generate(
    prior: Path,
    out: Path,
    num: Annotated[int, arg(aliases=["-n"])] = 16,
    seed: int = 0,
    slice_index: int | None = None,
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
        slice_index: slice position; None draws one for each.
        temperature: below 1 more likely and less diverse.
        top_k: draw from the k most likely codes only.
        top_p: draw from the most likely codes that reach this probability only.
    """
    _start()
    import imageio.v3 as iio
    import numpy as np

    from oasis_vq import __version__, folders, plots, sampling
    from oasis_vq.codes import Codes
    from oasis_vq.config import write_json

    model = folders.load_prior(prior)
    vqvae = folders.load_vqvae(folders.vqvae_folder(prior))
    options = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "slice_index": slice_index}
    codes = sampling.sample_codes(model, num, **options)
    images = vqvae.decode(codes)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "provenance.json").exists():  # samples of an earlier call are not to be mixed with these
        for old in out.glob("sample_*.png"):
            old.unlink()
    digits = max(2, len(str(num - 1)))
    for number, image in enumerate(images):
        iio.imwrite(out / f"sample_{number:0{digits}}.png", np.round(image[..., 0] * 255).astype(np.uint8))
    conditions = sampling.sample_conditions(model, num, seed=seed, slice_index=slice_index)
    nobody = np.full(num, "")
    Codes(codes=codes, subject=nobody, split=nobody, **conditions).save(out / "codes.npz")
    plots.save_figure(plots.plot_slices(images), "grid", folder=out)
    write_json(
        out / "provenance.json",
        {"oasis_vq": __version__, "prior": folders.read_record(prior), "num": num, **options},
    )
    print(f"{out / 'grid.png'}: {num} samples")


def evaluate(model: tyro.conf.Positional[Path], data: Path) -> None:
    """Score a VQ-VAE or a prior on the test split beside its baselines; writes metrics.json in the model folder.

    Args:
        model: model folder.
        data: folder with the slices.
    """
    _start()
    from oasis_vq import evaluation, folders, slices
    from oasis_vq.config import write_json

    index = slices.find_slices(data)
    if folders.read_record(model)["model"] == "VQVAE":
        report = evaluation.evaluate_reconstruction(folders.load_vqvae(model), index.test, train=index.train)
    else:
        prior = folders.load_prior(model)
        report = evaluation.evaluate_prior(prior, folders.load_vqvae(folders.vqvae_folder(model)), index)
    file = model / "metrics.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {**known, **report})
    print(evaluation.table(report))


COMMANDS = {
    "phantom": phantom,
    "recipes": recipes,
    "train-vqvae": train_vqvae,
    "encode": encode,
    "train-prior": train_prior,
    "reconstruct": reconstruct,
    "generate": generate,
    "evaluate": evaluate,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status, 0 or 1."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            command = tyro.extras.subcommand_cli_from_dict(
                {name: _later(function) for name, function in COMMANDS.items()},
                args=arguments,
                prog="python -m oasis_vq",
                description=__doc__,
            )
    except SystemExit as stop:  # tyro's: --help, or words that do not fit, which it says in a box
        text = " ".join(re.sub("[─│╭╮╰╯]", " ", words.getvalue()).split())
        if stop.code:
            print(text.replace("For full helptext, run:", "Help:"), file=sys.stderr)
        return 1 if stop.code else 0
    try:
        command()
    except KeyboardInterrupt:
        trains = command.func in (train_vqvae, train_prior)
        hint = " The same command again goes on after the last finished epoch." if trains else ""
        print(f"Stopped.{hint}", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, *_native_errors())):
            raise  # a fault of ours: its traceback is wanted
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _native_errors() -> tuple[type[Exception], ...]:
    """Return the errors of TensorFlow's native code, if TensorFlow has been imported."""
    return (sys.modules["tensorflow"].errors.OpError,) if "tensorflow" in sys.modules else ()


def _later(function: Callable) -> Callable:
    """Return a function with the same signature that only remembers its arguments."""

    @functools.wraps(function)
    def remember(*values, **named) -> Callable:
        return functools.partial(function, *values, **named)

    return remember


def _start(seed: int = 0) -> str:
    """Import TensorFlow quietly and return the devices; figures are drawn without a screen."""
    import matplotlib as mpl

    from oasis_vq.config import start_tensorflow

    mpl.use("Agg")
    return start_tensorflow(seed)


def _train(out: Path, config, index, **options) -> None:
    from oasis_vq import training

    print(f"{index}\ndevice: {options.pop('device')}")
    training.fit_or_load(out, config, index, **options)
    metrics = json.loads((out / "metrics.json").read_text())
    print(f"{out}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("val_")))


if __name__ == "__main__":
    sys.exit(main())
