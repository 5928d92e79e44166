"""Which teacher is the right one, where it lies or who makes it, and whether it is what it says."""
