"""Test-time training on a stream of a held-out domain, mixed with images of no known class."""
