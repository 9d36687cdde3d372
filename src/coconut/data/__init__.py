"""Turns raw files into one canonical form, into token ids, and into padded views. It knows no model."""
