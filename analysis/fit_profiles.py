"""Fits every shipped profile to the public kernel timings and writes the table of held-out errors.

    python -m analysis.fit_profiles --data ../shared/data

The result depends on nothing but the data: same files, byte-identical profiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from analysis.fit.crosscheck import cross_table
from analysis.fit.data import Store
from analysis.fit.derived import derive_all
from analysis.fit.network import all_reduce_modules, transfer_module
from analysis.fit.recipes import RECIPES, Fitted, fit_card
from analysis.fit.report import error_table
from hetis_sim.cost.profile import LINKS_DEVICE, SCHEMA, parse_profile

ORDER = ("gemm", "elementwise", "prefill_attention", "decode_attention", "all_reduce", "transfer")
PROFILES = Path(__file__).parents[1] / "hetis_sim" / "cost" / "profiles"


def fit_all(store: Store) -> dict[str, dict[str, Any]]:
    """Every profile by name, in the form of its file."""
    found: dict[str, Fitted] = {}
    for name in RECIPES:
        print(f"fitting {name}", file=sys.stderr)
        found[name] = fit_card(store, name)
    print("deriving cards without timings of their own", file=sys.stderr)
    derive_all(store, found)
    links = {"all_reduce": all_reduce_modules(store, found), "transfer": transfer_module(store)}
    profiles = {name: as_profile(name, card.modules) for name, card in sorted(found.items())}
    return {**profiles, LINKS_DEVICE: as_profile(LINKS_DEVICE, links)}


def as_profile(name: str, modules: dict[str, Any]) -> dict[str, Any]:
    """The content of one profile file."""
    ordered = {module: modules[module] for module in ORDER if module in modules}
    return {"schema": SCHEMA, "name": f"hetis-{name}", "device": name, "modules": ordered}


def write(profiles: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write each profile as JSON: one line for each module, so that differences can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, profile in profiles.items():
        parse_profile(profile, name)
        lines = [f"  {json.dumps(module)}: {json.dumps(content)}"
                 for module, content in profile["modules"].items()]
        head = {key: profile[key] for key in ("schema", "name", "device")}
        text = json.dumps(head)[:-1] + ', "modules": {\n' + ",\n".join(lines) + "\n}}\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder of the public timings (manifest.json in it)")
    parser.add_argument("--out", type=Path, default=PROFILES, help="folder of the profiles")
    chosen = parser.parse_args(arguments)
    if not (chosen.data / "manifest.json").is_file():
        parser.error(f"--data {chosen.data}: no manifest.json there")
    store = Store(chosen.data)
    profiles = fit_all(store)
    write(profiles, chosen.out)
    print(error_table(profiles))
    print()
    print(cross_table(store, profiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
