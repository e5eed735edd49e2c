"""Working: one worker function, and its launchers."""
