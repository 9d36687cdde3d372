"""`params.yaml`: its schema, its parser, its rules."""
