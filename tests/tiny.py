"""Tiny random models and their tokenizer, built here: nothing is downloaded."""

from __future__ import annotations

import torch

VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<start>{{ m['role'] }} {{ m['content'] }}<end> {% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE, word: str = "w{}"):
    """Words w20..w511 and punctuation are one token each; `<end>` ends a turn, pads, and is eos.

    `word` makes other words of their numbers.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<start>", "<end>", "system", "user", "assistant", ".", "!"]
    words += [word.format(i) for i in range(len(words), VOCAB_SIZE)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<end>",
        eos_token="<end>",
        additional_special_tokens=["<start>", "<pad>"],
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template,
    )


def tiny_config(architecture: str = "llama", **changes):
    from transformers import AutoConfig

    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 3,
    }
    if architecture == "gpt2":
        options = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}
        options |= {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": 3}
    if architecture == "gemma2":
        options |= {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
    if architecture == "granite":
        options |= {"logits_scaling": 4.0}
    if architecture == "cohere":
        options |= {"logit_scale": 0.25}
    if architecture == "gpt_neox":
        del options["head_dim"]
    if architecture in ("mixtral", "qwen3_moe"):
        options |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
        options |= {"num_local_experts": 4, "num_experts": 4}
    return AutoConfig.for_model(architecture, **options | changes)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(architecture, **changes), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # At the usual scale a random model is nearly uniform and hides mistakes.
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.generation_config.eos_token_id = 3
    return model.eval()


def tiny_reward_model(seed: int = 0):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config()
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
