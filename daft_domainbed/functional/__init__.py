"""Pure functions of logits, inputs and features: losses, attacks, normalisations."""
