"""`--help`: a screen at a time, and everything when asked for."""

import dataclasses
import subprocess
import sys

import pytest

from rlhf_fast.cli import commands, main
from rlhf_fast.cli.main import COMMANDS, GROUPS
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.recipes import METHODS


def shown(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def groups() -> list[str]:
    config = OnlineConfig()
    fields = dataclasses.fields(config)
    return [f.name for f in fields if dataclasses.is_dataclass(getattr(config, f.name))]


def test_overview_has_the_main_options_and_names_every_group(capsys):
    text = shown(capsys, "online", "--help")
    assert "--data.prompts STR" in text and "--reward.pairs" not in text
    listed = text.partition("in groups\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == [name for name in groups() if name != "data"]
    assert "  selection    Which responses the policy learns from.\n" in text
    assert text.count("\n") < 110


def test_a_group_comes_with_its_subgroups_alone(capsys):
    text = shown(capsys, "online", "--help", "generation")
    assert "--generation.backend" in text and "--generation.sampling.max-new-tokens INT" in text
    assert "--data.prompts" not in text and "--dpo.beta" not in text


def test_all_groups_together_are_everything(capsys):
    everything = shown(capsys, "online", "--help", "all")
    for group in groups():
        assert shown(capsys, "online", "--help", group) in everything


def test_option_texts_are_filled(capsys):
    """tyro keeps the source's line breaks, which would leave a ragged paragraph."""
    lines = shown(capsys, "online", "--help", "selection").splitlines()
    for line, following in zip(lines, lines[1:]):
        if line.startswith(" " * 8) and following.startswith(" " * 8):
            assert len(line) + 1 + len(following.split()[0]) > 80, line


def test_every_method_is_listed_with_its_settings(capsys):
    text = shown(capsys, "online", "--help", "methods")
    names = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    assert names == set(METHODS)
    assert "dpo.weigh_by_policy=True" in text


def test_the_file_gives_the_defaults_that_help_shows(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_iterations: 7\n")
    assert "(default: 7)" in shown(capsys, "online", "--config", str(path), "--help")


@pytest.mark.parametrize("command", [*GROUPS["one stage, files in and files out"], "online"])
def test_the_example_has_what_is_needed(command, capsys, tmp_path, monkeypatch):
    """Given as it stands it is refused for its files alone, which are not here."""
    monkeypatch.chdir(tmp_path)
    text = " ".join(shown(capsys, command, "--help").split())
    _, _, example = text.partition(f"Example: rlhf-fast {command} ")
    words = example.partition(" --recipe" if command == "online" else " --config")[0].split()
    assert main([command, *words]) == 1
    error = capsys.readouterr().err
    assert "no such file: " in error or "no such model directory: " in error, error
    assert "default: ''" not in text


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"online", "iterate"}))
def test_every_command_has_help(capsys, command):
    assert f"rlhf-fast {command}" in shown(capsys, command, "--help")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("online", "--help", "evaluaton"), "did you mean `evaluation`?"),
        (("online", "--method", "GRPO"), "model is missing"),
        (("online", "--method", "gpro"), "there is no method 'gpro'; did you mean `pro` or `gspo`"),
        (("online", "--method", "qqq"), "`rlhf-fast online --help methods` lists them"),
        (("profile", "quickstar"), "there is no recipe 'quickstar'; did you mean `quickstart`?"),
    ],
)
def test_mistyped_names_get_an_answer(capsys, arguments, said):
    assert main(list(arguments)) == 1
    assert said in capsys.readouterr().err


def test_listed_commands_are_all_commands_but_the_second_name():
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted([*listed, "iterate"]) == sorted(COMMANDS)
    assert COMMANDS["iterate"] is commands.online


@pytest.mark.parametrize("command", ["online", "evaluate"])
def test_help_loads_no_models_library(command):
    """transformers and torch's sharding take seconds, also of whoever mistypes an option."""
    code = (
        "import sys; from rlhf_fast.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "finally: assert not {'transformers', 'torch.distributed.tensor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
