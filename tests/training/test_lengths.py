"""What becomes of an example at the length limit is counted as what it is."""

from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.rows import RowReport
from rlhf_fast.training.lengths import LengthConfig, limit_length

LIMIT = LengthConfig(max_length=6, too_long="cut_response")


def limited(prompt, response, mask=None, config=LIMIT):
    report = RowReport()
    group = TokenGroup(prompt, [response], mask and [mask])
    return limit_length(group, config, "row 1", report), report


def test_what_fits_is_kept_as_it_is():
    group, report = limited([1, 2], [3, 4])
    assert group == TokenGroup([1, 2], [[3, 4]])
    assert (report.num_kept, report.num_truncated, report.refused) == (1, 0, {})


def test_a_prompt_is_cut_at_its_beginning_but_for_the_first_token():
    config = LengthConfig(max_length=6, too_long="cut_prompt")
    group, report = limited([1, 2, 3, 4, 5], [6, 7, 8], config=config)
    assert group == TokenGroup([1, 4, 5], [[6, 7, 8]]) and report.num_truncated == 1


def test_nothing_learned_is_refused_whether_it_was_cut_or_not():
    for response, mask in ([3, 4], [False, False]), ([3] * 9, [False] * 8 + [True]):
        group, report = limited([1, 2], response, mask)
        assert group is None and report.num_kept == report.num_truncated == 0
        assert sum(report.refused.values()) == 1
