"""How one model is trained, recorded, saved and gone on with."""
