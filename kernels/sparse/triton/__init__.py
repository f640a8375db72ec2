"""The Triton path of block-sparse attention. This file imports no triton: the launch tables are read without it."""
