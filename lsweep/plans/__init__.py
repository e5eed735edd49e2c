"""Plans: what is asked, as frozen values: settings, axes, points, rounds."""
