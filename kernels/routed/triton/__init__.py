"""Attention of routed heads on a GPU: lists of active rows, the kernel, its launch and its compiled forms."""
