"""The Triton path of quantised attention. This file imports no triton: the launch table is read without it."""
