"""Checkpoint folders: load, save, prove."""
