"""The extension contracts, and the plain data that crosses them. Imports no framework."""
