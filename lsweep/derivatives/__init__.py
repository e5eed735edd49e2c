"""Derivatives: what gradients and Hessians tell of a point."""
