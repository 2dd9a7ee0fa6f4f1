"""A report as one HTML page for people: no network, no script."""
