from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, one_pass, report_data


@pytest.mark.parametrize("count", [2, 3])
def test_limits_are_timed_in_turn_and_give_the_floor(count, capsys):
    arrays = torch.randn(count, 4, 8)
    limits = one_pass.limits(*arrays)
    args = SimpleNamespace(only=None, seconds=0.1, batch=4, length=8, save=False)
    contestants = {"rlhf_fast": lambda: torch.ones(1 << 20).sum()}
    harness.race("some_loss", "forward", contestants, lambda run: 0.0, args, limits)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["rlhf_fast", "one", "one"]
    assert float(rows[1][-2]) == pytest.approx(1.0)
    assert float(rows[0][-2]) > 1.0


def test_limits_are_no_rivals():
    for name in one_pass.limits(*torch.randn(2, 4, 8)):
        row = {"contestant": name}
        assert report_data.is_limit(row) and not report_data.is_rival(row)


def test_the_pass_reads_all_arrays_and_writes_one():
    a, b, c = torch.randn(3, 4, 8)
    for arrays, want in (((a, b), a - b), ((a, b, c), a + b * c)):
        alone = one_pass.limits(*arrays)["one pass alone"]
        torch.testing.assert_close(alone(), want)
