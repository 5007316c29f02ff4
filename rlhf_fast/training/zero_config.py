"""What is taken of a DeepSpeed configuration: ZeRO. The trainer's options decide the rest."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

OLDEST = "0.19.8"
"""Stage 2 of 0.17.6 and 0.18.2 keeps the last micro-batch's gradient alone; 0.18.9 fails."""

TAKEN = {
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
INSTEAD = {
    "amp": "precision",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "torch_autocast": "precision",
    "train_batch_size": "optimizer.batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_tokens",
}
"""Sections of DeepSpeed's configuration and the option here that decides instead."""


def zero_config(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration as launched: its file, or Accelerate's `deepspeed_config`.

    Raises:
        UserError: it asks for what the trainer's own options decide, or DeepSpeed is missing.
    """
    _check_version()
    plugin = getattr(accelerator, "deepspeed_plugin", None)
    if plugin is None:  # made from the launcher's environment
        from accelerate import DeepSpeedPlugin

        plugin = DeepSpeedPlugin()
    return checked(plugin.deepspeed_config)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Those sections that are taken, without what is left to "auto"."""
    for name, section in config.items():
        if name not in TAKEN and _is_set(name, section):
            instead = INSTEAD.get(name)
            what = f"--{instead} decides" if instead else "it is not supported"
            raise UserError(f'DeepSpeed\'s {name}: {what}; leave it out or "auto", got {section}')
    taken = {n: _without_auto(s) for n, s in config.items() if n in TAKEN and s != "auto"}
    zero = taken.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) or {}
        if offload.get("device") == "nvme" or offload.get("ratio", 1) != 1:
            raise UserError(f"DeepSpeed's {name}: device must be cpu, ratio 1, got {offload}")
    return taken


def _check_version() -> None:
    wanted = f"pip install 'deepspeed>={OLDEST}'"
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(f"launched with DeepSpeed, which is not installed: {wanted}") from None
    if Version(found) < Version(OLDEST):
        raise UserError(
            f"DeepSpeed {found} may lose gradients when a step has several micro-batches: {wanted}"
        )


def _is_set(name: str, section: Any) -> bool:
    """Whether it says anything; a `type` alone, or a section that is off, does not."""
    if isinstance(section, dict):
        if section.get("enabled", True) in (False, "auto"):
            return False
        return any(_is_set(key, value) for key, value in section.items() if key != "type")
    is_default = name == "gradient_accumulation_steps" and section == 1  # Accelerate fills it in
    return section not in ("auto", None) and not is_default


def _without_auto(section: Any) -> Any:
    if not isinstance(section, dict):
        return section
    return {k: _without_auto(v) for k, v in section.items() if v not in ("auto", None)}
