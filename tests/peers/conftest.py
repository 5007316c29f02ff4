"""Comparisons with other libraries are collected where these are installed."""

from importlib.util import find_spec

PEERS = ("trl", "openrlhf")
collect_ignore_glob = [f"test_{peer}_*.py" for peer in PEERS if find_spec(peer) is None]
