"""The loop, the loss of an update, and the resume state."""
