"""Pipeline stages: each a pure `run(...)` that the command line and tests call."""
