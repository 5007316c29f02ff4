"""QLoRA (arXiv 2305.14314): adapters on 4-bit weights train as on the weights these stand for."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

bitsandbytes = pytest.importorskip("bitsandbytes")
CONFIG = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e-2, num_epochs=4, batch_size=8))


def quantised(directory):
    tiny_model().save_pretrained(directory)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its format for inference rounds the scales
    return model


def rounded(directory):
    """The same model with its 4-bit weights written out."""
    model = quantised(directory)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            plain = nn.Linear(*weight.shape[::-1], bias=False)
            plain.weight.data.copy_(weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = model.is_loaded_in_4bit = False
    return model


def trained(model):
    torch.manual_seed(0)
    add_lora(model, LoraConfig(rank=4))
    policy = LanguageModel(model, pad_token_id=3, precision="fp32")
    rows = train_dpo(policy, None, make_pairs(16), config=CONFIG, seed=0)
    return policy, torch.tensor([[row["loss"], row["grad_norm"]] for row in rows])


def test_as_with_the_weights_that_four_bits_stand_for(tmp_path):
    model = quantised(tmp_path)
    bits = {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(bits) == 14  # seven layers in each of two blocks
    policy, rows = trained(model)
    _, expected = trained(rounded(tmp_path))
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-5)
    assert rows[-1, 0] < 0.6 < rows[0, 0]
    after = {n.replace(".base_layer", ""): p for n, p in policy.model.named_parameters()}
    for name, value in bits.items():
        assert torch.equal(after[name], value), name
