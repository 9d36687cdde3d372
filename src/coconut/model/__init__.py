"""Tensors and modules: the mathematics of continuous thoughts. This package knows no files, data sets or stages."""
