"""What samples say of the system between events."""

from __future__ import annotations

import numpy as np
import pytest
from support_runs import TINY, Scenario


@pytest.mark.parametrize("layers", [(6,), (2, 4)])
def test_heads_on_devices_sum_to_those_of_the_running_requests(layers: tuple[int, ...]) -> None:
    """Whole heads of every request that holds cache, in every layer, wherever moves put them."""
    scenario = Scenario(layers=layers, workers=2, rate=60.0)
    samples = scenario.run().samples()
    devices = range(len(scenario.cluster().devices))
    heads = np.array([samples[f"heads_{d}"] for d in devices])
    np.testing.assert_allclose(heads.sum(axis=0), TINY.query_heads * samples["running"], rtol=1e-12)
    workers = scenario.plan().instances[0].attention_workers
    assert heads[list(workers)].max() > 0
    empty = np.array([samples[f"used_bytes_{d}"] for d in devices]) == 0
    assert not heads[empty].any()
