"""What the tests share: a small phantom cohort, and a VQ-VAE and a prior trained on it, made once for all processes."""

import os
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import pytest
from filelock import FileLock

from oasis_vq.config import PriorConfig, VQVAEConfig
from oasis_vq.runtime import start_tensorflow

start_tensorflow()

import tensorflow as tf  # noqa: E402  (after its logs are quiet)

import oasis_vq as ovq  # noqa: E402

REAL_DATA = Path(os.environ.get("OASIS_VQ_REAL_DATA") or Path(__file__).parents[1] / "data" / "ixi_png")

VQVAE_CONFIG = VQVAEConfig(
    image_size=32, downsampling=4, width=16, num_residual_blocks=1, num_embeddings=32, embedding_dim=8,
    batch_size=8, epochs=20, learning_rate=3e-3,
)  # fmt: skip
PRIOR_CONFIG = PriorConfig(
    num_slices=8, embedding_dim=8, num_channels=16, first_kernel_size=5, kernel_size=3, num_residual_blocks=2,
    batch_size=8, epochs=20, learning_rate=3e-3,
).matched_to(VQVAE_CONFIG)  # fmt: skip


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not tf.config.list_physical_devices("GPU"):
        pytest.skip("no GPU here")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that the processes of this run share; a `FileLock` in it keeps two from making the same."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def cohort(shared) -> Path:
    """A folder with 10 phantom subjects of 8 slices at 64x64: 6 / 2 / 2."""
    with FileLock(shared / "cohort.lock"):
        return ovq.make_cohort(shared / "cohort", num_subjects=10, image_size=64, num_slices=8, progress=False)


@pytest.fixture(scope="session")
def index(cohort) -> ovq.SliceIndex:
    return ovq.find_slices(cohort)


@pytest.fixture(autouse=True, scope="session")
def cache_folder_of_its_own(tmp_path_factory):
    os.environ["OASIS_VQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def models(shared) -> Path:
    """A folder for the trained models of this run."""
    (shared / "models").mkdir(exist_ok=True)
    return shared / "models"


@pytest.fixture(scope="session")
def train(models, index) -> Callable:
    """`fit_or_load` of a model by its name in `models`: one process trains it, and the other waits and loads it."""

    def train(name: str, config, **options):
        with FileLock(models.parent / f"{name}.lock"):
            return ovq.fit_or_load(models / name, config, index, **options)

    return train


@pytest.fixture(scope="session")
def vqvae(train) -> ovq.VQVAE:
    return train("small", VQVAE_CONFIG)


@pytest.fixture(scope="session")
def prior(train, vqvae) -> ovq.PixelCNN:
    return train("small-prior", PRIOR_CONFIG, vqvae=vqvae)


@pytest.fixture(scope="session")
def adni(tmp_path_factory) -> Path:
    """A folder in the ADNI layout, 60 wide and 48 high: 20 images to train on and 8 to test, half of them AD.

    Slices are numbered from 78 on, as there.
    """
    from oasis_vq.phantom import subject_slices

    folder = tmp_path_factory.mktemp("data") / "AD_NC"
    for number in range(28):
        split, label = "train" if number < 20 else "test", "NC" if number % 2 else "AD"
        place = folder / split / label
        place.mkdir(parents=True, exist_ok=True)
        for position, image in enumerate(subject_slices(1, number, 60, 3)):
            iio.imwrite(place / f"{200_000 + 7 * number}_{78 + position}.jpeg", image[6:54])
    return folder


@pytest.fixture
def copied(cohort, tmp_path):
    """A copy of the cohort to spoil."""
    import shutil

    return Path(shutil.copytree(cohort, tmp_path / "copied"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real slices in {REAL_DATA} (set OASIS_VQ_REAL_DATA)")
    return REAL_DATA
