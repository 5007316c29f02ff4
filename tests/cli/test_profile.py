"""`rlhf-fast profile`: traces of the stages asked for, and a table of all."""

import gzip
import json
from pathlib import Path

from rlhf_fast.cli.profile import ProfilingProgress, print_stages
from rlhf_fast.online.workflow import run_online


def test_stages_are_traced_and_listed(config, capsys):
    folder = Path(config.output_dir)
    progress = ProfilingProgress(folder / "profile", "iteration_1/policy", max_steps=1)
    run_online(config, progress)
    print_stages(folder)
    assert list(progress.tables) == ["iteration_1/policy"]
    (trace,) = (folder / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("rlhf_fast" in event.get("name", "") for event in events)
    shown = capsys.readouterr().out
    assert "iteration_1/policy" in shown and "all stages" in shown
