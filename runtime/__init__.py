"""The on-device half: run a bundle's artifact, flip bits in it, attack it. Imports no torch."""
