"""The report's vocabulary: how each metric of metrics.jsonl is called, printed and explained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How one key of metrics.jsonl is named and printed."""

    key: str
    label: str
    note: str
    form: str = "number"
    """number, share (printed in percent), count or seconds."""
    digits: int = 0
    """Decimals beyond what the size of the column's values asks for."""


EVALUATION = [
    Metric("win_rate", "win rate", "share of held-out prompts won against the start", "share"),
    Metric("gold", "gold", "mean score of the held-out judge, which training never sees"),
    Metric("reward", "reward", "mean reward of the held-out responses, as in training"),
    Metric("kl", "KL", "nats per response against the reference model"),
    Metric("sqrt_kl", "√KL", "square root of the KL, in which rewards mostly rise linearly"),
    Metric("length_tokens", "tokens", "mean response length in tokens"),
    Metric("finished_share", "finished", "responses that end by themselves", "share"),
    Metric("distinct_2", "distinct-2", "share of distinct bigrams; repetition lowers it", "share"),
    Metric("duplicate_rate", "duplicates", "responses that repeat another one's text", "share"),
    Metric("entropy", "entropy", "nats per sampled token, as the sampling engine saw it"),
    Metric("length_correlation", "reward~length", "correlation of reward and length in a prompt"),
]
SAMPLES = [
    Metric("train_reward", "reward", "mean reward of this iteration's samples"),
    Metric("reward_spread", "spread", "mean standard deviation of rewards within a prompt"),
    Metric("train_length_tokens", "tokens", "mean length of the samples in tokens"),
    Metric("train_finished_share", "finished", "samples that end by themselves", "share"),
    Metric("train_duplicate_rate", "duplicates", "samples that repeat another's text", "share"),
    Metric("train_entropy", "entropy", "nats per sampled token, as the sampling engine saw it"),
    Metric("num_pairs", "pairs", "preference pairs trained on", "count"),
    Metric("num_responses", "responses", "responses trained on", "count"),
    Metric("num_ties", "ties", "prompts whose samples all scored alike", "count"),
    Metric("staleness", "staleness", "updates by which the sampling policy was older", "count"),
]
LEARNING = [
    Metric("loss", "loss", "mean training loss of the update", digits=1),
    Metric("reward_accuracy", "accuracy", "pairs that the implicit reward orders right", "share"),
    Metric(
        "desirable_reward", "desirable", "mean implicit reward of desirable responses", digits=1
    ),
    Metric("undesirable_reward", "undesirable", "the same of undesirable responses", digits=1),
    Metric("baseline", "baseline", "log-ratio that counts as neutral: KTO's KL", digits=1),
    Metric("reward_margin", "margin", "mean implicit reward of chosen minus rejected", digits=1),
    Metric("chosen_logps", "chosen logps", "mean log-probability of chosen responses, in nats"),
    Metric("rejected_logps", "rejected logps", "the same of rejected responses"),
    Metric("chosen_nll", "chosen NLL", "nats per token of chosen responses"),
    Metric("pair_weight", "pair weight", "mean weight of a pair by the policy's probabilities"),
    Metric("top_accuracy", "top accuracy", "lists whose best response is the likeliest", "share"),
    Metric("grad_norm", "grad. norm", "mean norm of the gradient before clipping"),
    Metric("num_tokens", "tokens/step", "tokens per optimiser step, prompts included", "count"),
]
POLICY_GRADIENT = [
    Metric("policy_entropy", "policy entropy", "nats of the policy's next-token distribution"),
    Metric("clip_low", "clipped low", "tokens clipped below 1 - epsilon_low", "share"),
    Metric("clip_high", "clipped high", "tokens clipped above 1 + epsilon_high", "share"),
    Metric("ratio", "ratio", "mean probability ratio to the policy before the update", digits=1),
    Metric("old_kl_k3", "step KL", "nats per token from the policy before the update", digits=2),
    Metric("ref_kl", "ref. KL", "nats per token to the reference, as the loss counts it", digits=2),
    Metric("sampling_weight", "weight", "mean weight of trainer over sampler probability"),
    Metric("sampling_clipped", "weights cut", "tokens whose weight met its bound", "share"),
    Metric("value_loss", "value loss", "mean loss of the critic", digits=1),
    Metric("explained_variance", "explained", "variance of returns that the critic explains"),
    Metric("credit_loss", "credit loss", "mean loss of the token-level reward model", digits=1),
    Metric("credit_accuracy", "credit accuracy", "outcomes it predicts right", "share"),
]
TIME = [
    Metric("seconds_generate", "generate", "seconds spent sampling", "seconds"),
    Metric("seconds_score", "score", "seconds spent scoring", "seconds"),
    Metric("seconds_update", "update", "seconds spent training", "seconds"),
    Metric("seconds_evaluate", "evaluate", "seconds spent on held-out prompts", "seconds"),
]
TABLES = {
    "Held-out evaluation": EVALUATION,
    "Training samples": SAMPLES,
    "Update": LEARNING,
    "Policy gradient": POLICY_GRADIENT,
    "Seconds": TIME,
}
KNOWN = {metric.key for metrics in TABLES.values() for metric in metrics} | {"win_rate_stderr"}
