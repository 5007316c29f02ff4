"""The table that ends a run of comparisons."""

from types import SimpleNamespace

from tests.peers import summary

TRL = "tests/integrations/test_trl_trainers.py"


def outcome(nodeid, passed=True, **properties):
    return SimpleNamespace(
        nodeid=nodeid,
        keywords={"peers": 1},
        when="call",
        passed=passed,
        skipped=False,
        user_properties=list(properties.items()),
    )


def test_disagreement_is_shown(monkeypatch):
    monkeypatch.setattr(summary.importlib.metadata, "version", lambda name: "1.0")
    rows = summary.rows(
        [
            outcome(f"{TRL}::a", trajectory="DPO, 20 steps"),
            outcome(f"{TRL}::b", False, trajectory="KTO, 20 steps"),
            outcome("tests/peers/test_verl_policy.py::c"),
            outcome("tests/peers/test_verl_policy.py::d", False),
            SimpleNamespace(keywords={}),
        ]
    )
    assert rows == [
        ("trl", "1.0", "DPO, 20 steps", "yes"),
        ("trl", "1.0", "KTO, 20 steps", "NO"),
        ("verl", "1.0", "policy: values and gradients", "1 of 2"),
    ]
    assert "KTO, 20 steps                        NO" in summary.table(rows)
