"""From a data set to the batches of a run: splits, random streams, loaders, augmentation, decoded images."""
