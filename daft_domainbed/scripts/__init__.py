"""The commands: one a file, each with `build_parser` and `main(argv)`; names with a leading underscore are helpers."""
