"""Every seam of every framework and generation, patched and not, on stand-ins: always runs."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest

from rlhf_fast.integrations import ACTIVE, llamafactory, openrlhf, trl, verl
from tests.integrations import seam_cases, standins, trl_generations
from tests.integrations.standins import assert_near

PACKAGES = Path(__file__).with_name("packages")
VERSIONS = [
    *((trl, "trl", version) for version in trl_generations.FILES),
    *((openrlhf, "openrlhf", version) for version in ("0.9.0", "0.11.2")),
    (verl, "verl", "0.9.1"),
    (llamafactory, "llamafactory", "0.9.5"),
]
CASES = {
    "trl": seam_cases.TRL,
    "openrlhf": seam_cases.OPENRLHF,
    "verl": seam_cases.VERL,
    "llamafactory": seam_cases.LLAMAFACTORY,
}


@pytest.fixture(params=VERSIONS, ids=lambda v: f"{v[1]}-{v[2]}")
def framework(request, tmp_path, monkeypatch):
    """(integration, cases by target) with a stand-in installed; the real package comes back."""
    integration, package, version = request.param
    loaded = lambda: [n for n in sys.modules if n.split(".")[0] == package]  # noqa: E731
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    standins.install(
        tmp_path, package, version, trl_generations.FILES[version] if package == "trl" else {}
    )
    if package != "trl":
        (tmp_path / package).symlink_to(PACKAGES / package)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    cases = dict(CASES[package])
    if package == "trl" and version in seam_cases.TRL_HEADS:
        cases["trl.trainer.utils:_ChunkedLogProbFunction"] = seam_cases.TRL_HEADS[version]
    yield integration, cases
    if package in ACTIVE:
        ACTIVE[package].undo()
    for name in loaded():
        del sys.modules[name]


def at(target: str):
    module, _, path = target.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def test_replacements_compute_what_the_originals_do(framework):
    integration, cases = framework
    targets = [seam.target for seam in integration.FRAMEWORK.seams()]
    assert set(targets) <= set(cases), "a seam without a case"
    originals = {target: at(target) for target in targets}
    expected = {target: cases[target](originals[target]) for target in targets}
    with integration.patch() as handle:
        assert handle.targets == targets
        for target in targets:
            assert at(target) is not originals[target]
            got = cases[target](at(target))
            assert got.keys() == expected[target].keys(), target
            for name, value in expected[target].items():
                assert name != "gradient 0" or value.abs().max() > 0, "nothing to compare"
                assert_near(f"{target}, {name}", got[name].to(value.dtype), value)
    assert {target: at(target) for target in targets} == originals


def test_every_generation_is_covered():
    for integration in (trl, openrlhf, verl, llamafactory):
        framework = integration.FRAMEWORK
        found = {framework.range_of(v) for i, _, v in VERSIONS if i is integration}
        assert found == set(framework.generations)
