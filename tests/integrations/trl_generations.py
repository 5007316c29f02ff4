"""Stand-ins for TRL of every generation that can be patched: the signatures of each, plain bodies.

`FILES[version]` are the files of a package; `standins.install` lays them out.
"""

from __future__ import annotations

FROM_LOGITS_OLD = """
import torch


def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def entropy_from_logits(logits, chunk_size=128):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)
"""
FROM_LOGITS = """
import torch


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    logps = (logits / temperature).log_softmax(-1)
    logps = logps.gather(-1, index[..., None])[..., 0]
    return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits, chunk_size=128):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def selective_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    entropy = entropy_from_logits(logits / temperature)
    entropy = entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)
    return selective_log_softmax(logits, index, temperature, row_mask), entropy
"""
HEAD = """

class _ChunkedLogProbFunction:
    @staticmethod
    def forward({parameters}):
        logits = {hidden} @ weight.t() * logit_scale + {bias}
        cap = final_logit_softcapping
        logits = logits if cap is None else cap * (logits / cap).tanh()
        logps = (logits / temperature).log_softmax(-1)
        probs = logps.exp()
        entropy = -(probs * logps).sum(-1)
        logp = logps.gather(-1, targets[:, None])[:, 0]
        {result}

    @classmethod
    def apply(cls, *args, **kwargs):
        return cls.forward(None, *args, **kwargs)
"""
PAIR = "return logp, entropy"
FIVE = """mean = (logits / temperature).mean(-1).detach()
        squares = probs.square().sum(-1).log().detach()
        values = (entropy, squares, mean, logps.argmax(-1) == targets)
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return logp, *(v if n in outputs else None for n, v in zip(names, values))"""
TAIL = "final_logit_softcapping=None, logit_scale=1.0"
HEAD_WITHOUT_BIAS = HEAD.format(
    parameters=f"ctx, last_hidden, weight, targets, temperature, chunk_size, {TAIL}",
    hidden="last_hidden",
    bias="0.0",
    result=PAIR,
)
HEAD_PAIR = HEAD.format(
    parameters=f"ctx, last_hidden, weight, bias, targets, temperature, chunk_size, {TAIL}",
    hidden="last_hidden",
    bias="bias",
    result=PAIR,
)
FUSED_HEAD = HEAD.format(
    parameters=f"ctx, hidden, weight, bias, targets, temperature, chunk_size, {TAIL}, "
    'outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")',
    hidden="hidden",
    bias="bias",
    result=FIVE,
)
USE_TRITON = """

def _use_triton(device):
    return False
"""
CHUNKED_NLL = """
def _chunked_cross_entropy_loss(
    hidden_states,
    lm_head_weight,
    chunk_size,
    labels=None,
    shift_labels=None,
    num_items_in_batch=None,
    logit_scale=1.0,
    final_logit_softcapping=None,
    lm_head_bias=None,
):
    logits = logit_scale * (hidden_states[:, :-1] @ lm_head_weight.t() + lm_head_bias)
    logps, labels = logits.log_softmax(-1), labels[:, 1:]
    live = labels != -100
    logp = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * live
    entropy = -(logps.exp() * logps).sum(-1) * live
    right = ((logps.argmax(-1) == labels) & live).sum().float()
    return -logp.sum() / num_items_in_batch, right, entropy.sum().detach(), live.sum()
"""
TRAINER = """
from trl.trainer.utils import selective_log_softmax


class {name}Trainer:
    def {method}({parameters}):
        logits = model(inputs).logits[:, :-1]
        return selective_log_softmax(logits / 0.7, inputs[:, 1:])
"""

PAIRS = """
import torch
from torch import nn
from trl.trainer.utils import selective_log_softmax


class {name}Trainer:
    @staticmethod
    def get_batch_logps({parameters}):
        if logits.shape[:-1] != labels.shape:
            raise ValueError("Logits and labels must have the same shape.")
        if not is_encoder_decoder:
            labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
        mask = labels != -100
        logps = selective_log_softmax(logits, torch.where(mask, labels, 0)) * mask
        return logps.sum(-1) / mask.sum(-1) if average_log_prob else logps.sum(-1)

    def concatenated_forward(self, model, batch):
        logits, half = model(batch["ids"], use_cache=False).logits, len(batch["ids"]) // 2
        chosen = logits[:half][..., :-1, :].contiguous()
        nll = nn.CrossEntropyLoss()(
            chosen.view(-1, chosen.shape[-1]), batch["ids"][:half, 1:].reshape(-1)
        )
        logps = self.get_batch_logps(logits, batch["labels"], average_log_prob=True)
        return logps[:half], logps[half:], logits[:half, :-1, :], logits[half:, :-1, :], nll
"""
OF_LOGPS = "logits, labels, average_log_prob=False, is_encoder_decoder=False"
OF_LOGPS_0_24 = (
    "logits, labels, average_log_prob=False, label_pad_token_id=-100, is_encoder_decoder=False"
)


def pairs(folder: str, parameters: str) -> dict[str, str]:
    files = {}
    for name in ("ORPO", "CPO"):
        path = f"trl/{folder.format(name.lower())}"
        files[f"{path}/{name.lower()}_trainer.py"] = PAIRS.format(name=name, parameters=parameters)
        files[f"{path}/__init__.py"] = ""
    return files


def trainer(name: str, method: str, parameters: str = "self, model, inputs") -> str:
    return TRAINER.format(name=name, method=method, parameters=parameters)


SAMPLING = {
    f"trl/trainer/{name.lower()}_trainer.py": trainer(name, "_get_per_token_logps_and_entropies")
    for name in ("GRPO", "RLOO")
}
IN_TRAINING = "self, model, inputs, return_outputs"
DPO = {"trl/trainer/dpo_trainer.py": trainer("DPO", "_compute_loss", IN_TRAINING)}
KTO = {"trl/trainer/kto_trainer.py": trainer("KTO", "_compute_loss", IN_TRAINING)}
SFT = {"trl/trainer/sft_trainer.py": CHUNKED_NLL}
ONLINE = trainer("OnlineDPO", "_forward")
ONLINE_DPO = {
    "trl/experimental/online_dpo/online_dpo_trainer.py": ONLINE,
    "trl/experimental/online_dpo/__init__.py": "",
    "trl/experimental/__init__.py": "",
    **pairs("experimental/{}", OF_LOGPS),
}
OF_0_24 = {
    **pairs("trainer", OF_LOGPS_0_24),
    "trl/trainer/dpo_trainer.py": trainer("DPO", "concatenated_forward"),
    "trl/trainer/kto_trainer.py": trainer("KTO", "forward"),
    "trl/trainer/online_dpo_trainer.py": ONLINE,
}


def package(utils: str, *parts: dict[str, str]) -> dict[str, str]:
    files = {"trl/__init__.py": "", "trl/trainer/__init__.py": "", "trl/trainer/utils.py": utils}
    for part in parts:
        files |= part
    return files


FILES = {
    "0.24.0": package(FROM_LOGITS_OLD, SAMPLING, OF_0_24),
    "1.0.0": package(FROM_LOGITS_OLD, SAMPLING, DPO, ONLINE_DPO),
    "1.6.0": package(FROM_LOGITS_OLD + HEAD_WITHOUT_BIAS, SAMPLING, DPO, SFT, ONLINE_DPO),
    "1.8.0": package(FROM_LOGITS_OLD + HEAD_WITHOUT_BIAS, SAMPLING, DPO, KTO, SFT, ONLINE_DPO),
    "1.14.2": package(FROM_LOGITS + HEAD_PAIR, SFT, ONLINE_DPO),
    "1.15.0": package(FROM_LOGITS + FUSED_HEAD, ONLINE_DPO),
    "1.16.0": package(FROM_LOGITS + FUSED_HEAD + USE_TRITON, ONLINE_DPO),
}
