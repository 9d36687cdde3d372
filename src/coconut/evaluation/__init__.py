"""Answers, accuracies and their intervals."""
