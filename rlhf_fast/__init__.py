"""rlhf_fast: the online RLHF workflow with fused C++ and CUDA kernels."""

__version__ = "0.1.0"
