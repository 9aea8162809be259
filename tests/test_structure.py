"""The shape of the library: imports point one way, and importing it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import oasis_vq

PACKAGE = Path(oasis_vq.__file__).parent
ALLOWED = {
    "files": set(),
    "runtime": set(),
    "config": {"runtime", "slices"},  # slices for a type hint alone
    "recipes": {"config"},
    "slices": set(),
    "streams": {"config", "slices"},
    "guard": {"slices"},
    "workers": {"files"},
    "phantom": {"config", "files", "slices", "workers"},
    "volumes": {"config"},
    "subjects": {"slices", "volumes"},
    "ingest": {"files", "slices", "subjects", "volumes", "workers"},
    "download": {"files"},
    "devices": set(),
    "quantizer": set(),
    "vqvae": {"config", "devices", "quantizer", "runtime"},
    "causal": set(),
    "pixelcnn": {"causal", "config", "devices", "runtime", "vqvae"},
    "sampling": {"pixelcnn", "vqvae"},
    "metrics": set(),
    "codes": {"config", "files", "pixelcnn", "slices", "streams", "vqvae"},
    "folders": {"config", "pixelcnn", "runtime", "slices", "vqvae"},
    "callbacks": {"files", "pixelcnn", "sampling", "vqvae"},
    "preparation": {
        "callbacks", "codes", "config", "devices", "folders", "pixelcnn", "slices", "streams", "vqvae"
    },
    "training": {
        "callbacks", "config", "devices", "files", "folders", "guard", "pixelcnn", "preparation", "runtime", "slices",
        "vqvae", "workers",
    },
    "evaluation": {"codes", "guard", "metrics", "pixelcnn", "quantizer", "slices", "streams", "vqvae"},
    "search": {"config", "evaluation", "files", "folders", "pixelcnn", "slices", "training", "vqvae"},
    "quality": {"codes", "guard", "pixelcnn", "sampling", "slices", "streams", "vqvae"},
    "reports": {"anomaly", "config", "evaluation", "files", "folders", "quality", "slices"},
    "anomaly": {"codes", "evaluation", "metrics", "pixelcnn", "slices", "streams", "vqvae"},
    "inspection": set(),
    "figures": {"config", "files"},
    "plots": {"figures"},
    "code_plots": {"figures"},
    "diagrams": {"pixelcnn", "vqvae"},
    "tables": {"config", "files"},
    "explore": {
        "code_plots", "codes", "figures", "inspection", "metrics", "pixelcnn", "sampling", "slices", "streams", "vqvae"
    },
    "data_commands": None,  # on top of everything, like the next
    "model_commands": None,
}  # fmt: skip


def imported_modules(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "oasis_vq":
            names |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_point_one_way(module):
    allowed = ALLOWED[module]
    if allowed is None:
        allowed = {name for name, imports in ALLOWED.items() if imports is not None}
    assert imported_modules(PACKAGE / f"{module}.py") - {"__version__"} <= allowed


def test_every_module_is_in_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ALLOWED) | {"__init__", "__main__"}


def test_every_public_name_is_there():
    for name in oasis_vq.__all__:
        assert getattr(oasis_vq, name) is not None and getattr(oasis_vq, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = oasis_vq.nothing


def test_importing_does_nothing():
    code = (
        "import sys, numpy; state = numpy.random.get_state()[1].tolist();"
        "import oasis_vq, oasis_vq.config, oasis_vq.recipes, oasis_vq.phantom, oasis_vq.ingest, oasis_vq.download;"
        "assert 'tensorflow' not in sys.modules and 'nilearn' not in sys.modules;"
        "import oasis_vq.training, oasis_vq.sampling, oasis_vq.plots, oasis_vq.evaluation;"
        "assert 'tensorflow_probability' not in sys.modules;"
        "assert state == numpy.random.get_state()[1].tolist()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_path_of_a_machine():
    files = [*PACKAGE.glob("*.py"), *(PACKAGE.parent / "tests").glob("*.py"), *(PACKAGE.parent / "tools").glob("*.py")]
    for file in files:
        for part in ("/ho" + "me/", "/ro" + "ot/", "C:" + "\\Users", "/wo" + "rk/"):
            assert part not in file.read_text(encoding="utf-8"), file
