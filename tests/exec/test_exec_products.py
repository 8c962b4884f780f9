"""Matrix products by packed weights, compared with torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="real models need the extra exec")

from exec_models import backend  # noqa: E402
from exec_scenarios import SHORT  # noqa: E402
from exec_toys import Fixed, given, pipeline  # noqa: E402

from hetis_exec.models import products  # noqa: E402
from hetis_exec.models.products import PackedProduct, PlainProduct, product  # noqa: E402
from hetis_exec.torch_backend import activation_bytes, tied_heads  # noqa: E402

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What packs is found out anew."""
    products._packs.cache_clear()
    yield monkeypatch
    products._packs.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_are_those_of_torch(dtype: Any, bias: bool) -> None:
    """Of no rows, one, as many as weights were packed for, and many; of views as well."""
    if not products._packs(dtype):
        pytest.skip("this processor has no packed products of the type")
    weight = torch.randn(70, 100, dtype=torch.float32).to(dtype)[:, :50]
    shift = torch.randn(70).to(dtype) if bias else None
    made, plain = PackedProduct(weight, shift), PlainProduct(weight, shift)
    assert isinstance(product(weight, shift), PackedProduct)
    for rows in (0, 1, 2, products.ROWS_LEAST - 1, products.ROWS_LEAST, products.ROWS_HINT, 300):
        given = torch.randn(rows, 2, 50).to(dtype)[:, 1]
        found = made(given)
        assert found.shape == (rows, 70)
        assert found.dtype == dtype
        torch.testing.assert_close(found, plain(given), rtol=CLOSE[dtype], atol=10 * CLOSE[dtype])


def test_other_types_are_multiplied_by_torch() -> None:
    """Nothing packs them."""
    assert isinstance(product(torch.randn(4, 3, dtype=torch.float16)), PlainProduct)
    assert isinstance(product(torch.randn(4, 3, dtype=torch.float64)), PlainProduct)


@pytest.mark.parametrize("broken", ["absent", "wrong", "raises"])
def test_a_torch_that_cannot_pack_multiplies_all_the_same(broken: str, packs: pytest.MonkeyPatch) -> None:
    """Without oneDNN, or with operators that have changed."""
    if broken == "absent":
        packs.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif broken == "wrong":
        packs.setattr(PackedProduct, "__call__", lambda self, rows: rows.new_zeros((len(rows), 24)))
    else:
        def refuse(self: Any, weight: Any, bias: Any = None) -> None:
            raise RuntimeError("no such operator")

        packs.setattr(PackedProduct, "__init__", refuse)
    assert isinstance(product(torch.randn(4, 3)), PlainProduct)


def test_a_tied_head_counts_once_more_where_weights_are_packed() -> None:
    """A processor holds the embedding in its own layout and the head in another; a card holds it once."""
    made = backend("llama3")
    spec = made.architecture.spec
    head_bytes = spec.vocab * spec.hidden * 4
    whole, halves = pipeline([[0]], [spec.layers]), pipeline([[0], [1]], [1, spec.layers - 1])
    assert tied_heads(spec, whole.instances[0]) == [0]
    assert tied_heads(spec, halves.instances[0]) == []
    assert tied_heads(replace(spec, tied_embeddings=False), whole.instances[0]) == []
    engines = given(whole, Fixed((spec.kv_heads,)), SHORT, model=spec).controller().engines
    card = replace(made, places=("cuda:0", "cpu"))
    room = activation_bytes(spec, engines[0].settings.limits.max_batch_tokens,
                            engines[0].settings.limits.max_batch_requests, 1, 4)
    assert made.need_bytes(engines)["cpu"] - head_bytes == card.need_bytes(engines)["cuda:0"] - room
