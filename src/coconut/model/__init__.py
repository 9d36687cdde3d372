"""Tensors and modules: the mathematics of continuous thoughts. Knows no files of ours, no data sets, no stages."""
