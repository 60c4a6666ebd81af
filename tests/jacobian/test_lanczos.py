import pytest
import torch
from tests.jacobian.cases import SPECTRA, with_spectrum

from jacnorm.jacobian.lanczos import GolubKahan, start_vectors


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_stay_orthonormal_also_when_the_krylov_space_is_exhausted(name, dtype):
    """Bases of 100 vectors to 30 units of rounding, where one pass of Gram-Schmidt loses millions of them."""
    matrix = with_spectrum(SPECTRA[name], 150, 160).to(dtype)
    start = start_vectors(2, 150, 0, dtype, torch.device("cpu"))
    process = GolubKahan(lambda p: p @ matrix, lambda q: q @ matrix.mT, start)
    for _ in range(100):
        process.step()
    _, _, right, left = process.triplets(100)
    for basis in (process.starts, right, left):
        gram = basis.double() @ basis.double().mT
        error = (gram - torch.eye(100)).abs().max().item()
        assert error <= 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_are_the_matrix_in_the_two_bases(dtype):
    matrix = with_spectrum(SPECTRA["isolated"], 150, 150).to(dtype)
    process = GolubKahan(lambda p: p @ matrix.mT, lambda q: q @ matrix, start_vectors(1, 150, 3, dtype, "cpu"))
    for _ in range(20):
        process.step()
    theta, residual, right, left = process.triplets(20)
    images = right.double() @ matrix.double().mT  # A V = U Theta
    torch.testing.assert_close(images, theta[:, :, None] * left.double(), rtol=0, atol=20 * torch.finfo(dtype).eps)
    back = left.double() @ matrix.double() - theta[:, :, None] * right.double()
    torch.testing.assert_close(back.norm(dim=2), residual, rtol=1e-3, atol=20 * torch.finfo(dtype).eps)


def test_start_vectors_are_unit_shared_and_set_by_the_seed():
    one = start_vectors(3, 50, 1, torch.float64, torch.device("cpu"))
    assert one.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert torch.equal(one[0], one[2])
    assert not torch.equal(one[0], start_vectors(1, 50, 2, torch.float64, torch.device("cpu"))[0])
