"""DAFT for DomainBed: adversarially fine-tuned teachers, distilled into smaller students."""

__version__ = "0.1.0"
