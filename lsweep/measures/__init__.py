"""Measures: numbers from surfaces, with errors."""
