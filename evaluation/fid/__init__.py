"""Fréchet distances; each number is printed with the protocol that made it."""
