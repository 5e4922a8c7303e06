"""Device profile, latency prediction, link and energy: pure functions."""
