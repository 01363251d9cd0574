"""What a run says: numbers, tables, files and pictures."""
