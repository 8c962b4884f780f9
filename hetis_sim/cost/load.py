"""Builds the cost model that a configuration names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from hetis_sim.cost.fitted import ProfileCost
from hetis_sim.cost.host import HostOverhead
from hetis_sim.cost.model import CostModel
from hetis_sim.cost.profile import NO_CARD, Profile, parse_profile, read_profile
from hetis_sim.cost.roofline import RooflineCost, RooflineSettings
from hetis_sim.spec.errors import SpecError, require_finite
from hetis_sim.spec.gpu import GpuSpec
from hetis_sim.spec.model import ModelSpec

KINDS = ("profile", "roofline")


class ProfileShelf(Mapping[str, Sequence[Profile]]):
    """Profiles by device: the user's first, then the shipped one, which is read when first asked for."""

    def __init__(self, user: Sequence[Profile]) -> None:
        self._user = tuple(user)
        self._found: dict[str, tuple[Profile, ...]] = {}

    def __getitem__(self, device: str) -> Sequence[Profile]:
        if device not in self._found:
            shipped = read_shipped(device)
            own = tuple(profile for profile in self._user if profile.device == device)
            self._found[device] = own if shipped is None else (*own, shipped)
        return self._found[device]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*shipped_devices(), *(profile.device for profile in self._user)}))

    def __len__(self) -> int:
        return len(list(iter(self)))


def shipped_devices() -> tuple[str, ...]:
    """Devices that a profile is shipped for, ``links`` among them."""
    folder = files("hetis_sim.cost") / "profiles"
    names = [item.name for item in folder.iterdir()]
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def measured_names() -> tuple[str, ...]:
    """Calibrations that come with the package; their folders say on what and when they were measured."""
    folder = files("hetis_sim.cost") / "measured"
    return tuple(sorted(item.name for item in folder.iterdir() if item.is_dir()))


def profile_path(name: str | Path) -> Path:
    """Where a profile or a folder of them is: at that path or, if nothing is there, in the package.

    Raises:
        SpecError: neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    names = measured_names()
    if str(name) in names:
        return Path(str(files("hetis_sim.cost") / "measured" / str(name)))
    raise SpecError("profile", str(name), "a readable file, a folder, or a calibration that comes with the "
                    f"package: {', '.join(names)}")


def read_shipped(device: str) -> Profile | None:
    """The profile shipped for ``device``; None where there is none."""
    if device not in shipped_devices():
        return None
    text = (files("hetis_sim.cost") / "profiles" / f"{device}.json").read_text(encoding="utf-8")
    return parse_profile(json.loads(text), f"shipped profile {device}")


def load_cost_model(kind: str = "profile", *, profiles: Sequence[str | Path] = (),
                    host: HostOverhead | None = None, roofline: RooflineSettings | None = None,
                    gpus: Sequence[GpuSpec] | None = None, model: ModelSpec | None = None,
                    cache_copies: float = 0.0, cache_copy_bytes_per_s: float = 0.0) -> CostModel:
    """The cost model ``kind``: ``profile`` (fitted, roofline where nothing is measured) or ``roofline``.

    Args:
        kind: ``profile`` or ``roofline``.
        profiles: files of the user's, folders of them, or names of :func:`measured_names`, which go before
            the shipped profiles module by module. Of a folder, those of devices that are not among ``gpus``
            are left out.
        host: host time of an iteration.
        roofline: shares of the datasheet peaks behind the profiles.
        cache_copies, cache_copy_bytes_per_s: times that the whole cache is copied in an iteration, and how
            fast; see :class:`MemoisedCost`.
        gpus: the cards of the cluster; a user's profile for any other card is then an error.
        model: what is to be served; a calibrated profile of other shapes or numbers is then an error.

    Raises:
        SpecError: unknown kind, a faulty profile, a profile made for a card that is not among ``gpus``
            or for another model than ``model``, or calibrated profiles for some of the cards only.
    """
    if kind not in KINDS:
        raise SpecError("cost.kind", kind, f"one of {', '.join(KINDS)}")
    require_finite("cost.cache_copies", cache_copies, 0.0, 100.0)
    require_finite("cost.cache_copy_bytes_per_s", cache_copy_bytes_per_s, 0.0)
    behind = RooflineCost(roofline, host)
    if kind == "roofline":
        if profiles:
            raise SpecError("cost.profiles", [str(path) for path in profiles],
                            "empty with cost.kind=roofline")
        behind.cache_copies, behind.cache_copy_bytes_per_s = cache_copies, cache_copy_bytes_per_s
        return behind
    user = [profile for name in profiles for profile in _read(profile_path(name), gpus)]
    for profile in user:
        if gpus is not None and profile.device not in NO_CARD:
            _require_used(profile, gpus)
        if model is not None:
            profile.check_model(model)
    if gpus is not None:
        _require_all(user, gpus)
    found = ProfileCost(ProfileShelf(user), behind)
    found.cache_copies, found.cache_copy_bytes_per_s = cache_copies, cache_copy_bytes_per_s
    return found


def _read(path: Path, gpus: Sequence[GpuSpec] | None) -> list[Profile]:
    """The profiles of a file, or those of a folder that the cards have a use for.

    Raises:
        SpecError: a folder without any.
    """
    if not path.is_dir():
        return [read_profile(path)]
    found = [read_profile(file) for file in sorted(path.glob("*.json"))]
    devices = [profile.device for profile in found if profile.device not in NO_CARD]
    names = set(devices) if gpus is None else {gpu.name for gpu in gpus}
    if not names & set(devices):
        raise SpecError("cost.profiles", str(path), f"a folder with a profile of {' or '.join(sorted(names))}"
                        f" (it has {', '.join(devices) or 'none'})")
    return [profile for profile in found if profile.device in names or profile.device in NO_CARD]


def _require_used(profile: Profile, gpus: Sequence[GpuSpec]) -> None:
    """Refuse a profile that was made for another card than those at hand."""
    if all(profile.device != gpu.name for gpu in gpus):
        profile.check_device(gpus[0])


def _require_all(user: Sequence[Profile], gpus: Sequence[GpuSpec]) -> None:
    """Where some of the cards were calibrated, refuse others that nothing is known of but rough figures."""
    calibrated = [profile.device for profile in user if profile.calibration is not None]
    if not set(calibrated) & {gpu.name for gpu in gpus}:
        return
    shipped = shipped_devices()
    for gpu in gpus:
        if gpu.name not in shipped and all(profile.device != gpu.name for profile in user):
            raise SpecError("cost.profiles", sorted(set(calibrated)), f"complete: there is no profile of "
                            f"{gpu.name!r}, which is in the cluster; calibrate with it")
