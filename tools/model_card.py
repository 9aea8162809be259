"""Write the model card of a model folder, its README.md, from what the folder knows: no number is typed in.

python -m oasis_vq evaluate saved_models/ixi128 --data data/ixi_png      scores it first
python tools/model_card.py saved_models/ixi128 --data "..." --machine "2 cores, AVX2"
"""

import argparse
import inspect
import json
import os
import shlex
from pathlib import Path

from oasis_vq.config import PriorConfig, VQVAEConfig
from oasis_vq.folders import read_history, read_record, vqvae_folder
from oasis_vq.model_commands import train_prior, train_vqvae
from oasis_vq.recipes import recipe
from oasis_vq.reports import report_texts

COMMANDS = {
    "VQVAE": "train-vqvae --data {data} --recipe {recipe}{options} --out {folder}",
    "PixelCNN": "train-prior --data {data} --vqvae {vqvae} --recipe {recipe}{options} --out {folder}",
}
FROM_DATA = (
    "grid_shape", "num_embeddings", "refines", "first_slice", "num_slices", "num_labels",
)  # fmt: skip
"""Fields of a prior that come from the slices, from the VQ-VAE and from the prior it refines."""
WHAT = {
    "VQVAE": "VQ-VAE: slices to grids of codes and back. `ovq.load_vqvae({name!r})` loads it.",
    "PixelCNN": "PixelCNN prior over the codes of [{vqvae.name}](../{vqvae.name}): new grids of codes, conditional on "
    "slice position. `python -m oasis_vq generate --prior {folder} --out new_brains` draws brains.",
}

SAMPLES = (
    "**Samples** beside reconstructions of test slices (`test`), at the same slice positions; the ceiling is "
    "reconstructions of other people, the floor draws each code from the histogram of its place. A classifier's "
    "accuracy is 0.5 if it cannot tell samples from them, `_whole` is against the slices themselves; what each score "
    "is says `help(ovq.evaluate_samples)`."
)


def beyond_recipe(kind: str, values: dict) -> tuple[str, str]:
    """Return in what a configuration is not its recipe's: as options of the command, and what none of them can say."""
    command, own, part = {
        "VQVAE": (train_vqvae, VQVAEConfig, "vqvae"),
        "PixelCNN": (train_prior, PriorConfig, "prior"),
    }[kind]
    usual = getattr(recipe(values["recipe"]), part).to_dict()
    changed = {name: value for name, value in own.from_dict(values).to_dict().items()
               if value != usual[name] and name not in FROM_DATA}  # fmt: skip
    options, rest = "", []
    for name, value in changed.items():
        if name not in inspect.signature(command).parameters or value == []:
            rest.append(f"`{name} = {value}`")
        else:
            words = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
            options += " ".join(["", f"--{'no-' if value is False else ''}{name.replace('_', '-')}", *map(str, words)])
    return options, " and ".join(rest)


def card(folder: Path, data: str, machine: str) -> str:
    """Return the text of a card."""
    record, metrics = read_record(folder), json.loads((folder / "metrics.json").read_text())
    config, kind, seconds = record["config"], record["model"], read_history(folder)["seconds"]
    names = {
        "folder": folder.as_posix(), "name": folder.name, "recipe": config["recipe"],
        "data": f"data/{record['data']['name']}", "vqvae": vqvae_folder(folder) if kind == "PixelCNN" else None,
    }  # fmt: skip
    scores, *samples = report_texts(metrics)
    options, rest = beyond_recipe(kind, config)
    what = WHAT[kind].format(**names)
    if "coarse" in record:
        coarse = Path(os.path.normpath(folder / record["coarse"]["folder"]))
        options = f" --coarse {shlex.quote(str(coarse))}{options}"
        what += f" The second of two levels: it refines the samples of [{coarse.name}](../{coarse.name})."
    if "limit_train" in record["data"]:
        options += f" --limit-train {record['data']['limit_train']}"
    quoted = {name: shlex.quote(str(value)) for name, value in names.items()}
    command = COMMANDS[kind].format(**quoted, options=options)
    scoring = f"evaluate {quoted['folder']} --data {quoted['data']}"
    made = f"Made with {rest} set in Python" if rest else "Made"
    slow = (
        "In bfloat16 for speed: without a GPU, or a CPU with AMX, leave `--precision` out. Where there is no AVX-512 "
        "either, its gradients take over ten times as long as those of float32."
    )
    parts = [
        f"# {folder.name}",
        what,
        "**Not for clinical use**, nor for any statement about a person: pictures are what a small model makes of "
        "the slices below, with the errors that the scores tell.",
        f"**Data.** {data} Trained on the {record['data']['num_train']:,} slices of the training people alone; "
        "the epoch was chosen on validation people; test people were scored at the end.",
        f"**Training.** Recipe `{config['recipe']}`, seed {config['seed']}, "
        f"{metrics['num_parameters']:,.0f} parameters, {len(seconds)} epochs, {machine}. {made} by",
        f"```\npython -m oasis_vq {command}\npython -m oasis_vq {scoring}\n```",
        *([slow] if config["precision"] == "mixed_bfloat16" else []),
        "**Scores on the test split** (95 % bootstrap intervals over people where there are any):",
        f"```\n{scores}\n```",
    ]
    if samples:
        parts += [SAMPLES, f"```\n{samples[0]}\n```"]
        parts.append("![Samples under their codes](samples.png)")
    else:
        parts.append("![Validation slices over their reconstructions](reconstructions.png)")
    settings = "\n".join(f"{name} = {value}" for name, value in config.items())
    parts.append(f"<details><summary>Configuration</summary>\n\n```\n{settings}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--data", required=True, help="sentences: whose slices, under which licence")
    parser.add_argument("--machine", required=True, help="where it was trained, and for how long")
    arguments = parser.parse_args()
    (arguments.folder / "README.md").write_text(card(arguments.folder, arguments.data, arguments.machine), "utf-8")


if __name__ == "__main__":
    main()
