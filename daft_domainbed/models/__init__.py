"""The networks that algorithms are built from: by name, with pretrained weights, frozen, and read from files."""
