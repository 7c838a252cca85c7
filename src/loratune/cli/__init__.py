"""The command line: arguments in, tables and JSON out. No decisions are made here."""
