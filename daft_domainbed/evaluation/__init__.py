"""Judging trained models: robustness, shift, calibration, detection, fidelity (the protocol of ARES-Bench)."""
