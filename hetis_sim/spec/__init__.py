"""Facts: model architectures, GPUs, links, hosts, clusters, requests and objectives."""

from hetis_sim.spec.architectures import MODELS
from hetis_sim.spec.cluster import ClusterSpec, Device, HostSpec, LinkSpec
from hetis_sim.spec.errors import HetisError, InfeasibleError, SpecError
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.gpus import GPUS
from hetis_sim.spec.huggingface import load_huggingface, model_from_huggingface
from hetis_sim.spec.links import LINKS
from hetis_sim.spec.model import ModelSpec
from hetis_sim.spec.parse import ClusterConfig, ModelConfig, cluster_from_mapping, model_from_mapping
from hetis_sim.spec.request import Request
from hetis_sim.spec.slo import Slo

__all__ = [
    "GPUS", "LINKS", "MODELS", "ClusterConfig", "ClusterSpec", "Device", "GpuSpec", "HetisError", "HostSpec",
    "InfeasibleError", "LinkSpec", "ModelConfig", "ModelSpec", "Request", "Slo", "SpecError",
    "cluster_from_mapping", "load_huggingface", "model_from_huggingface", "model_from_mapping",
]
