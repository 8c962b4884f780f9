"""Run folders, page parsing and a browser for the tests of reports."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from metrics_fakes import PLAN, fake_run

from hetis_sim import simulate
from hetis_sim.metrics import build_manifest, roles_of_plan, summarize, write_run
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.spec.slo import Slo

LOADED = ("policy=hetis", "model=llama-13b", "rate=40", "requests=120", "sim.warmup_fraction=0.1",
          "sim.drop_tail_fraction=0.1")
BROWSER_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
                 "--virtual-time-budget=20000", "--window-size=1280,2000")
VOID = {"meta", "link", "br", "hr", "img", "input"}


def simulate_to(folder: Path, *overrides: str) -> Path:
    """Run the simulator and keep the folder."""
    simulate(*overrides, output=folder)
    return folder


def write_fake(folder: Path, recorder: Recorder | None = None, *, label: str = "simulated",
               plan: dict[str, Any] = PLAN, config: dict[str, Any] | None = None) -> Path:
    """Write a made-up record as a run folder."""
    recorder = recorder or fake_run(80)
    roles = roles_of_plan(plan, len(recorder.devices))
    summary = summarize(recorder, slo=Slo(), roles=roles, label=label)
    manifest = build_manifest(label=label, seeds={}, hashes={})
    return write_run(folder, recorder=recorder, summary=summary, manifest=manifest, plan=plan, config=config)


def edited(source: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run folder with one of its JSON files changed."""
    shutil.copytree(source, folder)
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


# -- pages --------------------------------------------------------------------------------


@dataclass
class Page(HTMLParser):
    """What is in a page, and what is wrong with its tags."""

    open: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    headlines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    badges: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._boxes: list[str] = []
        self._text: list[str] | None = None
        self.data: dict[str, Any] = {}
        self._script = False

    @classmethod
    def of(cls, text: str) -> Page:
        """Parse a page."""
        page = cls()
        page.feed(text)
        page.close()
        page.wrong += [f"<{tag}> is never closed" for tag in page.open]
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if len(attributes) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action",
                                                                            "srcset")]
        if "id" in attributes:
            self.ids.append(attributes["id"] or "")
        if "data-chart" in attributes:
            self.charts.append(attributes["data-chart"] or "")
        if tag == "div" and attributes.get("class") in ("headline", "warning"):
            self._boxes.append(attributes["class"] or "")
        self._script = tag == "script" and attributes.get("id") == "report-data"
        badge = tag == "span" and (attributes.get("class") or "").startswith("badge")
        if tag in ("td", "p", "li") or badge:
            self._text = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> where {self.open[-1:]} is open")
            return
        self.open.pop()
        if tag == "div" and self._boxes and "p" not in self.open:
            self._boxes.pop()
        if self._text is not None and tag in ("td", "p", "li", "span"):
            text = "".join(self._text)
            place = {"td": self.cells, "li": self.notes, "span": self.badges}.get(tag)
            if tag == "p" and self._boxes:
                place = self.headlines if self._boxes[-1] == "headline" else self.warnings
            if place is not None:
                place.append(text)
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)
        if self._script:
            self.data = json.loads(data)
            self._script = False


# -- a browser ----------------------------------------------------------------------------


def browser() -> str:
    """Path of Chromium; the test skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium on the path")


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its script has run, and what it wrote to the console."""
    result = subprocess.run([browser(), *BROWSER_FLAGS, f"--user-data-dir={profile}", "--dump-dom",
                             page.as_uri()],
                            capture_output=True, text=True, timeout=180, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
