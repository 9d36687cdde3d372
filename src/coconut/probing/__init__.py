"""What the thoughts of an entry hold, and whether its answers need them."""
