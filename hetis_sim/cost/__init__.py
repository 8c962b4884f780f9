"""Durations: what each part of an iteration costs on each device and link."""

from hetis_sim.cost.fitted import ProfileCost
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.load import load_cost_model, shipped_devices
from hetis_sim.cost.model import AttentionCost, CostModel, ProvenanceRow, TransferCost
from hetis_sim.cost.profile import Profile, read_profile
from hetis_sim.cost.roofline import RooflineCost, RooflineSettings

__all__ = ["AttentionCost", "CostModel", "HostOverhead", "Profile", "ProfileCost", "ProvenanceRow",
           "RooflineCost", "RooflineSettings", "TransferCost", "load_cost_model", "read_profile",
           "shipped_devices"]
