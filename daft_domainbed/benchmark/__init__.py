"""What the `benchmark` command measures, and how."""
