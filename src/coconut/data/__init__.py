"""Raw files to one canonical form, to token ids, to padded views. Knows no model."""
