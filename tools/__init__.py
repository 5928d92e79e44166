"""Programs that make what is committed: the embedded data, and the page of the claim study."""
