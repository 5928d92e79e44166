"""A trained model, to be used and to be given away."""
