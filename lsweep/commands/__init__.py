"""Commands: arguments in, exit codes out."""
