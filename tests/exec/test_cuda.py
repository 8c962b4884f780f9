"""Runs on a CUDA device generate the tokens that transformers does; they need one.

    python -m pytest tests/exec/test_cuda.py

Several workers share the card, as threads where nothing else is said; other workers compute on the CPU.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from exec_meshes import LONG, OVERLAP, meshed
from exec_models import POISON, TEXT, folder, logits, reference, shards, torch, wrong
from exec_scenarios import ONE, RANKS, SCENARIOS, SHORT, SPREAD, run_until_it_happens
from exec_toys import Fixed, given, pipeline, run, workload

from hetis_exec.driver import Executor, ExecutorInput
from hetis_exec.kernels.cuda import CudaKernels
from hetis_exec.kernels.reference import attention
from hetis_exec.kvcache import KvPool, TableKey
from hetis_exec.models.architecture import read_architecture
from hetis_exec.models.names import tensor_shapes
from hetis_exec.models.sampling import Sampling
from hetis_exec.models.weights import RandomWeights
from hetis_exec.processes import ProcessCrew
from hetis_exec.replay import replay
from hetis_exec.torch_backend import TorchBackend
from hetis_exec.whole_steps import WholeSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CARD = "cuda:0"
CPU = "cpu"


def on(name: str, *places: str, dtype: str = "float32", **settings: Any) -> dict[str, Any]:
    """What :func:`exec_toys.given` takes for a model on some torch devices; the last one repeats."""
    architecture = read_architecture(folder(name))
    if dtype != "float32":
        architecture = replace(architecture, spec=replace(architecture.spec, weight_bytes=2, kv_bytes=2))
    places = (*places, *[places[-1]] * 8)
    settings = {"warm": False, **settings}
    made = TorchBackend(architecture, folder(name), poison=POISON, places=places, dtype=dtype, **settings)
    return {"model": architecture.spec, "backend": made, "timeout_s": 120.0}


def check(name: str, what: ExecutorInput, delay: Any = None) -> Any:
    """Run, and hold tokens and decisions against what they must be."""
    executor, result = run(what, delay)
    assert wrong(name, what, result.tokens) == []
    replay(what, result.record)
    assert all(worker.cache.pool.used_units == 0 for worker in executor.crew.workers.values())
    return executor, result


@pytest.mark.parametrize("scenario", [
    "all_local", "spread", "all_remote", "three_stages", "uneven_ranks", "chunked", "chunked_stages",
    "recompute", "recompute_chunked", "swap", "moves", "moves_ranks", "moves_swap_tight", "relief",
    "parts_ranks", "parts_chunked", "parts_move", "parts_swap"])
def test_tokens_are_those_of_transformers(scenario: str) -> None:
    """With heads, layers and prompts split over workers that share the card, and heads that move."""
    name = ("llama3", "qwen3", "opt", "qwen2", "mistral")[len(scenario) % 5]
    what = SCENARIOS[scenario]
    run_until_it_happens(what, lambda: check(name, what.make(**on(name, CARD)), what.delay))


@pytest.mark.parametrize(("name", "places", "tp"), [("llama3", (CARD,), 1), ("qwen3", (CARD, CPU), 2)])
def test_nodes_of_a_mesh_compute_on_cards(name: str, places: tuple[str, ...], tp: int) -> None:
    """Requests that join in the middle of a node, with all nodes on the card or some on cores."""
    what = meshed(OVERLAP, LONG, tp=tp, blocks=30, **on(name, *places))
    _, result = run(what)
    assert wrong(name, what, result.tokens) == []
    replay(what, result.record)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "mistral", "smol", "opt"])
def test_every_family_decodes_by_graphs(name: str) -> None:
    """Whole on the card."""
    plan = pipeline([[0]], [4], owned=[[read_architecture(folder(name)).spec.kv_heads]])
    check(name, given(plan, Fixed(), SHORT, **on(name, CARD)))


@pytest.mark.parametrize("scenario", ["spread", "uneven_ranks", "three_stages", "moves", "swap",
                                      "parts_move_stages"])
def test_cards_and_cores_work_together(scenario: str) -> None:
    """The first workers on the card, the others on the CPU, in one run."""
    what = SCENARIOS[scenario]
    places = (CARD, CPU) if scenario == "spread" else (CARD, CPU, CARD, CPU)
    run_until_it_happens(what, lambda: check("llama", what.make(**on("llama", *places)), what.delay))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("places", [(CARD,), (CARD, CPU)])
def test_runs_in_16_bits_agree_with_transformers(dtype: str, places: tuple[str, ...]) -> None:
    """Nearly always: where two tokens are about equally likely, rounding decides."""
    for plan, policy in ((ONE, Fixed()), (SPREAD, Fixed((1, 2, 1)))):
        what = given(plan, policy, SHORT, **on("llama", *places, dtype=dtype))
        _, result = run(what)
        same = total = 0
        for request in what.requests:
            made = result.tokens[request.request_id]
            with torch.no_grad():
                text = torch.tensor([[*what.prompt(request).tolist(), *made]])
                likeliest = reference("llama")(text, use_cache=False).logits[0].argmax(dim=-1).tolist()
            same += sum(a == b for a, b in zip(likeliest[request.prompt_tokens - 1:-1], made, strict=True))
            total += len(made)
        assert same >= 0.9 * total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "llama-biases", "opt"])
def test_logits_are_those_of_transformers(name: str, dtype: str) -> None:
    """In float32 to rounding; in 16 bits about as close to that as transformers is in the same type."""
    kind, card, text = getattr(torch, dtype), torch.device(CARD), torch.from_numpy(TEXT)[None]
    made = on(name, CARD, dtype=dtype)["backend"]
    spec = made.architecture.spec
    with torch.no_grad():
        wanted = reference(name)(text).logits[0]
        theirs = deepcopy(reference(name)).to(kind)(text).logits[0].float()
    for owned in ([range(spec.kv_heads)], [[1], [0, 2, 3]]):
        ranks = shards(made.architecture, made.weights(CARD), owned, CARD)
        found = logits(ranks, spec.head_dim, kernels=CudaKernels(card, 1, 4, spec.head_dim, kind)).cpu()
        if dtype == "float32":
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        else:
            ours, other = ((x - wanted).abs().median() for x in (found, theirs))
            assert 0 < ours < 2 * other


def test_graphs_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in layers, whole steps and replayed ones; sampled by probability too."""
    replayed: list[int] = []
    step = WholeSteps.run

    def counting(self: WholeSteps, request_ids: Any, *rest: Any) -> Any:
        replayed.append(len(request_ids))
        return step(self, request_ids, *rest)

    monkeypatch.setattr(WholeSteps, "run", counting)
    requests = workload(12, (3, 30), (6, 20), gap_s=0.0)
    for sampling in (Sampling(), Sampling(0.8, 0.9, 3)):
        replayed.clear()
        with_graphs, without = (
            run(given(ONE, Fixed(), requests, **on("qwen3", CARD, sampling=sampling, cuda_graphs=graphs)))[1]
            for graphs in (True, False))
        assert with_graphs.tokens == without.tokens
        assert max(replayed) > 8


@pytest.mark.parametrize(("plan", "placement", "places"), [
    (ONE, None, (CARD,)), (SPREAD, (1, 2, 1), (CARD, CARD, CPU)), (RANKS, (1, 1, 1, 1, 2, 0, 2), (CARD,))])
def test_workers_may_be_processes(plan: Any, placement: Any, places: tuple[str, ...]) -> None:
    """Forked from a server that has imported torch and has not touched the device."""
    what = given(plan, Fixed(placement), SHORT, **on("llama", *places))
    result = Executor(what, ProcessCrew).run()
    assert wrong("llama", what, result.tokens) == []
    replay(what, result.record)


def test_graphs_are_captured_before_a_run() -> None:
    """For every size up to the largest that there can be; later ones change nothing."""
    what = given(ONE, Fixed(), SHORT, **on("qwen3", CARD, dtype="bfloat16", warm=True))
    executor, _ = run(what)
    (worker,) = executor.crew.workers.values()
    steps = worker._whole_steps
    assert sorted(steps._steps) == [1, 2, 4, 8, 16]
    assert sorted(layout.tokens for layout in steps._prompts._steps) == [16, 32, 48, 64, 96, 128]
    assert all(step.graph is not None for step in (*steps._steps.values(), *steps._prompts._steps.values()))


def test_random_weights_are_drawn_on_the_card() -> None:
    """The same each time, by name and seed; those of another seed differ."""
    architecture = read_architecture(folder("llama"))
    shapes = tensor_shapes(architecture)
    name = next(name for name, shape in shapes.items() if len(shape) == 2)
    card = torch.device(CARD)
    a, b, c = (RandomWeights(shapes, seed, torch.bfloat16, card).tensor(name) for seed in (1, 1, 2))
    assert a.device == card
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_parts_of_a_step_are_measured_on_the_device() -> None:
    """Laps of its events are there for steps in layers, and none is negative."""
    what = given(SPREAD, Fixed((1, 2, 1)), SHORT, **on("llama", CARD))
    steps = run(what)[1].recorder.steps()
    decoding = steps[steps["decode_tokens"] > 0]
    for part in ("dense_s", "attention_s", "head_transfer_s"):
        assert (decoding[part] > 0).all()
    assert (steps["host_s"] > 0).all()


def test_the_card_is_asked_for_its_free_memory() -> None:
    """A cache that is larger is refused before anything starts."""
    from hetis_sim.spec.errors import InfeasibleError

    what = given(ONE, Fixed(), SHORT, units=1 << 34, **on("llama", CARD))
    with pytest.raises(InfeasibleError, match=r"cuda:0 has .* GiB free"):
        run(what)


@pytest.mark.parametrize("scenario", ["all_local", "recompute"])
def test_prompts_are_replayed_from_graphs(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, and nearly all tokens are those of steps in layers: the order of sums differs."""
    replayed: list[int] = []
    step = WholeSteps.run_prompts

    def counting(self: WholeSteps, request_ids: Any, *rest: Any) -> Any:
        replayed.append(len(request_ids))
        return step(self, request_ids, *rest)

    monkeypatch.setattr(WholeSteps, "run_prompts", counting)
    what, found = SCENARIOS[scenario], {}
    for graphs in (True, False):
        _, result = run(what.make(**on("qwen3", CARD, dtype="bfloat16", cuda_graphs=graphs)), what.delay)
        found[graphs] = result.tokens
        assert bool(replayed) or not graphs
    pairs = [(a, b) for request in found[True] for a, b in zip(found[True][request], found[False][request],
                                                               strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.8 * len(pairs)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 128), (4, 128), (7, 64), (8, 80)])
def test_attention_of_prompts_is_that_of_torch(heads: int, head_dim: int) -> None:
    """By matrix units, for prompts with and without tokens before them, side by side."""
    groups, block, cases = 2, 16, [(1, 0), (300, 0), (17, 65), (129, 1000), (64, 16)]
    card, kind = torch.device(CARD), torch.bfloat16
    kernels = CudaKernels(card, 4096, block, head_dim, kind)
    pool = KvPool(4096, block, kernels)
    keys = {n: [TableKey(n, 0, g) for g in range(groups)] for n in range(len(cases))}
    whole, news, contexts = [], *zip(*cases, strict=True)
    for n, (new, context) in enumerate(cases):
        for key in keys[n]:
            pool.open(key, 2, (new + context - 1) // block + 1, 1)
        whole.append(torch.randn(2, groups, new + context, head_dim, device=card, dtype=kind))
        if context:
            pool.write_groups(pool.spots(keys[n], 0, context), 1, *whole[n][:, :, :context])
    tokens = sum(news)
    q = torch.randn(tokens, groups, heads, head_dim, device=card, dtype=kind)
    k, v = (torch.cat([w[side, :, context:].swapaxes(0, 1)
                       for w, (_, context) in zip(whole, cases, strict=True)]) for side in range(2))
    begins = [sum(news[:n]) for n in range(len(cases))]
    tables = [pool.table(key) for n in keys for key in keys[n]]
    plan = kernels.plan_prompts(tables, begins, news, contexts, heads)
    assert plan is not None
    out = kernels.attend_prompts(plan, 1, q, k, v)
    for n, (new, context) in enumerate(cases):
        here = slice(begins[n], begins[n] + new)
        wanted = attention(q[here].cpu().float(), *whole[n].cpu().float())
        assert (out[here].cpu().float() - wanted).abs().max() < 3e-2
        read = torch.stack(pool.read(n, 0, range(groups), 1, 0, new + context))
        assert torch.equal(read, whole[n])


def test_prompts_of_new_lengths_take_no_memory_from_the_driver() -> None:
    """A worker that has prepared finds room for all that comes."""
    what = given(ONE, Fixed(), workload(20, (3, 60), (2, 5), gap_s=0.0),
                 **on("qwen3", CARD, dtype="bfloat16", warm=True))
    executor = Executor(what)
    (worker,) = executor.crew.workers.values()
    prepared, before = worker.prepare, []

    def prepare() -> None:
        prepared()
        before.append(torch.cuda.memory_stats(CARD)["num_device_alloc"])

    worker.prepare = prepare  # type: ignore[method-assign]
    executor.run()
    assert torch.cuda.memory_stats(CARD)["num_device_alloc"] == before[0]
