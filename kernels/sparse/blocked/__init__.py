"""The plain-torch path of block-sparse attention, for CPUs and for GPUs without a Triton path."""
