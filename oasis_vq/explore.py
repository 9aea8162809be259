"""Explorers: widgets to move what a figure holds still. Data or models first, a widget back.

Each is a function of its controls to pictures and a line of text. Pictures are small PNG files, not figures, so that
they keep up with a slider. Brains, codes and errors are coloured as in `figures`.
"""

import html
import math
from collections.abc import Callable

import imageio.v3 as iio
import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, to_rgb
from scipy.ndimage import binary_erosion

from oasis_vq.code_plots import BACKDROP, OUTLINE, SHARES
from oasis_vq.codes import encode_slices
from oasis_vq.figures import code_colours
from oasis_vq.inspection import code_patches, code_positions
from oasis_vq.metrics import BRAIN_THRESHOLD, ssim_per_image
from oasis_vq.pixelcnn import PixelCNN
from oasis_vq.sampling import sample_codes
from oasis_vq.slices import SliceIndex, Slices
from oasis_vq.streams import load_images
from oasis_vq.vqvae import VQVAE

try:
    import ipywidgets as widgets
    from ipyevents import Event
except ImportError as error:
    text = f"The explorers need ipywidgets and ipyevents ({error})."
    raise ImportError(f"{text} Install what requirements.txt lists, and start JupyterLab again.") from None

SIDE = 256
"""Height of a picture on the page in pixels, about: what it is made of is enlarged by a whole number."""
LIMIT = 0.3
"""Difference of intensities that has the full colour; the same for all slices, so that they can be compared."""
SCALE = f"(blue −{LIMIT}, white 0, red {LIMIT})"
CHARTED = 512
"""Most slices, drawn at random, that are encoded to see what the codes stand for."""
NUM_COMPLETIONS, NUM_SAMPLES = 4, 8
"""Brains drawn at a time; up to `sampling.CHUNK_SIZE` of them take as long as one."""
ANY = "any"
"""A condition that is left to the seed."""


class Explorer(widgets.VBox):
    """Controls, pictures and a line of text; a control that is moved draws the others anew.

    Args:
        draw: function of the controls' values, by name, to {title: pixels}, the text, and the codes that are shown or
            None. Pixels are (h, w) or (h, w, 3), uint8; the titles are always the same.
        controls: {name: widget with a value}.
        side: height of the pictures, about.
        follows: whether pictures follow a slider while it is moved, or are drawn when it is let go.

    Attributes:
        controls: as given.
        pictures: {title: ipywidgets.Image}.
        text: ipywidgets.HTML.
        codes: (n, h, w) int32, the codes that are shown, for the cells below; None if there are none.
        mice: {title: ipyevents.Event} of the pictures that listen to the mouse.
    """

    def __init__(self, draw: Callable, controls: dict[str, widgets.Widget], *, side: int = SIDE, follows: bool = True):
        self.draw, self.controls, self.side, self.mice = draw, controls, side, {}
        pixels, text, self.codes = draw(**self.values())
        self.pictures = {title: widgets.Image(value=_png(part, side)) for title, part in pixels.items()}
        self.text = widgets.HTML(html.escape(text))
        for name, control in controls.items():
            control.description, control.style.description_width = name.replace("_", " "), "initial"
            control.continuous_update = follows
            control.layout.margin = "2px 24px 2px 2px"
            control.observe(self.update, "value")
        titled = [widgets.VBox([widgets.Label(title), image]) for title, image in self.pictures.items()]
        rows = [widgets.HBox(part, layout={"flex_flow": "row wrap"}) for part in (list(controls.values()), titled)]
        for image in self.pictures.values():  # else it is stretched
            image.layout = {"align_self": "flex-start", "margin": "0 12px 0 0"}
        super().__init__([*rows, self.text])

    def __repr__(self) -> str:
        return "An explorer. JupyterLab shows it while its kernel runs: run the cell again."

    def values(self) -> dict:
        """Return the values of the controls by name."""
        return {name: control.value for name, control in self.controls.items()}

    def update(self, _: object = None) -> None:
        """Draw the pictures and write the text for the values that the controls have now."""
        try:
            pixels, text, self.codes = self.draw(**self.values())
        except Exception as error:  # whatever it is: nobody sees what is raised in a callback
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.text.value = html.escape(f"error: {reason[0]}")
            return
        for title, part in pixels.items():
            self.pictures[title].value = _png(part, self.side)
        self.text.value = html.escape(text)

    def on_mouse(self, title: str, shape: tuple[int, int], act: Callable[[np.ndarray, dict], None]) -> None:
        """Call `act(cells, event)` when the mouse is pressed on a picture, and when it is moved there while pressed.

        Args:
            title: of the picture.
            shape: (rows, columns) of the cells that the picture is made of.
            act: what to do with the cells (n, 2) over which the mouse has gone, the last being the one it is on, and
                with the browser's event.
        """
        trail = []  # the cell it was on before: a fast mouse is not heard of in every cell

        def heard(event: dict) -> None:
            place = event["relativeY"] / event["boundingRectHeight"], event["relativeX"] / event["boundingRectWidth"]
            cell = np.floor(np.multiply(place, shape)).astype(int)
            if event["event"] != "mousemove":
                trail.clear()
            if event["event"] == "mouseleave" or not event["buttons"] & 1 or (cell < 0).any() or (cell >= shape).any():
                return
            start = trail[0] if trail else cell
            trail[:] = [cell]
            act(np.linspace(start, cell, np.abs(cell - start).max() + 1).round().astype(int), event)

        mouse = Event(source=self.pictures[title], watched_events=["mousedown", "mousemove", "mouseleave"])
        mouse.wait = 30  # milliseconds from one event of a kind to the next
        mouse.prevent_default_action = True  # which is to drag the picture away
        mouse.on_dom_event(heard)
        self.mice[title] = mouse


def explore_slices(index: SliceIndex, *, image_size: int, fit: str = "pad") -> Explorer:
    """Browse the slices of all splits by subject and position.

    Args:
        index: what there is.
        image_size: height and width of the images.
        fit: as in `make_dataset`.
    """
    splits = index.splits()
    tables = [(part.path, part.subject, part.slice, part.label) for part in splits.values()]
    slices = Slices(index.root, *map(np.concatenate, zip(*tables, strict=True)))
    split_of = {subject: name for name, part in splits.items() for subject in np.unique(part.subject).tolist()}
    controls = _slice_controls(slices)
    controls["subject"].options = [(f"{subject} ({split})", subject) for subject, split in split_of.items()]

    def draw(subject, position):
        row, image = _read(slices, subject, position, image_size, fit)
        text = f"case {subject} ({split_of[subject]}), slice {slices.slice[row]}: from {image.min():.2f} to "
        text += f"{image.max():.2f}, {(image <= BRAIN_THRESHOLD).mean():.0%} of the pixels are background"
        return {"slice": _gray(image[0])}, text, None

    return Explorer(draw, controls, side=2 * SIDE)


def explore_reconstructions(vqvae: VQVAE, slices: Slices) -> Explorer:
    """Browse slices beside their codes, their reconstructions and the errors, with the scores of each."""

    def draw(subject, position):
        row, image = _read(slices, subject, position, vqvae.config.image_size, vqvae.config.fit)
        codes = vqvae.encode(image)
        again = vqvae.decode(codes)
        (whole,), (brain,) = ssim_per_image(image, again)
        pictures = {
            "slice": _gray(image[0]),
            "codes": _coloured(codes[0], vqvae),
            "reconstruction": _gray(again[0]),
            f"error {SCALE}": _signed(again[0] - image[0]),
        }
        return pictures, f"case {subject}, slice {slices.slice[row]}: ssim {whole:.3f}, brain_ssim {brain:.3f}", codes

    return Explorer(draw, _slice_controls(slices))


def explore_codes(vqvae: VQVAE, slices: Slices) -> Explorer:
    """Paint codes into the grid of a slice, and see what becomes of the brain.

    The mouse paints, on the codes and on the brain; with the shift key it takes up the code that is there. The palette
    shows every code as what it decodes to.
    """
    palette = _Palette(vqvae, slices)
    controls = {**_slice_controls(slices), "code": palette.control}
    before, painted = np.zeros((2, *vqvae.config.grid_shape), np.int32)
    shown = []  # the slice whose codes these are

    def draw(subject, position, code):
        if shown != [subject, position]:
            _, image = _read(slices, subject, position, vqvae.config.image_size, vqvae.config.fit)
            before[:] = painted[:] = vqvae.encode(image)[0]
            shown[:] = subject, position
        old, new = vqvae.decode(np.stack([before, painted]))
        pictures = {
            "codes: paint here": _coloured(painted, vqvae),
            "brain: or here": _gray(new),
            f"change {SCALE}": _signed(new - old),
            palette.title: palette.pixels(code),
        }
        text = (
            f"{(before != painted).sum()} of {painted.size} codes changed, mean |change| {np.abs(new - old).mean():.4f}"
        )
        return pictures, f"{text}. Shift and a click take up the code that is there.", painted[None].copy()

    explorer = Explorer(draw, controls)

    def paint(cells, event):
        if event["shiftKey"]:
            palette.control.value = int(painted[tuple(cells[-1])])
        else:
            painted[tuple(cells.T)] = palette.control.value
            explorer.update()

    def restore(_):
        shown.clear()
        explorer.update()

    for title in list(explorer.pictures)[:2]:
        explorer.on_mouse(title, painted.shape, paint)
    palette.listen(explorer)
    button = widgets.Button(description="start again")
    button.on_click(restore)
    explorer.children[0].children += (button,)
    return explorer


def explore_code_positions(vqvae: VQVAE, slices: Slices) -> Explorer:
    """Click a code, and see where it fires and what it decodes to, over at most `CHARTED` of the slices."""
    palette = _Palette(vqvae, slices)
    positions = code_positions(palette.codes, vqvae.config.num_embeddings)
    head = palette.images.mean(axis=0)[..., 0] > OUTLINE
    outline = head & ~binary_erosion(head)
    inferno, scale = matplotlib.colormaps["inferno"], LogNorm(SHARES[0], SHARES[-1])

    def draw(code):
        shares = positions[code]
        heat = inferno(scale(np.maximum(shares, SHARES[0])), bytes=True)[..., :3]
        heat = _enlarged(heat, len(outline) // len(heat))
        heat[outline] = 255
        row, column = np.unravel_index(shares.argmax(), shares.shape)
        pictures = {
            "where it fires": heat,
            "what it decodes to": _gray(np.nan_to_num(palette.patches[code])),
            palette.title: palette.pixels(code),
        }
        text = (
            f"code {code}: at {shares.mean():.2%} of all positions of {len(palette.codes)} slices, most often in row "
        )
        text += f"{row}, column {column}, in {shares.max():.1%} of them (black {SHARES[0]:.1%} or less, yellow 100%, "
        return pictures, text + "on a logarithmic scale; line: the outline of the mean slice)", None

    explorer = Explorer(draw, {"code": palette.control})
    palette.listen(explorer)
    return explorer


def explore_completions(prior: PixelCNN, vqvae: VQVAE, slices: Slices) -> Explorer:
    """Keep the upper rows of a slice's codes, and let the prior draw the rest."""
    height = vqvae.config.grid_shape[0]
    controls = {**_slice_controls(slices), "rows_kept": widgets.IntSlider(height // 2, 0, height), **_draw_controls()}

    def draw(subject, position, rows_kept, temperature, seed):
        row, image = _read(slices, subject, position, vqvae.config.image_size, vqvae.config.fit)
        known = vqvae.encode(image)
        known_of_it = prior.known_conditions(slices.slice[row : row + 1], slices.label[row : row + 1])
        options = {"seed": seed, "temperature": temperature, **known_of_it}
        if prior.drafter:  # of the coarse rows that cover those that are kept
            whole = prior.drafter.coarse.encode(image)
            rows = -(-rows_kept * whole.shape[1] // height)
            told = prior.drafter.prior.known_conditions(known_of_it["slice_index"], known_of_it["label"])
            coarse = sample_codes(prior.drafter.prior, NUM_COMPLETIONS, prefix=whole[:, :rows], **(options | told))
            options["draft"] = prior.drafter.of_codes(coarse)
        codes = sample_codes(prior, NUM_COMPLETIONS, prefix=known[:, :rows_kept], **options)
        kept = vqvae.decode(known)[0]
        kept[rows_kept * len(kept) // height :] *= 0.3
        pictures = {
            "slice": _gray(image[0]),
            "reconstruction, bright what is kept": _gray(kept),
            "completions": _gray(_tiled(vqvae.decode(codes), 4)),
        }
        text = f"case {subject}, slice {slices.slice[row]}: {rows_kept} of {height} rows kept, the others drawn"
        return pictures, text, codes

    return Explorer(draw, controls, follows=False)


def explore_samples(prior: PixelCNN, vqvae: VQVAE) -> Explorer:
    """Draw new brains: by slice position and class, where the prior knows them, with temperature and top-k."""
    num_embeddings = prior.config.num_embeddings
    controls = {}
    for name, size in prior.condition_sizes.items():
        first = prior.first_values[name]
        controls[name] = widgets.SelectionSlider(options=[ANY, *range(first, first + size)])
    ks = [2**power for power in range(num_embeddings.bit_length()) if 2**power < num_embeddings] + [num_embeddings]
    controls |= {"top_k": widgets.SelectionSlider(options=ks, value=num_embeddings), **_draw_controls()}

    sample_codes(prior, 1, top_k=1)  # the loop with a filter is compiled now, not when the slider is moved

    def draw(top_k, temperature, seed, **conditions):
        given = {name: None if value == ANY else value for name, value in conditions.items()}
        given["top_k"] = None if top_k == num_embeddings else top_k  # all of them are sorted for nothing
        codes = sample_codes(prior, NUM_SAMPLES, seed=seed, temperature=temperature, **given)
        asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in conditions.items())
        text = f"{asked or 'no condition'}, temperature {temperature:g}, the {top_k} likeliest codes at each position"
        return {"samples": _gray(_tiled(vqvae.decode(codes), 4))}, f"{text}, seed {seed}", codes

    return Explorer(draw, controls, side=2 * SIDE, follows=False)


class _Palette:
    """All codes as what they decode to on average, from dark to bright, and at the end those that do not occur."""

    title = "codes, from dark to bright: click one"

    def __init__(self, vqvae: VQVAE, slices: Slices):
        _refuse_none(slices)
        num_embeddings = vqvae.config.num_embeddings
        rows = np.random.default_rng(0).permutation(len(slices))[:CHARTED]
        self.codes = encode_slices(vqvae, slices[np.sort(rows)]).codes
        self.images = vqvae.decode(self.codes)
        self.patches = code_patches(self.codes, self.images, num_embeddings)
        self.order = self.patches.mean(axis=(1, 2, 3)).argsort(kind="stable")  # NaN, of dead codes, comes last
        columns = math.ceil(math.sqrt(2 * num_embeddings))
        self.shape = (math.ceil(num_embeddings / columns), columns)
        middle = int(self.order[np.isfinite(self.patches[:, 0, 0, 0]).sum() // 2])
        self.control = widgets.IntSlider(middle, 0, num_embeddings - 1)

    def pixels(self, code: int) -> np.ndarray:
        """Return the palette with a frame around one code, (h, w, 3) uint8."""
        rows, columns = self.shape
        patches = self.patches[self.order]  # (k, p, p, 1)
        back = np.round(255 * np.array(to_rgb(BACKDROP)))
        cells = np.tile(back, (rows * columns, *np.add(patches.shape[1:3], 2), 1)).astype(np.uint8)
        cells[np.flatnonzero(self.order == code)] = 255, 0, 0
        cells[: len(patches), 1:-1, 1:-1] = np.where(np.isnan(patches), back, np.round(255 * patches))
        return _tiled(cells, columns)

    def listen(self, explorer: Explorer) -> None:
        """Let a click choose a code."""

        def choose(cells, _):
            place = np.ravel_multi_index(cells[-1], self.shape)
            if place < len(self.order):
                self.control.value = int(self.order[place])

        explorer.on_mouse(self.title, self.shape, choose)


def _refuse_none(slices: Slices) -> None:
    if len(slices) == 0:
        raise ValueError("An explorer needs at least one slice. Received: none.")


def _draw_controls() -> dict[str, widgets.Widget]:
    temperature = widgets.FloatSlider(1.0, min=0.1, max=1.5, step=0.05)
    return {"temperature": temperature, "seed": widgets.IntSlider(0, 0, 99)}


def _slice_controls(slices: Slices) -> dict[str, widgets.Widget]:
    _refuse_none(slices)
    subjects, positions = np.unique(slices.subject).tolist(), np.unique(slices.slice).tolist()
    return {
        "subject": widgets.SelectionSlider(options=subjects),
        "position": widgets.SelectionSlider(options=positions, value=positions[len(positions) // 2]),
    }


def _read(slices: Slices, subject: str, position: int, image_size: int, fit: str) -> tuple[int, np.ndarray]:
    """Return the row of a subject's slice at a position, or the nearest that there is, and its image (1, s, s, 1)."""
    rows = np.flatnonzero(slices.subject == subject)
    row = int(rows[np.abs(slices.slice[rows] - position).argmin()])
    return row, load_images(slices[row : row + 1], image_size=image_size, fit=fit)


def _gray(image: np.ndarray) -> np.ndarray:
    """Return an image (h, w, 1) in [0, 1] as (h, w) uint8."""
    return np.round(255 * image[..., 0]).astype(np.uint8)


def _coloured(codes: np.ndarray, vqvae: VQVAE) -> np.ndarray:
    """Return codes (h, w) in their colours, (h, w, 3) uint8."""
    return code_colours(vqvae.config.num_embeddings)["cmap"](codes, bytes=True)[..., :3]


def _signed(difference: np.ndarray) -> np.ndarray:
    """Return a difference of images (h, w, 1) in the colours of `SCALE`, (h, w, 3) uint8."""
    return matplotlib.colormaps["RdBu_r"](difference[..., 0] / LIMIT / 2 + 0.5, bytes=True)[..., :3]


def _tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Return images (n, h, w, c) side by side, (n / columns h, columns w, c)."""
    n, height, width, channels = images.shape
    rows = images.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)  # (rows, h, columns, w, c)
    return rows.reshape(n // columns * height, columns * width, channels)


def _enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _png(pixels: np.ndarray, side: int) -> bytes:
    return iio.imwrite("<bytes>", _enlarged(pixels, max(1, round(side / len(pixels)))), extension=".png")
