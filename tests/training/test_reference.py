"""Reference log-probabilities: computed once, kept on disk, never mistaken for others."""

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.reference import reference_logps
from tests.tiny import tiny_model

GROUPS = [
    TokenGroup([10, 11], [[20, 3], [21, 22, 3]]),
    TokenGroup([12], [[23, 3], [24, 3]]),
    TokenGroup([10, 11], [[25, 3], [20, 3]]),
]


def language_model(seed=0, precision="fp32"):
    return LanguageModel(tiny_model(seed=seed), pad_token_id=3, precision=precision)


def test_kept_on_disk_and_read_back(tmp_path, monkeypatch):
    model = language_model()
    expected = model.score_groups(GROUPS)
    first = reference_logps(model, GROUPS, cache=tmp_path)
    for mine, theirs in zip(first, expected):
        assert mine == pytest.approx(theirs, rel=1e-5)
    monkeypatch.setattr(LanguageModel, "score_groups", lambda *_: pytest.fail("computed again"))
    assert reference_logps(model, GROUPS, cache=tmp_path) == first


def test_other_weights_precision_or_data_are_other_files(tmp_path):
    other = [*GROUPS[:2], TokenGroup([10, 11], [[25, 3], [20, 4]])]
    nudged = language_model()
    with torch.no_grad():
        nudged.model.model.norm.weight[0] += 1e-6
    reference_logps(language_model(), GROUPS, cache=tmp_path)
    reference_logps(nudged, GROUPS, cache=tmp_path)
    reference_logps(language_model(precision="bf16"), GROUPS, cache=tmp_path)
    reference_logps(language_model(), other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_is_named(tmp_path):
    reference_logps(language_model(), GROUPS, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{file.name}.*damaged"):
        reference_logps(language_model(), GROUPS, cache=tmp_path)
