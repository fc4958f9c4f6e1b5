"""Command-line programs: parse, call, print."""
