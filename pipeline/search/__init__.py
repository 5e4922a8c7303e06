"""Candidates, their evaluation and the searchers that propose them."""
