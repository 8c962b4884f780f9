"""Durations: what each part of an iteration costs on each device and link."""

from hetis_sim.cost.load import load_cost_model
from hetis_sim.cost.model import AttentionCost, CostModel, ProvenanceRow, TransferCost
from hetis_sim.cost.roofline import HostOverhead, RooflineCost, RooflineSettings

__all__ = ["AttentionCost", "CostModel", "HostOverhead", "ProvenanceRow", "RooflineCost", "RooflineSettings",
           "TransferCost", "load_cost_model"]
