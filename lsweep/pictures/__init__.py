"""Pictures: surfaces and measures, drawn."""
