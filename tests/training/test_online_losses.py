"""INPO, XPO, WPO, CPL, OSP, R-DPO in the trainer against the textbook: full logits, single rows."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rlhf_fast import losses
from rlhf_fast.errors import UserError
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, num_epochs=2, batch_size=4, schedule="constant")


def language_model(seed, micro_batch_tokens=4096):
    return LanguageModel(
        tiny_model(seed=seed),
        pad_token_id=3,
        precision="fp32",
        micro_batch_tokens=micro_batch_tokens,
    )


def explored_pairs(count):
    """The first of two pairs has a chosen response of the reference, the second a rejected one."""
    pairs = []
    for i, pair in enumerate(make_pairs(count)):
        name = ("chosen", "rejected")[i % 2]
        response = replace(getattr(pair, name), source="reference")
        pairs.append(replace(pair, **{name: response}, chosen_reward=i / 2))
    return pairs


class Textbook:
    """Log-probabilities and alignments of one response after another."""

    def __init__(self):
        self.policy, self.reference, self.previous = (tiny_model(seed=s) for s in (1, 0, 1))

    def tokens(self, model, completion):
        start = len(completion.prompt_token_ids)
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        rows = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        return rows.gather(1, ids[0, start:, None])[:, 0], (2 * rows).logsumexp(-1)

    def logps(self, model, pair):
        return [self.tokens(model, c)[0].sum()[None] for c in (pair.chosen, pair.rejected)]

    @torch.no_grad()
    def fixed(self, model, pair):
        return self.logps(model, pair)

    def inpo(self, pair):
        refs = self.fixed(self.reference, pair), self.fixed(self.previous, pair)
        return losses.inpo_loss(*self.logps(self.policy, pair), *refs, eta=0.2, tau=0.05).loss

    def xpo(self, pair):
        ref, is_chosen = self.fixed(self.reference, pair), pair.chosen.source == "reference"
        is_chosen = torch.tensor([is_chosen])
        return losses.xpo_loss(*self.logps(self.policy, pair), *ref, is_chosen, alpha=0.05).loss

    def wpo(self, pair):
        loss = losses.dpo_loss(
            *self.logps(self.policy, pair), *self.fixed(self.reference, pair), beta=0.1
        ).loss
        weights = [
            losses.wpo_weights(logps, sum_p2, cu_seqlens=torch.tensor([0, len(logps)]))
            for logps, sum_p2 in (self.tokens(self.policy, c) for c in (pair.chosen, pair.rejected))
        ]
        return loss * (weights[0] * weights[1]).clamp(max=1)

    def osp(self, pair):
        ours, ref = self.logps(self.policy, pair), self.fixed(self.reference, pair)
        h = 0.1 * ((ours[0] - ref[0]) - (ours[1] - ref[1]))
        p = 1 / (1 + math.exp(-2.0 * (pair.chosen_reward - pair.rejected_reward)))
        return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)

    def r_dpo(self, pair):
        ours, ref = self.logps(self.policy, pair), self.fixed(self.reference, pair)
        h = 0.1 * ((ours[0] - ref[0]) - (ours[1] - ref[1]))
        longer = len(pair.chosen.token_ids) - len(pair.rejected.token_ids)
        return -F.logsigmoid(h + 0.3 * longer)

    def cpl(self, pair):
        return losses.cpl_loss(*self.logps(self.policy, pair), alpha=0.1, bias=0.5).loss

    def trajectory(self, name, pairs):
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-3, weight_decay=0.0)
        generator, means = torch.Generator().manual_seed(7), []
        for _ in range(OPTIMIZER.num_epochs):
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for i in range(0, len(order), OPTIMIZER.batch_size):
                batch = [pairs[j] for j in order[i : i + OPTIMIZER.batch_size]]
                loss = torch.cat([getattr(self, name)(pair) for pair in batch]).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                optimizer.step()
                means.append(loss.item())
        return means


CONFIGS = {
    "inpo": DPOConfig("ipo_sum", beta=0.2, previous_share=0.75, optimizer=OPTIMIZER),
    "xpo": DPOConfig(exploration=0.05, optimizer=OPTIMIZER),
    "wpo": DPOConfig(weigh_by_policy=True, optimizer=OPTIMIZER),
    "cpl": DPOConfig("cpo", bias=0.5, optimizer=OPTIMIZER),
    "r_dpo": DPOConfig(length_penalty=0.3, optimizer=OPTIMIZER),
    "osp": DPOConfig(soft_label_scale=2.0, optimizer=OPTIMIZER),
}


@pytest.mark.parametrize("micro_batch_tokens", [4096, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_trainer_follows_the_textbook(name, micro_batch_tokens):
    pairs = explored_pairs(8)
    policy = language_model(1, micro_batch_tokens)
    rows = train_dpo(policy, language_model(0), pairs, config=CONFIGS[name], seed=7)
    expected = torch.tensor(Textbook().trajectory(name, pairs))
    got = torch.tensor([row["loss"] for row in rows])
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)
    plain = train_dpo(
        language_model(1),
        language_model(0),
        pairs,
        config=DPOConfig(CONFIGS[name].loss_type, beta=CONFIGS[name].beta, optimizer=OPTIMIZER),
        seed=7,
    )
    assert abs(rows[0]["loss"] - plain[0]["loss"]) > 1e-2  # the term is not nothing


def test_soft_labels_and_weights_go_together():
    """What the gap does to WPO's weighted loss, of which it is a factor at first."""
    pairs = [replace(pair, chosen_reward=1.0) for pair in make_pairs(4)]
    config = replace(CONFIGS["wpo"], soft_label_scale=1e9)  # as sure as without soft labels
    sure, plain = (
        train_dpo(language_model(1), language_model(0), pairs, config=c, seed=7)
        for c in (config, CONFIGS["wpo"])
    )
    even = [replace(pair, chosen_reward=pair.rejected_reward) for pair in pairs]
    unsure = train_dpo(language_model(1), language_model(0), even, config=config, seed=7)
    assert sure[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert abs(unsure[0]["loss"] - plain[0]["loss"]) > 1e-4


def test_mistakes():
    with pytest.raises(UserError, match="needs pairs of a response of the policy and one of the"):
        train_dpo(language_model(1), None, make_pairs(2), config=CONFIGS["xpo"], seed=0)
    with pytest.raises(UserError, match=r"previous_share must be in \[0, 1\], and 0 with a loss"):
        DPOConfig("simpo", previous_share=0.5)
    with pytest.raises(UserError, match="bias must be .* got 0.5 with sigmoid"):
        DPOConfig(bias=0.5)
    with pytest.raises(UserError, match="data.targets must be left out for 'hinge'"):
        DPOConfig("hinge", soft_label_scale=1.0)
    with pytest.raises(UserError, match="margins must be left out for 'sppo_hard'"):
        DPOConfig("sppo_hard", length_penalty=0.1)
    with pytest.raises(UserError, match="exploration must be >= 0, got -1"):
        DPOConfig(exploration=-1)
