"""Attention on packed codes, spelled for different machines."""
