"""The methods, a file each, as mixins over a host's ERM; `methods.py` is their table."""
