"""The embedded host: DomainBed's contract, written anew and small, so that nothing but this package is needed.

Its modules carry the names of DomainBed's own. What it shares with DomainBed (random draws, weights, splits, pixels,
hyperparameters) is equal bit for bit; what only DomainBed has is refused with the flag that brings it.
"""
