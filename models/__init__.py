"""Networks only: code, never trained files."""
