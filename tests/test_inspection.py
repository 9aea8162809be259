"""What codes stand for: counted place by place, cut out patch by patch, and decoded by a trained model."""

import numpy as np
import pytest

import oasis_vq as ovq

NUM_EMBEDDINGS = 7
GENERATOR = np.random.default_rng(0)
CODES = GENERATOR.integers(0, NUM_EMBEDDINGS - 1, (5, 3, 4)).astype(np.int32)  # code 6 is dead
IMAGES = GENERATOR.uniform(size=(5, 6, 8, 1)).astype(np.float32)  # two pixels to a code


class TestCodePositions:
    def test_is_what_counting_gives(self):
        expected = np.zeros((NUM_EMBEDDINGS, 3, 4))
        for image, row, column in np.ndindex(CODES.shape):
            expected[CODES[image, row, column], row, column] += 1 / len(CODES)
        np.testing.assert_allclose(ovq.code_positions(CODES, NUM_EMBEDDINGS), expected, atol=1e-12)

    def test_every_position_has_one_code(self):
        positions = ovq.code_positions(CODES, NUM_EMBEDDINGS)
        np.testing.assert_allclose(positions.sum(axis=0), 1.0)
        assert positions[6].max() == 0

    @pytest.mark.parametrize(
        ("codes", "text"),
        [
            (CODES[0], r"\(n, h, w\) integers. Received: \(3, 4\) int32"),
            (CODES.astype(float), "Received: .* float64"),
            (CODES[:0], r"Received: \(0, 3, 4\)"),
            (CODES + 2, r"Codes are in \[0, 7\). Received: 2 to 7"),
            (CODES - 1, "Received: -1 to 4"),
        ],
    )
    def test_refuses_what_are_no_codes(self, codes, text):
        with pytest.raises(ValueError, match=text):
            ovq.code_positions(codes, NUM_EMBEDDINGS)
        with pytest.raises(ValueError, match=text):
            ovq.code_patches(codes, IMAGES, NUM_EMBEDDINGS)


class TestCodePatches:
    def test_is_the_mean_of_what_is_cut_out(self):
        found = ovq.code_patches(CODES, IMAGES, NUM_EMBEDDINGS)
        assert found.shape == (NUM_EMBEDDINGS, 2, 2, 1) and found.dtype == np.float32
        for code in range(6):
            cut = [
                IMAGES[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                for image, row, column in np.argwhere(code == CODES)
            ]
            np.testing.assert_allclose(found[code], np.mean(cut, axis=0), atol=1e-6)

    def test_a_dead_code_has_no_patch(self):
        assert np.isnan(ovq.code_patches(CODES, IMAGES, NUM_EMBEDDINGS)[6]).all()

    @pytest.mark.parametrize("images", [IMAGES[:4], IMAGES[:, :5], IMAGES[:, :, :6], IMAGES[..., 0], IMAGES[:, :2]])
    def test_refuses_images_of_other_codes(self, images):
        with pytest.raises(ValueError, match=r"one for each grid of codes.*beside codes \(5, 3, 4\)"):
            ovq.code_patches(CODES, images, NUM_EMBEDDINGS)

    def test_a_brighter_patch_is_a_brighter_code(self, vqvae, index):
        """In a trained model a code's mean decoded patch resembles the mean slice under it."""
        images = ovq.load_images(index.test, image_size=32)
        codes = vqvae.encode(images)
        used = np.bincount(codes.ravel(), minlength=32) > 0
        decoded = ovq.code_patches(codes, vqvae.decode(codes), 32)[used].mean(axis=(1, 2, 3))
        encoded = ovq.code_patches(codes, images, 32)[used].mean(axis=(1, 2, 3))
        assert np.corrcoef(decoded, encoded)[0, 1] > 0.9


class TestSwapCodes:
    def test_exchanges_two_codes_and_no_other(self):
        swapped = ovq.swap_codes(CODES, 1, 4)
        for before, after in zip(CODES.ravel(), swapped.ravel(), strict=True):
            assert after == {1: 4, 4: 1}.get(int(before), before)
        np.testing.assert_array_equal(ovq.swap_codes(CODES.tolist(), 1, 4), swapped)
        assert swapped.dtype == CODES.dtype and (CODES == 1).any() and (CODES == 4).any()

    def test_twice_is_not_at_all(self):
        np.testing.assert_array_equal(ovq.swap_codes(ovq.swap_codes(CODES, 2, 5), 5, 2), CODES)

    def test_changes_the_image_more_the_farther_apart_the_codes(self, vqvae, index):
        codes = vqvae.encode(ovq.load_images(index.test[:4], image_size=32))
        neighbours = ovq.neighbour_codes(vqvae.quantizer.codebook.numpy())
        before = vqvae.decode(codes)
        near, far = (np.abs(vqvae.decode(neighbours[codes, rank]) - before).mean() for rank in (1, 31))
        assert 0 < 2 * near < far
        np.testing.assert_array_equal(vqvae.decode(neighbours[codes, 0]), before)


class TestNeighbourCodes:
    def test_is_the_order_of_the_distances(self):
        codebook = GENERATOR.normal(size=(9, 3)).astype(np.float32)
        neighbours = ovq.neighbour_codes(codebook)
        for code in range(9):
            distances = [float(np.sum((codebook[code] - other) ** 2)) for other in codebook]
            assert neighbours[code].tolist() == sorted(range(9), key=distances.__getitem__)

    def test_a_code_is_before_its_twin(self):
        assert ovq.neighbour_codes(np.array([[1.0], [5.0], [1.0]])).tolist() == [[0, 2, 1], [1, 0, 2], [2, 0, 1]]


class TestCodebookMap:
    def test_finds_the_plane_that_the_codebook_lies_in(self):
        """Vectors in a tilted plane keep their distances, and the longer side comes first."""
        flat = GENERATOR.normal(size=(50, 2)) * (3.0, 1.0)
        axes, _ = np.linalg.qr(GENERATOR.normal(size=(8, 2)))
        places, variance = ovq.codebook_map(flat @ axes.T + 5.0)
        between = np.linalg.norm(places[:, None] - places, axis=-1)
        np.testing.assert_allclose(between, np.linalg.norm(flat[:, None] - flat, axis=-1), atol=1e-9)
        np.testing.assert_allclose(places.mean(axis=0), 0.0, atol=1e-9)
        assert variance[0] > 0.8 and variance.sum() == pytest.approx(1.0)

    def test_agrees_with_the_covariance_and_does_not_turn_over(self):
        codebook = GENERATOR.normal(size=(30, 5)) * np.arange(1, 6)
        values, vectors = np.linalg.eigh(np.cov(codebook.T))
        places, variance = ovq.codebook_map(codebook)
        np.testing.assert_allclose(variance, values[::-1][:2] / values.sum())
        for place, axis in zip(places.T, vectors.T[::-1], strict=False):
            axis = axis * np.sign(axis[np.abs(axis).argmax()])
            np.testing.assert_allclose(place, (codebook - codebook.mean(axis=0)) @ axis, atol=1e-9)

    @pytest.mark.parametrize("codebook", [np.ones((4, 3)), np.arange(4.0)[:, None], np.arange(3.0)[None]])
    def test_refuses_what_has_no_plane(self, codebook):
        with pytest.raises(ValueError, match=r"not all equal. Received: \(.*deviation"):
            ovq.codebook_map(codebook)
