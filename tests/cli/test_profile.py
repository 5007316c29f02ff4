"""`rlhf-fast profile`: traces of the stages asked for, and a table of all."""

import gzip
import json
from pathlib import Path

import pytest

from rlhf_fast.cli import commands
from rlhf_fast.cli.profile import ProfilingProgress, print_stages
from rlhf_fast.online.config_file import config_to_yaml
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


def test_the_command_traces_a_stage_and_prints_all(config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    chosen = ["--num-iterations", "1", "--trace", "iteration_1/compl*", "--trace-steps", "1"]
    commands.profile(["--config", str(path), *chosen])
    shown = capsys.readouterr().out
    assert "Self CPU" in shown and "all stages" in shown and "report.html" in shown
    (trace,) = (Path(config.output_dir) / "profile").iterdir()
    assert trace.name.startswith("iteration_1-compl")


def test_a_pattern_without_a_stage_is_told(config, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    monkeypatch.setattr("rlhf_fast.online.workflow.run_online", lambda *_: "report.html")
    monkeypatch.setattr("rlhf_fast.cli.profile.print_stages", print)
    commands.profile(["--config", str(path), "--trace", "iteration_7/*"])
    assert "no stage that matches 'iteration_7/*'" in capsys.readouterr().out


def test_a_recipe_can_be_named_without_an_option(monkeypatch):
    asked = []

    def stop(command, summary, arguments):
        asked.extend(arguments)
        raise SystemExit

    monkeypatch.setattr(commands, "_online_config", stop)
    with pytest.raises(SystemExit):
        commands.profile(["quickstart", "--trace-steps", "2", "--seed", "1"])
    assert asked == ["--recipe", "quickstart", "--seed", "1"]
