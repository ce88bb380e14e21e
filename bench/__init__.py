"""Doors, clock, records, tables: everything that looks at a file, a config, a prompt or a clock."""
