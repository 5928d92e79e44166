"""What a run needs of the machine it runs on: files, locks, signals, random states, hardware."""
