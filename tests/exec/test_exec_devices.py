"""Which torch devices a cluster's devices become, and which type of number a run computes in."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exec_models import POISON, TEXT, backend, folder, logits, reference, shards, torch
from exec_scenarios import SCENARIOS, SHORT
from exec_toys import Fixed, given, pipeline, run

from hetis_exec import devices
from hetis_exec.devices import find_places, find_type
from hetis_exec.kernels.wire import array_of, tensor_of
from hetis_exec.models.architecture import read_architecture
from hetis_exec.replay import replay
from hetis_exec.torch_backend import TorchBackend, activation_bytes
from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import ClusterSpec, HostSpec, LinkSpec
from hetis_sim.spec.errors import InfeasibleError, SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import gpu

LINK = LinkSpec("link", 1e10, 1e-6)
CORE = GpuSpec("cpu-core", 1 << 30, 1e10, 1e11, 1e11, 1e11)
MIXED = ClusterSpec("mixed", (HostSpec((gpu("a100-80gb"), gpu("t4"), CORE, gpu("t4")), LINK),), LINK)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there are some CUDA devices, of given compute capabilities."""

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(devices, "cuda_devices", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability",
                            lambda card: capabilities[int(card.partition(":")[2])])

    return pretend


def test_cards_take_turns_on_cuda_devices(cards: Any) -> None:
    """Whatever is no card stays on the CPU; without CUDA all does; a list is taken as it is."""
    cards((9, 0), (9, 0))
    assert find_places("auto", MIXED) == ("cuda:0", "cuda:1", "cpu", "cuda:0")
    assert find_places("cuda", MIXED) == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    assert find_places("cpu", MIXED) == ("cpu",) * 4
    assert find_places(["cuda", "cpu", "cuda:1", "cuda:1"], MIXED) == ("cuda:0", "cpu", "cuda:1", "cuda:1")
    assert find_places("auto", MIXED, range(1, 4)) == ("cpu", "cuda:0", "cpu", "cuda:1")
    assert find_places(["cuda:7", "cpu", "cpu", "cuda:1"], MIXED, range(1, 4)) == ("cpu",) * 3 + ("cuda:1",)
    cards()
    assert find_places("auto", MIXED) == ("cpu",) * 4


def test_wishes_that_cannot_be_met_are_refused(cards: Any) -> None:
    """By the key, the value and what is allowed."""
    cards()
    for wish in ("cuda", ["cpu", "cuda:0", "cpu", "cpu"]):
        with pytest.raises(SpecError, match=r"executor\.devices.*there is no CUDA device"):
            find_places(wish, MIXED)
    cards((9, 0))
    for wish, allowed in ((["cpu"], "a list of 4 torch devices"), ("gpu", "auto, cpu, cuda"), (3, "a list"),
                          (["cpu", "cpu", "cuda:1", "cpu"], "cuda:0 to cuda:0"),
                          (["cpu", "xpu", "cpu", "cpu"], "cpu, cuda or cuda:N")):
        with pytest.raises(SpecError, match=rf"executor\.devices.*{allowed}"):
            find_places(wish, MIXED)


def test_the_type_follows_the_oldest_card(cards: Any) -> None:
    """float32 on CPUs; bfloat16 on cards, float16 if one of them is too old; or what is asked for."""
    cards((9, 0), (7, 5))
    assert find_type("auto", ("cpu", "cpu")) == "float32"
    assert find_type("auto", ("cpu", "cuda:0")) == "bfloat16"
    assert find_type("auto", ("cuda:1", "cuda:0")) == "float16"
    assert find_type("float32", ("cuda:1", "cuda:0")) == "float32"


def test_memory_is_looked_for_where_workers_are(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and caches of all workers of a card must fit on it together."""
    cards((9, 0))
    what = given(pipeline([[0]], [4], [1]), Fixed((2, 2)), SHORT, model=backend("llama").architecture.spec)
    made = replace(backend("llama"), places=("cuda:0", "cuda:0"))
    engines = what.controller().engines
    need = made.need_bytes(engines)
    assert list(need) == ["cuda:0"]
    whole = replace(made, places=("cuda:0", "cpu")).need_bytes(engines)
    assert sum(whole.values()) == need["cuda:0"]
    assert replace(made, places=(), dtype="bfloat16").need_bytes(engines)["cpu"] < need["cuda:0"]
    monkeypatch.setattr("hetis_exec.torch_backend.free_bytes", lambda card: need[card] - 1)
    with pytest.raises(InfeasibleError, match=r"cuda:0 has .* GiB free"):
        made.check(engines)
    monkeypatch.setattr("hetis_exec.torch_backend.free_bytes", lambda card: need[card])
    made.check(engines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_survives_a_message(dtype: torch.dtype) -> None:
    """Bit by bit, views of other layouts included; nothing is copied."""
    tensor = torch.randn(3, 4, 5).to(dtype)
    for sent in (tensor, tensor.swapaxes(0, 1), tensor[:, 1:, ::2], tensor[:0]):
        array = array_of(sent)
        assert isinstance(array, np.ndarray)
        assert tensor_of(array).dtype == dtype
        assert torch.equal(tensor_of(array), sent)
    array_of(tensor)[0, 0, 0] = 0
    assert tensor[0, 0, 0] == 0


def small(name: str, dtype: str) -> TorchBackend:
    """A tiny model in another type."""
    spec = replace(read_architecture(folder(name)).spec, weight_bytes=2, kv_bytes=2)
    return TorchBackend(replace(read_architecture(folder(name)), spec=spec), folder(name), poison=POISON,
                        dtype=dtype)


SMALL_TYPES = ("bfloat16", "float16")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Median of a difference: single texts may be sensitive to rounding."""
    return float((found.float() - wanted).abs().median())


@pytest.mark.parametrize("dtype", SMALL_TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_logits_in_16_bits_are_as_good_as_those_of_transformers(name: str, dtype: str) -> None:
    """They are about as far from float32 as transformers is in the same type, however split."""
    made, kind = small(name, dtype), getattr(torch, dtype)
    spec, text = made.architecture.spec, torch.from_numpy(TEXT)[None]
    with torch.no_grad():
        wanted = reference(name)(text).logits[0]
        theirs = deepcopy(reference(name)).to(kind)(text).logits[0]
    for owned in ([range(spec.kv_heads)], [[1], [0, 2, 3]]):
        found = logits(shards(made.architecture, made.weights(), owned), spec.head_dim, kind)
        assert found.dtype == torch.float32
        assert 0 < error(found, wanted) < 2 * error(theirs, wanted)


@pytest.mark.parametrize("dtype", SMALL_TYPES)
@pytest.mark.parametrize("scenario", ["spread", "recompute_chunked", "swap", "moves_ranks"])
def test_runs_in_16_bits_agree_with_transformers(scenario: str, dtype: str) -> None:
    """Nearly always: where two tokens are about equally likely, rounding decides."""
    what = SCENARIOS[scenario]
    made = small("llama", dtype)
    inputs = what.make(model=made.architecture.spec, backend=made)
    _, result = run(inputs, what.delay)
    replay(inputs, result.record)
    same = total = 0
    for request in inputs.requests:
        text = torch.tensor([[*inputs.prompt(request).tolist(), *result.tokens[request.request_id]]])
        with torch.no_grad():
            likeliest = reference("llama")(text, use_cache=False).logits[0].argmax(dim=-1).tolist()
        pairs = list(zip(likeliest[request.prompt_tokens - 1:-1], result.tokens[request.request_id],
                         strict=True))
        same, total = same + sum(a == b for a, b in pairs), total + len(pairs)
    assert total > 40
    assert same >= 0.9 * total


def test_activations_need_room_on_cards() -> None:
    """As much as the largest step holds, shared by the ranks; on the CPU memory is taken as it is needed."""
    spec = MODELS["llama3-8b"]
    whole, half = (activation_bytes(spec, 4096, 64, tp, 2) for tp in (1, 2))
    assert 4096 * 2 * 3 * spec.ffn_hidden < whole < 1.1e9
    assert half < whole < 2 * half
