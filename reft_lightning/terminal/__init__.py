"""Progress output, for terminals and for pipes."""
