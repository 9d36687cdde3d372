"""The running of the pipeline: processes and files, no tensors."""
