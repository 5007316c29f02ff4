"""Patching what is installed here: all seams or none, undone to the very same objects, and told."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from rlhf_fast.cli.environment import print_environment
from rlhf_fast.integrations import ACTIVE, FRAMEWORKS, PatchRefused
from rlhf_fast.integrations.patching import _owner
from tests.integrations import conftest  # noqa: F401  stand-ins for what frameworks import in vain

pytestmark = pytest.mark.peers


@pytest.fixture(params=[name for name in FRAMEWORKS if find_spec(name)])
def framework(request, record_property):
    record_property("package", request.param)
    yield import_module(f"rlhf_fast.integrations.{request.param}").FRAMEWORK
    if request.param in ACTIVE:
        ACTIVE[request.param].undo()


def names(package: str) -> dict[tuple[str, ...], object]:
    """Everything that the package's loaded modules, their classes and their dictionaries hold."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != package:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            inside = vars(value) if inspect.isclass(value) else value
            if (inspect.isclass(value) and value.__module__ == name) or type(value) is dict:
                found |= {(name, key, repr(k)): v for k, v in inside.items()}
    return found


def test_undo_restores_identity(framework):
    framework.patch().undo()  # loads the modules
    before = names(framework.package)
    with framework.patch() as handle:
        changed = [k for k, v in names(framework.package).items() if v is not before.get(k, v)]
        assert len(changed) >= len(handle.targets) > 0
        for swap in handle.swaps:
            owner, name = _owner(swap.seam)
            assert vars(owner)[name] is swap.replacement
    after = names(framework.package)
    assert after.keys() == before.keys()
    assert not [key for key, value in before.items() if after[key] is not value]


@pytest.mark.parametrize("version", ["0.0.1", "99.0"])
def test_a_version_outside_the_range_is_refused(framework, version, monkeypatch, capsys):
    before = names(framework.package)
    monkeypatch.setattr(type(framework), "installed", lambda self: version)
    with pytest.raises(PatchRefused, match=f"version must be {framework.package} .*got {version}"):
        framework.patch()
    after = names(framework.package)
    assert not ACTIVE and not [key for key in before if after[key] is not before[key]]
    print_environment()
    assert f"{framework.package} {version}: cannot be patched" in capsys.readouterr().out


def test_the_environment_says_what_is_patched(framework, capsys):
    with framework.patch() as handle:
        print_environment()
        said = capsys.readouterr().out
    assert f"{framework.package} {framework.installed()}: patched" in said
    assert all(f"    {target}\n" in said for target in handle.targets)
    print_environment()
    assert f"{framework.package} {framework.installed()}: not patched" in capsys.readouterr().out
