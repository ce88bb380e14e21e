"""Tokens -> tokens: one decode loop, trees, caches, models, and a drafter per file."""
