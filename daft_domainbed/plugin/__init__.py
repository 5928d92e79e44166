"""Everything of ours, added to a host and taken back."""

from daft_domainbed.plugin.registration import add_algorithm, import_source, list_sources, register, unregister

__all__ = ["add_algorithm", "import_source", "list_sources", "register", "unregister"]
