"""Model modules: logits of transformers, whole and in shares; weights from folders and from seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from exec_models import MODELS, TEXT, Owned, backend, folder, logits, reference, shards, torch

from hetis_exec.backend import Wanted
from hetis_exec.messages import Sample
from hetis_exec.models.architecture import made_up, read_architecture
from hetis_exec.models.names import tensor_shapes
from hetis_exec.models.sampling import Sampling
from hetis_exec.models.weights import RandomWeights, Weights
from hetis_exec.torch_backend import TorchBackend
from hetis_sim.spec.architectures import MODELS as CATALOGUE
from hetis_sim.spec.errors import SpecError


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    """On one rank, and as the sum of ranks with groups that need not lie side by side."""
    made = backend(name)
    spec = made.architecture.spec
    with torch.no_grad():
        wanted = reference(name)(torch.from_numpy(TEXT)[None]).logits[0]
    for owned in ([range(spec.kv_heads)], [[1], [0, 2, *range(3, spec.kv_heads)]]):
        found = logits(shards(made.architecture, made.weights(), owned), spec.head_dim)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_random_weights_are_the_same_however_split(name: str) -> None:
    """Another number of ranks is the same model, another seed another one."""
    architecture = made_up(backend(name).architecture.spec)
    shapes = tensor_shapes(architecture)

    def of(seed: int, owned: Owned) -> Any:
        return logits(shards(architecture, RandomWeights(shapes, seed), owned), architecture.spec.head_dim)

    whole = of(1, [range(4)])
    assert torch.allclose(of(1, [[0, 1, 2], [3]]), whole, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(of(2, [range(4)]), whole, rtol=1e-1, atol=1e-1)


def test_every_dense_architecture_of_the_catalogue_has_random_weights() -> None:
    """Shapes add up to the parameters that the simulator counts."""
    made = 0
    for spec in CATALOGUE.values():
        if spec.experts > 1 or (spec.linear_biases and not spec.learned_positions):
            with pytest.raises(SpecError, match=r"model\.(experts|name)"):
                made_up(spec)
            continue
        shapes = tensor_shapes(made_up(spec))
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == spec.parameters, spec.name
        made += 1
    assert made > 30


# -- sampling ----------------------------------------------------------------------------------------------


def drawn(sampling: Sampling, chances: Sequence[float], number: int = 2000) -> np.ndarray:
    """How often each token comes out."""
    rows = torch.tensor(chances).log().expand(number, -1)
    tokens = sampling.choose(rows, [Wanted(n, 5) for n in range(number)])
    return np.bincount(tokens, minlength=len(chances)) / number


def test_sampling_draws_by_probability() -> None:
    """Shares are the probabilities, raised by 1 / temperature; greedy takes the likeliest."""
    chances = [0.2, 0.5, 0.3]
    assert drawn(Sampling(), chances).tolist() == [0.0, 1.0, 0.0]
    assert np.allclose(drawn(Sampling(1.0), chances), chances, atol=0.05)
    sharp = np.array(chances) ** 2 / np.sum(np.array(chances) ** 2)
    assert np.allclose(drawn(Sampling(0.5), chances), sharp, atol=0.05)


def test_top_p_draws_from_the_smallest_set_that_reaches_it() -> None:
    """The token that reaches the sum is in, those after it are out."""
    assert np.allclose(drawn(Sampling(1.0, 0.7), [0.2, 0.5, 0.3]), [0.0, 0.625, 0.375], atol=0.05)
    assert np.allclose(drawn(Sampling(1.0, 0.9), [0.2, 0.5, 0.3]), [0.2, 0.5, 0.3], atol=0.05)
    assert drawn(Sampling(1.0, 0.01), [0.2, 0.5, 0.3]).tolist() == [0.0, 1.0, 0.0]


def test_samples_depend_on_seed_request_and_position_alone() -> None:
    """The same place gives the same token in any batch; others differ."""
    logits_ = torch.zeros(3, 1000)
    places = [Wanted(4, 9), Wanted(5, 9), Wanted(4, 10)]
    first = Sampling(1.0, seed=1).choose(logits_, places)
    assert len(set(first.tolist())) == 3
    assert Sampling(1.0, seed=1).choose(logits_, places[::-1]).tolist() == first.tolist()[::-1]
    assert Sampling(1.0, seed=2).choose(logits_, places).tolist() != first.tolist()


def test_rows_of_one_batch_are_drawn_each_in_its_own_way() -> None:
    """Greedy, few tokens, and equal numbers for equal seeds whatever the request is called."""
    logits_ = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(900, -1)
    greedy, narrow = Sample(0.0), Sample(1.0, top_k=2)
    hows = [greedy, narrow, Sample(1.0, top_p=0.6, seed=7)] * 300
    tokens = Sampling(1.0, seed=3).choose(logits_, [Wanted(n, n // 3, how) for n, how in enumerate(hows)])
    assert set(tokens[::3]) == {0}
    assert np.allclose(np.bincount(tokens[1::3], minlength=4) / 300, [0.625, 0.375, 0, 0], atol=0.1)
    assert set(tokens[2::3]) == {0, 1}
    others = [Wanted(5000 + n, n // 3, how) for n, how in enumerate(hows)]
    again = Sampling(0.0, seed=4).choose(logits_, others)
    assert again[2::3].tolist() == tokens[2::3].tolist()
    assert again[1::3].tolist() != tokens[1::3].tolist()


@pytest.mark.parametrize(("values", "message"), [((-1.0, 1.0), "temperature=-1.0"), ((1.0, 0.0), "top_p=0.0"),
                                                 ((float("nan"), 1.0), "temperature=nan")])
def test_bad_sampling_is_refused(values: tuple[float, float], message: str) -> None:
    """The key and the value are named."""
    with pytest.raises(SpecError, match=message):
        Sampling(*values)


# -- folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a folder that may be spoilt."""
    return copytree(folder("llama"), tmp_path / "model")


def edit_config(path: Path, **changes: object) -> None:
    """Change keys of the config.json."""
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def load(path: Path) -> Weights:
    """What a run does before it starts workers."""
    return TorchBackend(read_architecture(path), path).weights()


NORM = "model.norm.weight"


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda p: (p / "config.json").unlink(), "config.json.*a readable file"),
    (lambda p: (p / "config.json").write_text("{"), "valid JSON"),
    (lambda p: edit_config(p, model_type="mamba"), "model_type='mamba'.*llama, mistral, qwen2, qwen3, opt"),
    (lambda p: edit_config(p, hidden_act="swish2"), "hidden_act='swish2'.*silu"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "longrope", "factor": 2.0}),
     "rope_type='longrope'"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}),
     "beta_fast=1.0"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "yarn", "factor": 2.0, "truncate": "no"}),
     "truncate='no'"),
    (lambda p: edit_config(p, rms_norm_eps=-1), "rms_norm_eps=-1"),
    (lambda p: edit_config(p, model_type="mistral", sliding_window=16), "sliding_window=16"),
    (lambda p: edit_config(p, hidden_size=40), r"tensors='.*shape \[89, 32\]'.*must be \[89, 40\]"),
    (lambda p: edit_config(p, num_hidden_layers=5), r"tensors='model.layers.4.input_layernorm.*missing"),
    (lambda p: edit_config(p, num_hidden_layers=3), r"layers.3.*and 4 more not expected"),
    (lambda p: edit_tensors(p, lambda t: t.pop(NORM)), f"'{NORM} missing'"),
    (lambda p: edit_tensors(p, lambda t: t.update({"extra": torch.zeros(2)})), "'extra not expected'"),
    (lambda p: edit_tensors(p, lambda t: t.update({NORM: torch.zeros(5)})), r"norm.weight of shape \[5\]"),
    (lambda p: edit_tensors(p, lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), "type I8"),
    (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100), "a safetensors file"),
    (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-7]),
     "a safetensors file"),
    (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pytorch_model.bin may run code"),
    (lambda p: (p / "model.safetensors").unlink(), r"a folder with \*.safetensors"),
    (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
     "files of its folder"),
    (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "an index"),
])
def test_bad_folders_are_refused(model: Path, spoil: Callable[[Path], object], message: str) -> None:
    """The error names the folder's fault before any worker exists."""
    spoil(model)
    with pytest.raises(SpecError, match=message):
        load(model)


def test_weights_may_lie_in_several_files(model: Path) -> None:
    """Those that the index names, and no others."""
    from safetensors.torch import load_file, save_file

    tensors = {name: x.clone() for name, x in load_file(model / "model.safetensors").items()}
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, model / file)
    where = {name: file for file, some in parts.items() for name in some}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (model / "model.safetensors").write_bytes(b"not looked at")
    weights = load(model)
    assert all(torch.equal(weights.tensor(name), tensors[name]) for name in names)


def test_half_precision_weights_become_float32(model: Path) -> None:
    """Stored types differ, computed ones do not."""
    edit_tensors(model, lambda tensors: tensors.update({name: x.bfloat16() for name, x in tensors.items()}))
    assert load(model).tensor(NORM).dtype == torch.float32
