"""Notes what the steps of an instance ask the cost model for, where that lies outside what was fitted."""

from __future__ import annotations

from hetis_sim.control.step import Step
from hetis_sim.control.timing import DecodeLines
from hetis_sim.cost.outside import RangeWatch
from hetis_sim.policies.plan import InstancePlan
from hetis_sim.spec.cluster import ClusterSpec
from hetis_sim.spec.gpu import GpuSpec


class StepWatch:
    """The queries of one instance's steps, with how often each was made."""

    def __init__(self, watch: RangeWatch, cluster: ClusterSpec, plan: InstancePlan) -> None:
        self._watch = watch
        self._at = [cluster.devices[p.device].gpu for p in plan.positions]
        self._attention = ["remote_attention" if p.remote and watch.ends(gpu, "remote_attention")
                           else "decode_attention" for p, gpu in zip(plan.positions, self._at, strict=True)]
        self._stages = [_kinds(cluster, stage.devices) for stage in plan.stages]
        kinds = {gpu.name: gpu for gpu in self._at}
        self._dense = {name: "dense_layer" if watch.ends(gpu, "dense_layer") else "gemm"
                       for name, gpu in kinds.items()}

    def note(self, step: Step, lines: DecodeLines, first_n: int, count: int) -> None:
        """A step of ``count`` iterations has ended, the first of which was the lane's number ``first_n``."""
        note = self._watch.note
        tokens = step.prefill_tokens + step.decoding
        sampled = max(1, step.decoding + sum([chunk.last for chunk in step.chunks]))
        for gpus in self._stages:
            for gpu in gpus:
                dense = self._dense[gpu.name]
                note(gpu, dense, "tokens" if dense == "dense_layer" else "m", tokens, tokens, count)
                for chunk in step.chunks:
                    keys = chunk.new_tokens + chunk.context_tokens
                    note(gpu, "prefill_attention", "keys", keys, keys, 1)
        for gpu in self._stages[-1]:
            note(gpu, "head", "tokens", sampled, sampled, count)
        for p, groups, base in lines.held if step.decoding else ():
            first = base / groups + 1 + first_n
            module = self._attention[p]
            note(self._at[p], module, "rows", groups, groups, count)
            note(self._at[p], module, "tokens_per_row", first, first + count - 1, count)
        note(self._at[0], "host_overhead", "sequences", sampled, sampled, count)


def _kinds(cluster: ClusterSpec, devices: tuple[int, ...]) -> list[GpuSpec]:
    found = [cluster.devices[device].gpu for device in devices]
    return list({gpu.name: gpu for gpu in found}.values())
