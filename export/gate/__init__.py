"""The gate: an export is compared with its graph before it appears, and again on request."""
