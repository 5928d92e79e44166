"""Results as functions of records: reading, model selection, statistics, tables, the report. None needs torch."""
