"""Records of a run, the figures made from them, and the folder that keeps both."""

from hetis_sim.metrics.checks import little_residual, record_violations
from hetis_sim.metrics.load import Run, load_run
from hetis_sim.metrics.manifest import build_manifest
from hetis_sim.metrics.recorder import Recorder
from hetis_sim.metrics.records import Records
from hetis_sim.metrics.runfolder import write_run
from hetis_sim.metrics.summary import Summary, summarize
from hetis_sim.metrics.table import print_summary, summary_line, summary_markdown
from hetis_sim.metrics.timeline import write_timeline
from hetis_sim.metrics.usage import roles_of_plan
from hetis_sim.metrics.window import Trim

__all__ = ["Recorder", "Records", "Run", "Summary", "Trim", "build_manifest", "little_residual", "load_run",
           "print_summary", "record_violations", "roles_of_plan", "summarize", "summary_line",
           "summary_markdown", "write_run", "write_timeline"]
