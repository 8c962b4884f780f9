"""Short names for runs: what they have in common is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Flat = dict[str, Any]

QUIET = ("output", "progress", "sim.log_decisions", "sim.timeline", "sim.debug", "sim.event_budget")
"""Settings that change nothing in a run."""

QUIET_SECTION = "study."
"""Settings of studies; they change nothing in a run of one."""

LOADS = ("workload.rate", "workload.users")
SEEDS = ("workload.seed",)
SECTIONS = ("policy", "model", "cluster", "workload")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Settings by dotted key; lists as text."""
    found: Flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = repr(value) if isinstance(value, (list, tuple, Mapping)) else value
    return found


def names_of(configs: Sequence[Mapping[str, Any]], fallback: Sequence[str],
             origins: Sequence[str]) -> list[tuple[str, str]]:
    """A unique name and a group for each run.

    Runs of one group differ in load and seed only. A name begins with the policy and goes on
    with the settings in which the runs differ; the parts of a section (a cluster's hosts)
    are left out where its name tells them apart.

    Args:
        configs: the configuration of each run.
        fallback: names to fall back on where settings do not tell runs apart.
        origins: ``simulated`` or ``measured``.
    """
    settings = [{key: value for key, value in flat(config).items()
                 if key not in QUIET and not key.startswith(QUIET_SECTION)} for config in configs]
    keys = [key for key in dict.fromkeys(key for config in settings for key in config)
            if _differs(settings, key)]
    names, groups = [], []
    for config, origin, folder in zip(settings, origins, fallback, strict=True):
        start = str(config.get("policy.name", folder))
        own = [_part(key, config[key]) for key in keys
               if key in config and config[key] is not None and key != "policy.name"]
        steady = [_part(key, config[key]) for key in keys
                  if key in config and config[key] is not None and key not in (*LOADS, *SEEDS, "policy.name")]
        origin_part = [origin] if len(set(origins)) > 1 else []
        names.append(", ".join([start, *own, *origin_part]))
        groups.append(", ".join([start, *steady, *origin_part]))
    repeated = {name for name, count in Counter(names).items() if count > 1}
    unique = [f"{name} ({folder})" if name in repeated else name
              for name, folder in zip(names, fallback, strict=True)]
    # Folders of different parents may share a name; a number tells the last ones apart.
    counts = Counter(unique)
    seen: Counter[str] = Counter()
    for i, name in enumerate(unique):
        seen[name] += 1
        if counts[name] > 1:
            unique[i] = f"{name} #{seen[name]}"
    return list(zip(unique, groups, strict=True))


def _differs(settings: Sequence[Flat], key: str) -> bool:
    """Whether a setting tells runs apart that the name of its section does not."""
    section = key.partition(".")[0]
    by_name: dict[Any, set[Any]] = {}
    for config in settings:
        name = config.get(f"{section}.name") if section in SECTIONS and key != f"{section}.name" else None
        if key in config or section not in SECTIONS:
            by_name.setdefault(name, set()).add(config.get(key))
    return any(len(values) > 1 for values in by_name.values())


def _part(key: str, value: Any) -> str:
    short = key.rpartition(".")[2]
    if short == "name":
        return str(value)
    if isinstance(value, float):
        value = f"{value:g}"
    return f"{short} {value}"
