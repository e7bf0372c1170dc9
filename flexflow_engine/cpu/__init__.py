"""What kernels for the host's processor are made of, for the engine and for plugins. Importing it imports nothing."""
