"""Damaged and hostile files through every loader and command: `make fuzz`."""
