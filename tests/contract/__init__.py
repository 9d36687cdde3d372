"""What must survive any change of structure, at the level of commands, files and public names."""
