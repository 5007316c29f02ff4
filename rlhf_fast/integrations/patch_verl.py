"""Importing this patches verl: for `VERL_USE_EXTERNAL_MODULES`, which verl imports everywhere."""

from rlhf_fast.integrations import verl

handle = verl.patch()
