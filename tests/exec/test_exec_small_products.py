"""Products of many small matrices, by NumPy and by torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="real models need the extra exec")

from hetis_exec.kernels.small import MIXED_MOST, SCORES_MOST, THREADS_MAX, mixed, scores  # noqa: E402


@pytest.fixture(params=[1, THREADS_MAX + 1])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 17, SCORES_MOST // (3 * 64), MIXED_MOST // (3 * 64) + 5])
def test_they_are_those_of_whole_matrices(threads: int, heads: int, tokens: int) -> None:
    """In one piece or in several, with rows that lie apart."""
    queries, keys = torch.randn(5, heads, 64), torch.randn(5, tokens + 3, 64)[:, :tokens]
    found = scores(queries, keys)
    torch.testing.assert_close(found.double(), queries.double() @ keys.double().transpose(1, 2), rtol=1e-5,
                               atol=1e-4)
    weights = found.softmax(-1)
    torch.testing.assert_close(mixed(weights, keys).double(), weights.double() @ keys.double(), rtol=1e-5,
                               atol=1e-5)
