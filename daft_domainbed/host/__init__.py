"""What a host is, and its checkpoints as models again."""
