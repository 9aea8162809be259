"""The explorers where they are used: JupyterLab is started, a browser opens notebooks, moves sliders and clicks.

Left to `make test-browser`. Needs Chromium (Debian: apt-get install chromium). Screenshots are kept in build/browser.
"""

import base64
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import imageio.v3 as iio
import nbformat
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
FIRST = """
import oasis_vq as ovq

ovq.setup(seed=0)
index = ovq.find_or_make_slices(128)
vqvae = ovq.load_vqvae("ixi128-coarse")
prior = ovq.load_prior("ixi128-coarse-prior")
"""
EXPLORERS = {
    "reconstructions": "ovq.explore_reconstructions(vqvae, index.test)",
    "codes": "ovq.explore_codes(vqvae, index.test)",
    "code_positions": "ovq.explore_code_positions(vqvae, index.test)",
    "completions": "ovq.explore_completions(prior, vqvae, index.test)",
    "samples": "ovq.explore_samples(prior, vqvae)",
}
SECONDS, PICTURE_SECONDS = 60, 20
"""How long starting and the execution of a cell may take, and how long a picture, before the test fails."""

pytestmark = pytest.mark.browser


def committed() -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / "notebooks" / "01_data_loading.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that JupyterLab shows: a notebook of explorers, and the first committed one without its outputs."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (FIRST, *EXPLORERS.values())]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "explorers.ipynb")
    nbformat.write(committed(), folder / "01_data_loading.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder, cohort, tmp_path_factory):
    """The address of a JupyterLab of our own, with its token: format it with a path."""
    home, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    settings = home / "settings" / "@jupyterlab"
    for name, values in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are in the page, too
    }.items():
        (settings / name).parent.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data", "IPYTHONDIR": home / "ipython",
        "JUPYTER_RUNTIME_DIR": home / "runtime", "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings", "JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": 1,
        "OASIS_VQ_DATA": cohort, "OASIS_VQ_MODELS": ROOT / "saved_models", "OASIS_VQ_FIGURES": home / "figures",
        "PYTHONPATH": ROOT,
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    log = home / "log"
    with log.open("wb") as out:
        environment = os.environ | {name: str(value) for name, value in own.items()}
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/{{}}?token={token}"
    try:
        wait_until(lambda: server.poll() is not None or answers(url.format("api/status")), "JupyterLab does not answer")
        assert server.poll() is None, log.read_text()
        yield url
    finally:
        server.terminate()  # it ends its kernels
        server.wait(SECONDS)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("No Chromium found. Install it (Debian: apt-get install chromium).")
    expect.set_options(timeout=1000 * SECONDS)
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + root)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def last_sight(request, browser):
    """Keeps what the browser shows after each test, also after one that has failed."""
    yield
    for context in browser.contexts[-1:]:
        context.pages[0].screenshot(path=SCREENSHOTS / f"after_{request.node.name}.png")


def open_notebook(browser, lab, name: str) -> Page:
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(1000 * SECONDS)
    # A workspace of its own: else the other notebook is opened beside it.
    page.goto(lab.format(f"lab/workspaces/{Path(name).stem}/tree/{name}"))
    expect(page.get_by_text(re.compile(r"^Python 3.* \| Idle$"))).to_be_visible()
    return page


@pytest.fixture(scope="module")
def explorers(browser, lab):
    """The page with the notebook of explorers, all of its cells executed."""
    page = open_notebook(browser, lab, "explorers.ipynb")
    for number in range(1 + len(EXPLORERS)):
        run(page, number)
    yield page
    page.close()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait_until(holds, what: str, page: Page | None = None) -> None:
    """Return as soon as a condition holds, or fail; a page goes on working meanwhile."""
    end = time.monotonic() + (PICTURE_SECONDS if page else SECONDS)
    while not holds():
        if time.monotonic() > end:
            pytest.fail(what)
        page.wait_for_timeout(50) if page else time.sleep(0.1)


def run(page: Page, number: int) -> Locator:
    """Execute the code cell of this number, and return it when it is done."""
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.locator(".jp-InputPrompt").click()
    expect(cell).to_have_class(re.compile("jp-mod-active"))
    page.locator('[data-command="notebook:run-cell-and-select-next"]').first.click()
    expect(cell.locator(".jp-InputPrompt")).to_have_text(f"[{number + 1}]:")
    assert not cell.locator('[data-mime-type="application/vnd.jupyter.stderr"]:has-text("Error")').count()
    return cell


def explorer(page: Page, name: str) -> Locator:
    return page.locator(".jp-CodeCell").nth(1 + list(EXPLORERS).index(name))


def pixels(image: Locator) -> np.ndarray:
    """Return the picture that the browser has decoded and shows, (h, w, 3) uint8."""
    draw = """image => {
        if (!image.complete || !image.naturalWidth) return "";
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png").split(",")[1];
    }"""
    drawn = ""

    def is_loaded() -> bool:
        nonlocal drawn
        drawn = image.evaluate(draw)
        return bool(drawn) and image.is_visible()

    wait_until(is_loaded, "no picture", image.page)
    return iio.imread(base64.b64decode(drawn))[..., :3]


def picture(cell: Locator, title: str) -> Locator:
    """Return the picture under a title."""
    image = cell.locator(f'.widget-vbox:has(> .widget-label:has-text("{title}")) > img').last
    image.scroll_into_view_if_needed()
    return image


def changed(image: Locator, before: np.ndarray) -> np.ndarray:
    """Return the picture that the browser shows as soon as it is another one."""
    wait_until(lambda: not np.array_equal(pixels(image), before), "the picture has not changed", image.page)
    return pixels(image)


def move(cell: Locator, name: str, key: str = "ArrowRight") -> None:
    """Move the slider of this name one step."""
    handle = cell.locator(f'.widget-hslider:has(> label:has-text("{name}")) .noUi-handle')
    handle.focus()
    handle.press(key)


def keep(cell: Locator, name: str) -> None:
    cell.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_a_slider_changes_the_reconstruction(explorers):
    cell = explorer(explorers, "reconstructions")
    images = {name: picture(cell, name) for name in ("slice", "codes", "reconstruction", "error")}
    before = {name: pixels(image) for name, image in images.items()}
    assert all(part.shape == (256, 256, 3) for part in before.values())
    assert 0.1 < (before["slice"] > 25).mean() < 0.6  # a brain on black
    scores, screenshot = cell.locator(".widget-html").inner_text(), images["slice"].screenshot()
    move(cell, "position")
    for name, image in images.items():
        changed(image, before[name])
    assert images["slice"].screenshot() != screenshot
    assert "brain_ssim" in scores and cell.locator(".widget-html").inner_text() != scores
    keep(cell, "reconstructions")


def test_a_click_in_the_code_grid_paints_one_code(explorers):
    cell = explorer(explorers, "codes")
    grid, brain = picture(cell, "codes: paint here"), picture(cell, "brain: or here")
    before, brain_before = pixels(grid), pixels(brain)
    grid.click(position={"x": 16 * 9 + 8, "y": 16 * 7 + 8})
    after = changed(grid, before)
    rows, columns = np.nonzero((after != before).any(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16 * 7, 16 * 8 - 1, 16 * 9, 16 * 10 - 1)
    changed(brain, brain_before)
    keep(cell, "codes_clicked")


def test_a_dragged_mouse_paints_a_line(explorers):
    cell = explorer(explorers, "codes")
    grid = picture(cell, "codes: paint here")
    before, box = pixels(grid), grid.bounding_box()
    explorers.mouse.move(box["x"] + 56, box["y"] + 40)
    explorers.mouse.down()
    explorers.mouse.move(box["x"] + 200, box["y"] + 40)
    explorers.mouse.up()
    painted = before.copy()
    painted[32:48, 48:208] = changed(grid, before)[40, 56]
    wait_until(lambda: np.array_equal(pixels(grid), painted), "no line of ten codes", explorers)
    keep(cell, "codes_dragged")


def test_the_palette_chooses_what_is_painted(explorers):
    cell = explorer(explorers, "codes")
    palette, code = picture(cell, "codes, from dark to bright"), cell.locator(".widget-readout").nth(2)
    before, number = pixels(palette), code.inner_text()
    palette.click(position={"x": 500, "y": 200})
    changed(palette, before)
    expect(code).not_to_have_text(number)


def test_a_click_shows_where_a_code_fires(explorers):
    cell = explorer(explorers, "code_positions")
    palette, places = picture(cell, "codes, from dark to bright"), picture(cell, "where it fires")
    before = pixels(places)
    palette.click(position={"x": 30, "y": 10})
    changed(places, before)
    keep(cell, "code_positions")


def test_a_completion_follows_the_rows_that_are_kept(explorers):
    cell = explorer(explorers, "completions")
    drawn = picture(cell, "completions")
    before = pixels(drawn)
    move(cell, "rows kept")
    changed(drawn, before)
    keep(cell, "completions")


@pytest.mark.parametrize("slider", ["slice index", "temperature", "top k"])
def test_samples_follow_their_sliders(explorers, slider):
    cell = explorer(explorers, "samples")
    samples = picture(cell, "samples")
    before = pixels(samples)
    move(cell, slider, "ArrowLeft" if slider == "top k" else "ArrowRight")
    changed(samples, before)
    keep(cell, "samples")


def test_a_committed_notebook(browser, lab):
    page = open_notebook(browser, lab, "01_data_loading.ipynb")
    sources = [cell.source for cell in committed().cells if cell.cell_type == "code"]
    for number in range(1 + sources.index("ovq.explore_slices(index, image_size=size)")):
        cell = run(page, number)
    shown = picture(cell, "slice")
    before = pixels(shown)
    move(cell, "position")
    changed(shown, before)
    keep(cell, "slices")
    page.close()
