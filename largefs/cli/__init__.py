"""The commands, one module each. Imports the rest; nothing imports it."""
