"""Storage: files that are whole or absent, on file systems that lose answers."""
