"""How the host multiplies. Importing it imports nothing."""
