"""The command line: one file for each family of commands, each a thin layer over the folders below."""
